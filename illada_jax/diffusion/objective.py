"""The training objective: a weighted cross-entropy on masked tokens that bounds -log p(x) (iLLaDA paper, objective).

B is rows, L positions, D model width, K buckets of the masking probability.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from illada_jax.data.batch import Batch
from illada_jax.diffusion.process import Corrupted

NUM_BUCKETS = 10

# (hidden_BLD, targets_BL, weights_BL) → (Σ weight · CE, ce_BL, correct_BL), see `token_losses`.
TokenLosses = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]


class LossSums(NamedTuple):
    """Sums over a batch, float32 scalars (and [K] by masking probability): add them up, divide once."""

    loss: jax.Array  # Σ over masked of weight · CE / p, in nats
    weight: jax.Array  # Σ over maskable of weight; loss / weight is the bound per token
    masked: jax.Array  # number of masked tokens
    maskable: jax.Array  # number of maskable tokens
    correct: jax.Array  # number of masked tokens that the argmax predicts
    # By masking probability, the k-th of NUM_BUCKETS equal parts of (0, 1]:
    masked_K: jax.Array  # number of masked tokens
    ce_K: jax.Array  # sum of their unweighted cross-entropies, in nats
    correct_K: jax.Array  # number of those that the argmax predicts


def objective(token_losses: TokenLosses, hidden_BLD: jax.Array, batch: Batch, corrupted: Corrupted,
              normaliser: jax.Array | None = None) -> tuple[jax.Array, LossSums, jax.Array]:
    """Σ over masked of weight · CE / p, divided by the normaliser: a float32 scalar in nats per token.

    Only it is differentiable. Also returns the sums over the batch, and nats_B: float32, Σ over the masked positions of
    a row of weight · CE / p.

    Args:
      token_losses: the head with its cross-entropy, see `diffusion/token_losses.py`.
      hidden_BLD: final hidden states of `corrupted.noisy_BL`.
      batch: the rows, or a part of a global batch.
      corrupted: their corruption.
      normaliser: Σ over maskable of weight of the whole global batch, where `batch` is a part of it; default: that of
        `batch`.
    """
    chex.assert_equal_shape([batch.tokens_BL, batch.maskable_BL, batch.weights_BL, *corrupted])
    # p may be 0 where nothing is masked.
    p_BL = jnp.where(corrupted.masked_BL, corrupted.p_BL, 1.0)
    weights_BL = jnp.where(corrupted.masked_BL, batch.weights_BL / p_BL, 0.0)
    normaliser = jnp.maximum(total_weight(batch) if normaliser is None else normaliser, 1e-30)
    # Divided here and not after the loss, so that no gradient of the size of the embedding is scaled afterwards.
    loss, ce_BL, correct_BL = token_losses(hidden_BLD, batch.tokens_BL, weights_BL / normaliser)
    sums = _sums(loss * normaliser, ce_BL, correct_BL, batch, corrupted)
    return loss, sums, jnp.sum(weights_BL * ce_BL, axis=1)


def total_weight(batch: Batch) -> jax.Array:
    """Σ over maskable of weight, a float32 scalar.

    Rows first, then over the rows: the error of one long float32 sum would exceed the contribution of a part, and the
    compiler merges two sums that follow each other.
    """
    weight_B = jnp.sum(jnp.where(batch.maskable_BL, batch.weights_BL, 0.0), axis=1)
    return jnp.sum(jax.lax.optimization_barrier(weight_B))


def _sums(loss: jax.Array, ce_BL: jax.Array, correct_BL: jax.Array, batch: Batch, corrupted: Corrupted) -> LossSums:
    masked_BL = corrupted.masked_BL
    bucket_BL = jnp.clip(jnp.ceil(corrupted.p_BL * NUM_BUCKETS) - 1, 0, NUM_BUCKETS - 1).astype(jnp.int32)

    def by_bucket(x_BL: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(x_BL.reshape(-1), bucket_BL.reshape(-1), NUM_BUCKETS)

    return LossSums(
        loss=loss,
        weight=total_weight(batch),
        masked=jnp.sum(masked_BL, dtype=jnp.float32),
        maskable=jnp.sum(batch.maskable_BL, dtype=jnp.float32),
        correct=jnp.sum(correct_BL & masked_BL, dtype=jnp.float32),
        masked_K=by_bucket(masked_BL.astype(jnp.float32)),
        ce_K=by_bucket(jnp.where(masked_BL, ce_BL, 0.0)),
        correct_K=by_bucket((correct_BL & masked_BL).astype(jnp.float32)),
    )
