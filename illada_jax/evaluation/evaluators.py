"""What runs during training: the bound on held-out text, and what the model writes.

The one place where training and decoding meet. An evaluator is a function (params, step) → {name: number or
text} that `main` builds from `config.eval` and hands to the loop.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from illada_jax import model
from illada_jax.config import Config, DecodeConfig
from illada_jax.data.batch import Batch
from illada_jax.data.batches import Batches
from illada_jax.data.corpus import Corpus
from illada_jax.data.example_store import Examples
from illada_jax.data.tokenizers import Tokenizer
from illada_jax.decoding import Decoded, Decoder, SpecialIds, check_settings
from illada_jax.diffusion.loss import loss_weights, token_losses
from illada_jax.diffusion.process import corrupt_fixed_count
from illada_jax.errors import ConfigError, InputError
from illada_jax.evaluation.answer_metrics import make_answer_metric
from illada_jax.keys import Purpose, key_for
from illada_jax.parallel import hosts, sharding
from illada_jax.parallel.mesh import use_mesh
from illada_jax.training.loop import Evaluator

_TABLE_ROWS = 6

def make_evaluators(
    names: tuple[str, ...], config: Config, corpus: Corpus | Examples, pipeline: Batches, mesh: Mesh
) -> dict[str, Evaluator]:
    """Builds the evaluators called `names`.

    Raises:
      ConfigError: there is no such evaluator, or `config.decode` is no good.
    """
    check_evaluation(config, corpus.tokenizer)
    return {name: EVALUATORS[name](config, corpus, pipeline, mesh) for name in names}


def check_evaluation(config: Config, tokenizer: Tokenizer | None) -> None:
    """What evaluators would find wrong with the config when a run is under way.

    Args:
      config: the resolved config.
      tokenizer: that of the run; without it ids are not checked.

    Raises:
      ConfigError: an unknown evaluator, or `config.decode` is no good.
    """
    for name in (*config.eval.evaluators, *config.eval.final):
        if name not in EVALUATORS:
            raise ConfigError(f"config.eval: unknown evaluator {name!r}; known: {', '.join(EVALUATORS)}")
    if tokenizer is not None:
        check_settings(config.decode, SpecialIds.of(tokenizer), config.model.max_length,
                       model.make_init_cache(config.model))


def bits_per_byte(config: Config, corpus: Corpus | Examples, pipeline: Batches, mesh: Mesh) -> Evaluator:
    """The bound on held-out text by the fixed-count estimator (LLaDA, eq. 6): `eval/bits_per_byte` and `…_stderr`.

    Bits are divided by the original UTF-8 bytes; tokens include the EOS of every document. The standard error is that
    of a ratio over windows, so it covers the draw of masks and the choice of text; counts are stratified within a
    batch, which makes it an overestimate rather than an underestimate.
    """
    windows = pipeline.heldout_windows(corpus.heldout, config.data.length, config.eval.windows)
    rows_sharding = sharding.batch_sharding(mesh)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    batch_size = math.ceil(config.eval.batch_size / shards) * shards

    @jax.jit
    def nats(params: Any, batch: Batch, key: jax.Array) -> jax.Array:
        corrupted = corrupt_fixed_count(key, batch, config.diffusion.mask_id)
        hidden_BLD = model.hidden(config.model, params, corrupted.noisy_BL, batch.positions_BL, batch.segments_BL)
        head = lambda hidden_BCD: model.head(config.model, params, hidden_BCD)  # noqa: E731
        weights_BL = loss_weights(batch, corrupted)
        _, ce_BL, _ = token_losses(head, hidden_BLD, batch.tokens_BL, weights_BL, config.train.logits_chunk)
        return jnp.sum(weights_BL * ce_BL, axis=1)

    def evaluate(params: Any, step: int) -> dict[str, float | str]:
        del step  # the same masks every time: evaluations of one run are paired
        key = key_for(config.seed, Purpose.EVALUATION)
        num_rows = len(windows.tokens_BL)
        nats_N = np.zeros(num_rows)
        for start in range(0, num_rows, batch_size):
            part = jax.tree.map(lambda x: _pad_rows(x[start : start + batch_size], batch_size), windows)  # noqa: B023
            batch = jax.device_put(part, rows_sharding)
            with use_mesh(mesh):
                draws = [nats(params, batch, jax.random.fold_in(jax.random.fold_in(key, start), draw))
                         for draw in range(config.eval.draws)]
            nats_N[start : start + batch_size] = np.mean(hosts.fetch(draws), axis=0)[: num_rows - start]
        tokens_N = windows.maskable_BL.sum(axis=1)
        mean, stderr = ratio_and_stderr(nats_N, tokens_N)
        per_byte = corpus.heldout.num_tokens / corpus.heldout.num_bytes / math.log(2)
        return {
            "eval/bits_per_byte": mean * per_byte,
            "eval/bits_per_byte_stderr": stderr * per_byte,
            "eval/nats_per_token": mean,
        }

    return evaluate


def ratio_and_stderr(total_N: np.ndarray, size_N: np.ndarray) -> tuple[float, float]:
    """Σ total / Σ size over N independent items, and the standard error of that ratio (NaN for a single item)."""
    ratio = float(total_N.sum() / size_N.sum())
    count = len(total_N)
    if count < 2:
        return ratio, math.nan
    residual_N = total_N - ratio * size_N
    return ratio, float(np.sqrt(count / (count - 1) * np.sum(residual_N**2)) / size_N.sum())


def _pad_rows(x: np.ndarray, rows: int) -> np.ndarray:
    """Adds rows of zeros (padding: segment 0, not maskable) up to `rows`."""
    return np.pad(x, [(0, rows - len(x))] + [(0, 0)] * (x.ndim - 1))


def _decoder(config: Config, corpus: Corpus | Examples, mesh: Mesh, settings: DecodeConfig, params: Any) -> Decoder:
    logits_fn = model.make_logits_fn(config.model, params)
    return Decoder(logits_fn, settings, SpecialIds.of(corpus.tokenizer), config.model.max_length,
                   model.make_init_cache(config.model), mesh)


def samples(config: Config, corpus: Corpus | Examples, pipeline: Batches, mesh: Mesh) -> Evaluator:
    """Texts written by the model with the settings of `config.decode`, from `config.eval.prompts` in turn."""
    del pipeline
    texts = [config.eval.prompts[row % len(config.eval.prompts)] for row in range(config.eval.rows)]
    prompts = [corpus.tokenizer.encode(text) for text in texts]

    def evaluate(params: Any, step: int) -> dict[str, float | str]:
        del step
        written = _decoder(config, corpus, mesh, config.decode, params).generate(prompts)
        lines = [f"[{number}] {text}{corpus.tokenizer.decode(result.tokens)}"
                 for number, (text, result) in enumerate(zip(texts, written, strict=True), 1)]
        return {"eval/samples": "\n".join(lines)}

    return evaluate


def infill(config: Config, corpus: Corpus | Examples, pipeline: Batches, mesh: Mesh) -> Evaluator:
    """Held-out passages with `config.eval.gaps` gaps filled in, truth beside, and the share of tokens that were hit.

    Gaps are filled greedily, the surest tokens first.
    """
    tokenizer = corpus.tokenizer
    windows = pipeline.heldout_windows(corpus.heldout, config.data.length, 0)
    whole = np.flatnonzero(windows.maskable_BL.all(axis=1))
    if not len(whole):
        raise InputError(f"the evaluator infill needs held-out windows of config.data.length = {config.data.length} "
                         f"tokens, and {corpus.heldout.num_tokens} tokens are held out (config.data.heldout_fraction)")
    chosen = whole[np.linspace(0, len(whole) - 1, config.eval.rows + 2).astype(int)[1:-1]]
    passages = [windows.tokens_BL[row].tolist() for row in chosen]
    width, count = config.eval.gap_length, config.eval.gaps
    starts = [round((i + 1) * config.data.length / (count + 1) - width / 2) for i in range(count)]
    if starts[0] < 0 or any(b - a <= width for a, b in itertools.pairwise([*starts, config.data.length])):
        raise ConfigError(f"config.eval.gaps = {count}: gaps of {width} tokens (config.eval.gap_length) do not fit "
                          f"into windows of {config.data.length} tokens")
    settings = dataclasses.replace(config.decode, temperature=0.0, confidence="low_confidence")

    def with_gaps(passage: list[int]) -> list[int]:
        hidden = {column for start in starts for column in range(start, start + width)}
        return [config.diffusion.mask_id if column in hidden else token for column, token in enumerate(passage)]

    def show(passage: list[int], filled: list[int]) -> str:
        text, end = "", 0
        for start in starts:
            guess, truth = (tokenizer.decode(tokens[start : start + width]) for tokens in (filled, passage))
            text += tokenizer.decode(passage[end:start])
            text += f"⟦{guess} ✓⟧" if guess == truth else f"⟦{guess} ✗ {truth}⟧"
            end = start + width
        return text + tokenizer.decode(passage[end:])

    def evaluate(params: Any, step: int) -> dict[str, float | str]:
        del step
        results = _decoder(config, corpus, mesh, settings, params).infill([with_gaps(p) for p in passages])
        hits = [result.tokens[column] == passage[column] for passage, result in zip(passages, results, strict=True)
                for start in starts for column in range(start, start + width)]
        lines = [f"[{number}] {show(passage, result.tokens)}"
                 for number, (passage, result) in enumerate(zip(passages, results, strict=True), 1)]
        return {"eval/infill_accuracy": float(np.mean(hits)),
                "eval/infill": "\n".join(["⟦filled in ✓⟧ or ⟦filled in ✗ truth⟧", *lines])}

    return evaluate


class Questions(NamedTuple):
    """Held-out things to ask.

    Attributes:
      prompts: ids.
      asked: the prompts as text.
      answers: the reference answers as text.
      sources: the name of the source of each; empty where there is only one.
    """

    prompts: list[list[int]]
    asked: list[str]
    answers: list[str]
    sources: list[str]


def exact_match(config: Config, corpus: Corpus | Examples, pipeline: Batches, mesh: Mesh) -> Evaluator:
    """Held-out prompts are decoded with config.decode and the answers compared by config.eval.answer_metric.

    `eval/exact_match` (the mean score; beside it that of each source) with its standard error, `eval/answer_tokens`
    (without the end token), `eval/ended` (the share that ended by EOS or another end token), `eval/nfe` (network
    evaluations per answer), and a table `eval/answers`. Prompts are held-out examples; of plain documents, all up to
    and with config.eval.separator.
    """
    del pipeline
    questions = _questions(config, corpus)
    metric = make_answer_metric(config.eval.answer_metric)

    def evaluate(params: Any, step: int) -> dict[str, float | str]:
        del step
        decoded = _ask(config, corpus, mesh, config.decode, params, questions)
        answers = [corpus.tokenizer.decode(each.tokens) for each in decoded]
        rows = zip(questions.asked, answers, questions.answers, strict=True)
        scores = np.array([float(metric(*row)) for row in rows])
        results: dict[str, float | str] = {"eval/exact_match": float(scores.mean())}
        results["eval/exact_match_stderr"] = float(scores.std() / math.sqrt(len(scores)))
        for source in dict.fromkeys(questions.sources):
            here = np.array(questions.sources) == source
            results[f"eval/exact_match/{source}"] = float(scores[here].mean())
        results["eval/answer_tokens"] = float(np.mean([len(each.tokens) for each in decoded]))
        results["eval/ended"] = float(np.mean([each.stopped_by in ("eos", "stop_id") for each in decoded]))
        results["eval/nfe"] = float(np.mean([each.nfe for each in decoded]))
        results["eval/answers"] = _table(questions, answers, scores)
        return results

    return evaluate


def _table(questions: Questions, answers: list[str], scores: np.ndarray) -> str:
    """A few answers, spread over all, with their scores."""
    lines = []
    for row in dict.fromkeys(np.linspace(0, len(answers) - 1, _TABLE_ROWS).astype(int)):
        asked, answer, reference = (" ".join(text.split()) for text in (
            questions.asked[row], answers[row], questions.answers[row]))
        verdict = "✓" if scores[row] == 1 else f"✗ {reference}"
        lines.append(f"{asked[-60:]} ⟦{answer[:80]}⟧ {verdict[:80]}")
    return "\n".join(lines)


def decoding_orders(config: Config, corpus: Corpus | Examples, pipeline: Batches, mesh: Mesh) -> Evaluator:
    """A table of exact match by order and number of steps: why it pays to reveal first what is surest."""
    del pipeline
    questions = _questions(config, corpus)
    steps = config.decode.steps_per_block
    variants = [(order, count) for count in sorted({steps, max(1, steps // 4), 1}, reverse=True)
                for order in ("low_confidence", "random")]

    def evaluate(params: Any, step: int) -> dict[str, float | str]:
        del step
        lines = ["order            steps  evaluations  exact match"]
        for order, count in variants:
            settings = dataclasses.replace(config.decode, confidence=order, steps_per_block=count)
            decoded = _ask(config, corpus, mesh, settings, params, questions)
            answers = [corpus.tokenizer.decode(each.tokens) for each in decoded]
            share = float(np.mean([a == b for a, b in zip(answers, questions.answers, strict=True)]))
            nfe = float(np.mean([each.nfe for each in decoded]))
            error = math.sqrt(share * (1 - share) / len(answers))
            lines.append(f"{order:15} {count:6} {nfe:12.1f}  {share:.3f} ± {error:.3f}")
        return {"eval/decoding_orders": "\n".join(lines)}

    return evaluate


def _questions(config: Config, corpus: Corpus | Examples) -> Questions:
    """At most config.eval.rows held-out questions: examples spread evenly over all, or the first documents."""
    available = corpus.heldout.num_documents
    if not available:
        raise InputError("nothing is held out (config.data.heldout_fraction), so there is nothing to ask")
    count = min(config.eval.rows, available)
    decode = corpus.tokenizer.decode
    if isinstance(corpus, Examples):
        chosen = [index * available // count for index in range(count)]
        asked = [corpus.heldout.question(index) for index in chosen]
        sources = [corpus.sources[corpus.heldout.sources_N[index]] for index in chosen]
        return Questions([each.prompt for each in asked], [decode(each.prompt) for each in asked],
                         [decode(each.answer) for each in asked], sources if len(corpus.sources) > 1 else [])
    separator = config.eval.separator
    texts = [decode(corpus.heldout.document(index)) for index in range(count)]
    for index, text in enumerate(texts):
        if separator not in text:
            raise ConfigError(f"config.eval.separator = {separator!r}: not in held-out document {index}: {text[:60]!r}")
    parts = [text.partition(separator) for text in texts]
    asked = [prompt + found for prompt, found, _ in parts]
    return Questions([corpus.tokenizer.encode(text) for text in asked], asked, [answer for *_, answer in parts], [])


def _ask(config: Config, corpus: Corpus | Examples, mesh: Mesh, settings: DecodeConfig, params: Any,
         questions: Questions) -> list[Decoded]:
    return _decoder(config, corpus, mesh, settings, params).generate(questions.prompts)


EVALUATORS: dict[str, Callable[[Config, Corpus | Examples, Batches, Mesh], Evaluator]] = {
    "bits_per_byte": bits_per_byte,
    "samples": samples,
    "infill": infill,
    "exact_match": exact_match,
    "decoding_orders": decoding_orders,
}
