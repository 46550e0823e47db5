"""Corruption by masking: times, masks, noisy tokens (iLLaDA paper, objective).

B is rows, L is positions. Everything is a pure function of a key and global row numbers: a row is corrupted the same
way on one device or on many, in one micro-batch or in several.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from illada_jax.config import DiffusionConfig
from illada_jax.data.batch import Batch

GOLDEN_RATIO = (1 + 5**0.5) / 2


class Corrupted(NamedTuple):
    """Corrupted tokens and the positions to predict."""

    noisy_BL: jax.Array  # int32 tokens, MASK where masked
    masked_BL: jax.Array  # bool
    p_BL: jax.Array  # float32 masking probability of the position; its inverse weights the loss


def stratified_ranks(batch_size: int) -> np.ndarray:
    """Permutation of 0 … B-1 whose aligned slices are each spread nearly evenly, int32 [B].

    For a power of two it is the bit reversal.

    >>> stratified_ranks(8).tolist()  # the halves of every half are apart
    [0, 4, 2, 6, 1, 5, 3, 7]
    """
    bits = max(1, (batch_size - 1).bit_length())
    reversed_B = [int(f"{row:0{bits}b}"[::-1], 2) for row in range(batch_size)]
    return np.argsort(np.argsort(reversed_B)).astype(np.int32)


def stratified_times(key: jax.Array, batch_size: int) -> jax.Array:
    """One time per row, frac(u + rank(row) / B): each uniform, jointly evenly spread. float32 [B] in [0, 1)."""
    return jnp.mod(jax.random.uniform(key) + stratified_ranks(batch_size) / np.float32(batch_size), 1.0)


def sample_times(key: jax.Array, segments_BL: jax.Array, sampling: str) -> jax.Array:
    """Time of every position; the positions of a segment share one, since each segment is a separate sequence.

    Args:
      key: key of the step.
      segments_BL: int32 segments, 1, 2, …; 0 is padding.
      sampling: `stratified` spreads the first segments of the rows evenly over [0, 1) and adds the golden ratio for
        each further one; `uniform` draws each segment's time independently.

    Returns:
      float32 times_BL in [0, 1).
    """
    batch_size, length = segments_BL.shape
    if sampling == "stratified":
        times_B = stratified_times(key, batch_size)
        return jnp.mod(times_B[:, None] + (segments_BL - 1) * jnp.float32(GOLDEN_RATIO), 1.0)
    times_BS = _uniform_rows(key, jnp.arange(batch_size), length + 1)
    return jnp.take_along_axis(times_BS, segments_BL, axis=1)


def _uniform_rows(key: jax.Array, rows_B: jax.Array, length: int) -> jax.Array:
    """Uniform numbers [B, length]; those of row r depend on (key, r) alone."""
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows_B)
    return jax.vmap(lambda row_key: jax.random.uniform(row_key, (length,)))(keys_B)


def corrupt(key: jax.Array, batch: Batch, config: DiffusionConfig) -> Corrupted:
    """Masks each token of a whole global batch independently; at time t with probability p(t) = (1 - eps)·t + eps.

    Tokens of a segment share a time. eps keeps p away from 0, and so the weights 1/p of the loss finite; with eps = 0
    the objective is exactly the bound.
    """
    chex.assert_equal_shape([batch.tokens_BL, batch.maskable_BL, batch.segments_BL])
    time_key, mask_key = jax.random.split(key)
    times_BL = sample_times(time_key, batch.segments_BL, config.time_sampling)
    p_BL = (1 - config.eps) * times_BL + config.eps
    batch_size, length = batch.tokens_BL.shape
    masked_BL = (_uniform_rows(mask_key, jnp.arange(batch_size), length) < p_BL) & batch.maskable_BL
    return Corrupted(jnp.where(masked_BL, config.mask_id, batch.tokens_BL), masked_BL, p_BL)


def corrupt_fixed_count(key: jax.Array, batch: Batch, mask_id: int, rows_B: jax.Array, num_rows: int) -> Corrupted:
    """Masks a uniformly drawn COUNT l in {1 … n} of each row's n maskable tokens, without replacement (LLaDA, eq. 6).

    n/l · Σ CE of a row is an unbiased estimate of the same bound, with less variance and without eps:
    `p_BL` is l/n, so that the same loss applies. A row without a maskable token is unchanged.

    The rows are some of `num_rows`, in any batches: `rows_B` holds their numbers, int32. A row's masks depend on (key,
    number, num_rows) alone. Counts are stratified over all `num_rows` rows.
    """
    time_key, mask_key = jax.random.split(key)
    n_B = jnp.sum(batch.maskable_BL, axis=1)
    times_B = stratified_times(time_key, num_rows)[rows_B]
    counts_B = jnp.minimum(1 + jnp.floor(times_B * n_B), n_B).astype(jnp.int32)
    noise_BL = jnp.where(batch.maskable_BL, _uniform_rows(mask_key, rows_B, batch.tokens_BL.shape[1]), jnp.inf)
    ranks_BL = jnp.argsort(jnp.argsort(noise_BL, axis=1), axis=1)
    masked_BL = (ranks_BL < counts_B[:, None]) & batch.maskable_BL
    p_BL = jnp.broadcast_to((counts_B / jnp.maximum(n_B, 1))[:, None], batch.tokens_BL.shape)
    return Corrupted(jnp.where(masked_BL, mask_id, batch.tokens_BL), masked_BL, p_BL)
