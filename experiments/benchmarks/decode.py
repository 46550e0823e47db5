"""Decoding speed beside the published loop in eager PyTorch, and the quality of each strategy and cache.

Examples:
  python experiments/benchmarks/decode.py --repeats=3
  python experiments/benchmarks/decode.py --prompt_lengths=256,1024,3840 --tokens_per_step=1,4 --layers=4 --d_model=256
  python experiments/benchmarks/decode.py --answer=40 --repeats=5
  python experiments/benchmarks/decode.py --checkpoint=workdirs/sudoku --rows=64
  python experiments/benchmarks/decode.py --checkpoint=workdirs/quickstart --rows=32

Without a checkpoint, a random network of the given size decodes one prompt greedily, with variable length, for every
cache. `first` are the processor seconds to the first block, which include the prompt, and `after` the tokens per
processor second behind it. The PyTorch row is `torch_llada.py` with the same weights; without PyTorch a message
replaces it. On a busy machine pin the process to one core and compare processor seconds. About 7 minutes.

With `--answer=40` the network is forced to end its answer at the 40th token: the time must depend on the answer, not on
the budget.

With a checkpoint, every strategy and cache decodes its held-out data. The score is exact match (documents with the
separator of `config.eval`) or the share of gap tokens filled in exactly (other text); `agreement` is the share of
tokens equal to those of exact decoding, one token per step. The cache `append` is refreshed every n blocks, `append/n`;
smaller blocks (`--block_length=4`) give it some. The last lines show the share of tokens that do not depend
on the batch: all in float32, except near-ties; in bfloat16 as measured.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from illada_jax import api, cli, model
from illada_jax.config import DecodeConfig, ModelConfig
from illada_jax.data.corpus import open_corpus
from illada_jax.decoding import Decoded, Decoder, SpecialIds

CHECKPOINT = flags.DEFINE_string("checkpoint", "", "workdir of a trained model for the table of quality; empty: speed")
ROWS = flags.DEFINE_integer("rows", 32, "held-out documents or passages of the table")
LAYERS = flags.DEFINE_integer("layers", 12, "layers of the random network")
WIDTH = flags.DEFINE_integer("d_model", 512, "width of the random network")
VOCABULARY = flags.DEFINE_integer("vocab_size", 32_000, "vocabulary of the random network")
PROMPTS = flags.DEFINE_list("prompt_lengths", ["256"], "tokens of the prompt; several are measured one after another")
NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "tokens to generate")
BLOCK = flags.DEFINE_integer("block_length", 0, "tokens of a block; 0: 32, or what the checkpoint says")
PER_STEP = flags.DEFINE_list("tokens_per_step", ["1"], "tokens that a step writes; several are measured")
CACHES = flags.DEFINE_list("caches", ["none", "prefix", "dual", "append"], "caches to measure against the first")
ANSWER = flags.DEFINE_integer("answer", 0, "time an answer of this many tokens under growing budgets instead")
REPEATS = flags.DEFINE_integer("repeats", 1, "number of runs; the fastest counts")

MASK = 5


def main(argv: list[str]) -> None:
    """Prints one of the two tables."""
    del argv
    if CHECKPOINT.value:
        quality_table(CHECKPOINT.value)
    elif ANSWER.value:
        budget_table()
    else:
        for prompt_length in map(int, PROMPTS.value):
            for tokens_per_step in map(int, PER_STEP.value):
                speed_table(prompt_length, tokens_per_step)


class Timed(NamedTuple):
    """The fastest of the repeats: wall-clock and processor seconds, and the result."""

    seconds: float
    processor: float
    result: Any


def fastest(run: Callable[[], object]) -> Timed:
    """Runs a function --repeats times."""
    seconds, processor, result = [], [], None
    for _ in range(REPEATS.value):
        start, start_processor = time.perf_counter(), time.process_time()
        result = run()
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - start_processor)
    return Timed(min(seconds), min(processor), result)


def speed_table(prompt_length: int, tokens_per_step: int) -> None:
    """Seconds of exact and cached decoding beside PyTorch."""
    config = _network(prompt_length + NEW_TOKENS.value)
    # EOS and PAD lie outside the vocabulary: no id can stop a row, so all decode the same number of tokens.
    ids = SpecialIds(mask=MASK, eos=config.vocab_size, bos=0, pad=1, vocab_size=config.vocab_size)
    params = jax.jit(lambda key: model.init_params(config, key))(jax.random.key(0))
    prompt, block = np.random.default_rng(0).integers(6, config.vocab_size, prompt_length).tolist(), BLOCK.value or 32
    settings = DecodeConfig(max_new_tokens=NEW_TOKENS.value, block_length=block,
                            steps_per_block=-(-block // tokens_per_step))
    buckets = range(prompt_length + block, config.max_length + 1, block)
    print(f"{model.num_params(config):,} parameters, vocabulary {config.vocab_size}, prompt {prompt_length}, "
          f"{NEW_TOKENS.value} new tokens, blocks of {block}, {settings.steps_per_block} steps each")

    eager = _torch_run(config, params, prompt, settings)
    floor = least_seconds(config, settings, prompt_length)
    print(f"the matrix products of exact decoding alone, at the rate of large ones: {floor:.1f} s"
          + (f", {eager.processor / floor:.2f} x PyTorch" if eager else ""))
    print(f"{'':14} {'seconds':>8} {'processor':>10} {'tokens/s':>9} {'first':>7} {'after':>7} {'nfe':>5} {'same':>6} "
          f"{'x PyTorch':>10} {'(processor)':>12}")
    if eager:
        print(f"{'PyTorch eager':14} {eager.seconds:8.2f} {eager.processor:10.2f} "
              f"{NEW_TOKENS.value / eager.seconds:9.1f}")
    exact = None
    for cache in CACHES.value:
        decoder = Decoder(model.make_logits_fn(config, params), dataclasses.replace(settings, cache=cache), ids,
                          config.max_length, model.make_init_cache(config), buckets=buckets)
        one_block = [dataclasses.replace(decoder.settings, max_new_tokens=block)]
        decoder.generate([prompt])  # compiles
        timed = fastest(lambda: decoder.generate([prompt]))  # noqa: B023
        first = fastest(lambda: decoder.generate([prompt], row_settings=one_block))  # noqa: B023
        after = (NEW_TOKENS.value - block) / max(timed.processor - first.processor, 1e-9)
        exact = exact or timed.result
        line = (f"{'exact' if cache == 'none' else cache + ' cache':14} {timed.seconds:8.2f} {timed.processor:10.2f} "
                f"{NEW_TOKENS.value / timed.seconds:9.1f} {first.processor:7.2f} {after:7.1f} {timed.result[0].nfe:5} "
                f"{agreement(timed.result, exact):6.3f}")
        if eager:
            line += f" {eager.seconds / timed.seconds:10.2f} {eager.processor / timed.processor:12.2f}"
        print(line, flush=True)


def least_seconds(config: ModelConfig, settings: DecodeConfig, prompt_length: int) -> float:
    """Processor seconds of the matrix products of exact decoding at the rate of large products, a lower bound.

    Counts what the decoder computes: the last layer's queries and MLP, and the head, for the active block only.
    """
    size = 2048
    matrix = jnp.ones((size, size))
    multiply = jax.jit(jnp.matmul)
    multiply(matrix, matrix).block_until_ready()
    rates = []
    for _ in range(5):
        start = time.process_time()
        multiply(matrix, matrix).block_until_ready()
        rates.append(2 * size**3 / (time.process_time() - start))
    c, flops = config, 0.0
    keys = 4 * c.d_model * c.num_kv_heads * c.head_dim
    rest = 4 * c.d_model * c.num_heads * c.head_dim + 6 * c.d_model * c.d_ff
    block = settings.block_length
    for length in range(prompt_length + block, prompt_length + settings.max_new_tokens + 1, block):
        attention = 4 * length * c.num_heads * c.head_dim
        whole = length * (keys + rest + attention)
        last = length * keys + block * (rest + attention + 2 * c.d_model * c.vocab_size)
        flops += settings.steps_per_block * ((c.num_layers - 1) * whole + last)
    return flops / max(rates)


def budget_table() -> None:
    """Seconds for an answer of given length, by budget of new tokens."""
    budgets = (64, 256, 1024)
    prompt_length, block = int(PROMPTS.value[0]), BLOCK.value or 32
    config = _network(prompt_length + max(budgets))
    ids = SpecialIds(mask=MASK, eos=2, bos=0, pad=1, vocab_size=config.vocab_size)
    logits_fn = model.make_logits_fn(config, jax.jit(lambda key: model.init_params(config, key))(jax.random.key(0)))
    ending = jax.tree_util.Partial(_ends_at, logits_fn, jnp.int32(prompt_length + ANSWER.value))
    prompt = np.random.default_rng(0).integers(6, config.vocab_size, prompt_length).tolist()
    print(f"{'budget':>6} {'seconds':>8} {'processor':>10} {'nfe':>5} {'tokens':>7}")
    decoders = {}
    for budget in budgets:
        settings = DecodeConfig(max_new_tokens=budget, block_length=block, steps_per_block=block)
        decoders[budget] = Decoder(ending, settings, ids, config.max_length)
        decoders[budget].generate([prompt])  # compiles
    for budget, decoder in decoders.items():
        timed = fastest(lambda: decoder.generate([prompt]))  # noqa: B023
        print(f"{budget:6} {timed.seconds:8.2f} {timed.processor:10.2f} {timed.result[0].nfe:5} "
              f"{len(timed.result[0].tokens):7}", flush=True)


def _ends_at(logits_fn, end, tokens_BT, positions_BT, segments_BT, query_columns_BQ, cache):
    """The network, forced to predict EOS from column `end` on and nowhere before."""
    logits_BQV, cache = logits_fn(tokens_BT, positions_BT, segments_BT, query_columns_BQ, cache)
    return logits_BQV.at[:, :, 2].set(jnp.where(query_columns_BQ >= end, 1e9, -1e9)), cache


def _network(max_length: int) -> ModelConfig:
    return ModelConfig(vocab_size=VOCABULARY.value, d_model=WIDTH.value, num_layers=LAYERS.value,
                       num_heads=WIDTH.value // 64, num_kv_heads=max(1, WIDTH.value // 256), head_dim=64,
                       d_ff=3 * WIDTH.value, max_length=max_length)


def _torch_run(config: ModelConfig, params: dict, prompt: list[int], settings: DecodeConfig) -> Timed | None:
    try:
        import torch
        from torch_llada import Network, variable_length
    except ImportError:
        print("PyTorch is not installed: no comparison")
        return None
    weights = {"/".join(part.key for part in path): torch.from_numpy(np.array(value))
               for path, value in jax.tree_util.tree_leaves_with_path(params)}
    network = Network(weights, config.num_layers, config.rope_theta, config.norm_eps)
    ids = {"mask": MASK, "eos": config.vocab_size}
    return fastest(lambda: variable_length(network, prompt, ids, settings.max_new_tokens, settings.block_length,
                                           settings.steps_per_block))


def quality_table(checkpoint: str) -> None:
    """Tokens per evaluation, time, agreement with exact decoding and task score of strategy × cache."""
    lm = api.load(checkpoint)
    corpus = open_corpus(lm.config.data)
    prompts, score, infill = held_out_task(lm, corpus)
    params = {"float32": lm.params, "bfloat16": jax.tree.map(lambda x: x.astype(jnp.bfloat16), lm.params)}

    def decode(settings: DecodeConfig, dtype: str, prompts: list[list[int]]) -> list[Decoded]:
        network = dataclasses.replace(lm.config.model, dtype=dtype)
        decoder = Decoder(model.make_logits_fn(network, params[dtype]), settings, SpecialIds.of(lm.tokenizer),
                          network.max_length, model.make_init_cache(network))
        return decoder.generate(prompts, infill)

    block = BLOCK.value or lm.config.decode.block_length
    one_per_step = dataclasses.replace(lm.config.decode, temperature=0.0, reveal="schedule", block_length=block,
                                       confidence="low_confidence", steps_per_block=block)
    variants = {"schedule, 1 a step": {}, "schedule, 2 a step": {"steps_per_block": -(-block // 2)},
                "schedule, 4 a step": {"steps_per_block": -(-block // 4)},
                "threshold 0.9": {"reveal": "threshold", "threshold": 0.9},
                "threshold 0.6": {"reveal": "threshold", "threshold": 0.6},
                "factor 1": {"reveal": "factor", "factor": 1.0},
                "entropy_bound 0.1": {"reveal": "entropy_bound", "entropy_bound": 0.1},
                "margin": {"confidence": "margin"}, "entropy": {"confidence": "entropy"},
                "random order": {"confidence": "random"}}
    score_name = "share of gap tokens" if infill else "exact match"
    print(f"{len(prompts)} rows, blocks of {one_per_step.block_length}; score: {score_name}")
    print(f"{'strategy':18} {'cache':8} {'tokens/nfe':>10} {'cpu secs':>8} {'agreement':>10} {'score':>7}")
    exact = None
    # For gaps a prefix cache recomputes all masks at every step, which is the whole canvas of a short text.
    caches = ("none", "dual") if infill else ("none", "prefix", "append/1", "append/2", "append/4", "append/0")
    for cache in caches:
        kind, _, refresh = cache.partition("/")
        for name, changes in variants.items():
            settings = dataclasses.replace(one_per_step, cache=kind, cache_refresh=int(refresh or 0), **changes)
            decode(settings, "float32", prompts)  # compiles
            _, seconds, results = fastest(lambda: decode(settings, "float32", prompts))  # noqa: B023
            exact = exact or results
            written = sum(step >= 0 for result in results for step in result.reveal_step)
            print(f"{name:18} {cache:8} {written / sum(r.nfe for r in results):10.2f} {seconds:8.2f} "
                  f"{agreement(results, exact):10.3f} {score(results):7.3f}", flush=True)
    for dtype in params:
        batched = decode(one_per_step, dtype, prompts)
        alone = [decode(one_per_step, dtype, [prompt])[0] for prompt in prompts]
        print(f"alone and in a batch, {dtype}: {agreement(batched, alone):.4f} of the tokens are equal")


def agreement(results: Sequence[Decoded], exact: Sequence[Decoded]) -> float:
    """Share of the exact tokens that the results have at the same position; given tokens do not count."""
    same = []
    for result, reference in zip(results, exact, strict=True):
        written = [index for index, step in enumerate(reference.reveal_step) if step >= 0]
        same += [result.tokens[index : index + 1] == [reference.tokens[index]] for index in written]
    return float(np.mean(same))


def held_out_task(lm: api.LanguageModel, corpus) -> tuple[list[list[int]], Callable[[Sequence[Decoded]], float], bool]:
    """Questions, or passages with gaps of three tokens: (prompts, score of results, True if prompts have gaps)."""
    documents = [corpus.heldout.document(i).tolist() for i in range(min(2_000, corpus.heldout.num_documents))]
    if "exact_match" in lm.config.eval.evaluators + lm.config.eval.final:
        texts = [lm.tokenizer.decode(document) for document in documents[: ROWS.value]]
        parts = [text.partition(lm.config.eval.separator) for text in texts]
        prompts = [lm.tokenizer.encode(question + separator) for question, separator, _ in parts]
        answers = [answer for _, _, answer in parts]
        return prompts, lambda results: float(np.mean([
            lm.tokenizer.decode(r.tokens) == answer for r, answer in zip(results, answers, strict=True)])), False
    length = lm.config.data.length
    truths = [document[:length] for document in documents if len(document) >= length][: ROWS.value]
    gaps = [start + offset for start in range(length // 8, length - 2, length // 4) for offset in range(3)]
    masked = [[lm.tokenizer.mask_id if column in gaps else token for column, token in enumerate(truth)]
              for truth in truths]
    return masked, lambda results: float(np.mean([
        [r.tokens[gap] == truth[gap] for gap in gaps] for r, truth in zip(results, truths, strict=True)])), True


if __name__ == "__main__":
    cli.run(main)
