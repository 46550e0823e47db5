"""What runs during training: the bound on held-out text, and what the model writes.

The one room that knows training, decoding and scoring. An evaluator is a function (params, step) → {name: number or text}
that `main` builds from `config.eval` and hands to the loop.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from illada_jax import model
from illada_jax.config import Config
from illada_jax.data.batch import Batch
from illada_jax.data.corpus import Corpus
from illada_jax.data.pipeline import Pipeline
from illada_jax.diffusion.loss import row_losses, token_losses
from illada_jax.diffusion.process import corrupt_fixed_count
from illada_jax.errors import ConfigError
from illada_jax.keys import Purpose, key_for
from illada_jax.parallel import sharding

Evaluator = Callable[[Any, int], dict[str, float | str]]


def make_evaluators(
    names: tuple[str, ...], config: Config, corpus: Corpus, pipeline: Pipeline, mesh: Mesh
) -> dict[str, Evaluator]:
    """Builds the evaluators called `names`.

    Raises:
      ConfigError: there is no such evaluator.
    """
    for name in names:
        if name not in EVALUATORS:
            raise ConfigError(f"config.eval: unknown evaluator {name!r}; known: {', '.join(EVALUATORS)}")
    return {name: EVALUATORS[name](config, corpus, pipeline, mesh) for name in names}


def bits_per_byte(config: Config, corpus: Corpus, pipeline: Pipeline, mesh: Mesh) -> Evaluator:
    """The bound on held-out text by the fixed-count estimator (LLaDA, eq. 6): `eval/bits_per_byte` and `…_stderr`.

    Bits are divided by the original UTF-8 bytes; tokens include the EOS of every document. The standard error is that of
    a ratio over windows, so it covers the draw of masks and the choice of text; counts are stratified within a batch,
    which makes it an overestimate rather than an underestimate.
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
        ce_BL, _ = token_losses(head, hidden_BLD, batch.tokens_BL, config.train.logits_chunk)
        return row_losses(ce_BL, batch, corrupted)

    def evaluate(params: Any, step: int) -> dict[str, float | str]:
        del step  # the same masks every time: evaluations of one run are paired
        key = key_for(config.seed, Purpose.EVALUATION)
        num_rows = len(windows.tokens_BL)
        nats_N = np.zeros(num_rows)
        for start in range(0, num_rows, batch_size):
            part = jax.tree.map(lambda x: _pad_rows(x[start : start + batch_size], batch_size), windows)  # noqa: B023
            batch = jax.device_put(part, rows_sharding)
            draws = [nats(params, batch, jax.random.fold_in(jax.random.fold_in(key, start), draw))
                     for draw in range(config.eval.draws)]
            nats_N[start : start + batch_size] = np.mean(jax.device_get(draws), axis=0)[: num_rows - start]
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


EVALUATORS: dict[str, Callable[[Config, Corpus, Pipeline, Mesh], Evaluator]] = {"bits_per_byte": bits_per_byte}
