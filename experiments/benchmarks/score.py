"""Speed of confidence-based scoring beside the published loop in eager PyTorch.

Example:
  python experiments/benchmarks/score.py --questions=8

A random network of the given size scores random candidates of mixed lengths. The PyTorch row is the published loop with
the same weights: one candidate at a time, one evaluation of the whole row for each of its tokens, logits everywhere;
without PyTorch a message replaces it. On a busy machine pin the process to one core and compare processor seconds.

`sums` are the paper's scores, exactly. `choice` is the best candidate of each question by score per token, exactly,
found without finishing candidates that cannot win. `cached` evaluates each context once, which approximates; `sums, k a
step` approximates the scores by revealing k tokens at each step. `experiments/studies/scoring.py` measures the loss in
quality on trained models.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from illada_jax import cli, model
from illada_jax.config import ModelConfig
from illada_jax.decoding import SpecialIds
from illada_jax.scoring import ScoreConfig, Scorer

LAYERS = flags.DEFINE_integer("layers", 12, "layers of the random network")
WIDTH = flags.DEFINE_integer("d_model", 512, "width of the random network")
VOCABULARY = flags.DEFINE_integer("vocab_size", 32_000, "vocabulary of the random network")
QUESTIONS = flags.DEFINE_integer("questions", 8, "questions to score")
CANDIDATES = flags.DEFINE_integer("candidates", 4, "candidates of a question")
CONTEXT = flags.DEFINE_integer("context_length", 64, "tokens of a question")
SHORTEST = flags.DEFINE_integer("shortest", 8, "tokens of the shortest candidate")
LONGEST = flags.DEFINE_integer("longest", 40, "tokens of the longest candidate")
BATCH = flags.DEFINE_integer("batch_size", 16, "rows scored at the same time")

MASK = 5
Pair = tuple[list[int], list[int]]


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    longest = CONTEXT.value + LONGEST.value
    config = ModelConfig(vocab_size=VOCABULARY.value, d_model=WIDTH.value, num_layers=LAYERS.value,
                         num_heads=WIDTH.value // 64, num_kv_heads=max(1, WIDTH.value // 256), head_dim=64,
                         d_ff=3 * WIDTH.value, max_length=longest)
    params = jax.jit(lambda key: model.init_params(config, key))(jax.random.key(0))
    questions = random_questions(config)
    pairs = [pair for question in questions for pair in question]
    print(f"{model.num_params(config):,} parameters, vocabulary {config.vocab_size}; {len(questions)} questions of "
          f"{CONTEXT.value} tokens, {len(pairs)} candidates of {SHORTEST.value} to {LONGEST.value} tokens, "
          f"{np.mean([len(candidate) for _, candidate in pairs]):.1f} on average")
    print(f"{'':16} {'seconds':>8} {'processor':>10} {'evaluations':>12} {'a candidate':>12} {'x PyTorch':>10} "
          f"{'(processor)':>12}")
    published = torch_seconds(config, params, pairs)
    print_line("PyTorch eager", published, sum(len(candidate) for _, candidate in pairs), len(pairs), published)

    def scorer(settings: dict[str, Any]) -> Scorer:
        ids = SpecialIds(mask=MASK, eos=2, bos=0, pad=1, vocab_size=config.vocab_size)
        score = ScoreConfig(batch_size=BATCH.value, **settings)
        return Scorer(model.make_logits_fn(config, params), score, ids, longest,
                      init_cache=model.make_init_cache(config))

    lengths = [[len(candidate) for _, candidate in question] for question in questions]
    variants: dict[str, dict[str, Any]] = {
        "sums": {}, "sums, cached": {"context_cache": True}, "choice": {}, "choice, cached": {"context_cache": True},
        "sums, 2 a step": {"tokens_per_step": 2}, "sums, 4 a step": {"tokens_per_step": 4},
        "Monte-Carlo, 16": {"method": "monte_carlo", "mc_num": 16},
        "… cached": {"method": "monte_carlo", "mc_num": 16, "context_cache": True},
    }
    for name, settings in variants.items():
        for _ in range(2):  # the first time compiles; a new scorer remembers no context
            used = scorer(settings)
            run = (functools.partial(used.choose, questions, lengths) if name.startswith("choice")
                   else functools.partial(used.score, pairs))
            seconds = timed(run)
        print_line(name, seconds, used.evaluator.evaluations, len(pairs), published)
    print_bound(config, pairs, published)


def random_questions(config: ModelConfig) -> list[list[Pair]]:
    """Random ids; the candidates of a question differ in length."""
    rng = np.random.default_rng(0)

    def tokens(length: int) -> list[int]:
        return rng.integers(MASK + 1, config.vocab_size, length).tolist()

    questions = []
    for _ in range(QUESTIONS.value):
        context = tokens(CONTEXT.value)
        questions.append([(context, tokens(rng.integers(SHORTEST.value, LONGEST.value + 1)))
                          for _ in range(CANDIDATES.value)])
    return questions


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and processor seconds."""
    start, start_processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - start_processor


def print_line(name: str, seconds: tuple[float, float] | None, evaluations: int, candidates: int,
               published: tuple[float, float] | None) -> None:
    """Prints a row of the table, or nothing if there are no seconds."""
    if seconds is None:
        return
    line = f"{name:16} {seconds[0]:8.2f} {seconds[1]:10.2f} {evaluations:12} {evaluations / candidates:12.1f}"
    if published:
        line += f" {published[0] / seconds[0]:10.2f} {published[1] / seconds[1]:12.2f}"
    print(line, flush=True)


def print_bound(config: ModelConfig, pairs: list[Pair], published: tuple[float, float] | None) -> None:
    """Prints the limit of one evaluation per token: its matrix products at the rate of products of this size."""
    total = {"all logits": 0.0, "what is asked for": 0.0}
    layer = (model.num_params(config) - config.vocab_size * config.d_model) / config.num_layers
    head, scores = config.vocab_size * config.d_model, 2 * config.num_heads * config.head_dim
    for context, candidate in pairs:
        length = len(context) + len(candidate)
        for hidden in range(1, len(candidate) + 1):
            whole = length * (layer + scores * length)
            total["all logits"] += 2 * (config.num_layers * whole + length * head)
            total["what is asked for"] += 2 * ((config.num_layers - 1) * whole + hidden * (layer + head))
    x, w = jnp.ones((BATCH.value * 96, config.d_model)), jnp.ones((config.d_model, config.d_ff))
    product = jax.jit(lambda x, w: x @ w)
    times = [timed(lambda: [product(x, w).block_until_ready() for _ in range(20)])[1] for _ in range(6)]
    peak = 20 * 2 * x.shape[0] * w.size / min(times[1:])
    print("products in TFLOP: " + ", ".join(f"{name} {count / 1e12:.2f}" for name, count in total.items())
          + f"; such products run at {peak / 1e9:.0f} GFLOP/s")
    if published:
        least = total["what is asked for"] / peak
        print(f"so the sums take {least:.2f} s at least, {published[1] / least:.2f} x PyTorch at most (processor)")


def torch_seconds(config: ModelConfig, params: dict, pairs: list[Pair]) -> tuple[float, float] | None:
    """Wall-clock and processor seconds of the published loop; None without PyTorch."""
    try:
        import torch
        from torch_llada import Network, confidence_score
    except ImportError:
        print("PyTorch is not installed: no comparison")
        return None
    weights = {"/".join(part.key for part in path): torch.from_numpy(np.array(value))
               for path, value in jax.tree_util.tree_leaves_with_path(params)}
    network = Network(weights, config.num_layers, config.rope_theta, config.norm_eps)
    confidence_score(network, pairs[0][0], pairs[0][1][:2], MASK)  # warms up
    return timed(lambda: [confidence_score(network, context, candidate, MASK) for context, candidate in pairs])


if __name__ == "__main__":
    cli.run(main)
