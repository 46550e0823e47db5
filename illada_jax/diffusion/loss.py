"""The objective: a weighted cross-entropy on masked tokens that bounds -log p(x) (iLLaDA paper, objective).

B is rows, L positions, D model width, V vocabulary, C positions of a chunk.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from illada_jax.data.batch import Batch
from illada_jax.diffusion.process import Corrupted

HeadFn = Callable[[jax.Array], jax.Array]


class LossSums(NamedTuple):
    """Sums over a batch, float32 scalars: add them over micro-batches, divide once.

    Attributes:
      loss: Σ over masked of weight · CE / p, in nats.
      weight: Σ over maskable of weight; loss / weight is the bound per token.
      masked: number of masked tokens.
      maskable: number of maskable tokens.
      correct: number of masked tokens that the argmax predicts.
    """

    loss: jax.Array
    weight: jax.Array
    masked: jax.Array
    maskable: jax.Array
    correct: jax.Array


def token_losses(
    head: HeadFn, hidden_BLD: jax.Array, targets_BL: jax.Array, chunk: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and hit of every position, with at most [B, chunk, V] logits alive at a time.

    Each chunk's logits are computed again in the backward pass instead of being kept: exact, whatever the masks.

    Args:
      head: hidden [B, C, D] to float32 logits [B, C, V].
      hidden_BLD: final hidden states.
      targets_BL: int32 original tokens.
      chunk: positions per chunk, dividing L; 0 takes all at once.

    Returns:
      (ce_BL float32 in nats, correct_BL bool).
    """

    def of_chunk(hidden_BCD: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BCV = head(hidden_BCD)
        top_BC = jnp.max(logits_BCV, axis=-1)
        target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits_BCV, axis=-1) - target_BC, target_BC >= top_BC

    batch_size, length = targets_BL.shape
    if chunk in (0, length):
        return of_chunk(hidden_BLD, targets_BL)
    hidden_nBCD = jnp.moveaxis(hidden_BLD.reshape(batch_size, length // chunk, chunk, -1), 1, 0)
    targets_nBC = jnp.moveaxis(targets_BL.reshape(batch_size, length // chunk, chunk), 1, 0)
    _, (ce_nBC, correct_nBC) = jax.lax.scan(
        lambda _, inputs: (None, jax.checkpoint(of_chunk)(*inputs)), None, (hidden_nBCD, targets_nBC)
    )
    return tuple(jnp.moveaxis(x_nBC, 0, 1).reshape(batch_size, length) for x_nBC in (ce_nBC, correct_nBC))


def row_losses(ce_BL: jax.Array, batch: Batch, corrupted: Corrupted) -> jax.Array:
    """Σ over the masked positions of each row of weight · CE / p: float32 [B], in nats."""
    # p may be 0 where nothing is masked: dividing by it would put a NaN into the gradient.
    p_BL = jnp.where(corrupted.masked_BL, corrupted.p_BL, 1.0)
    return jnp.sum(jnp.where(corrupted.masked_BL, batch.weights_BL * ce_BL / p_BL, 0.0), axis=1)


def loss_sums(ce_BL: jax.Array, correct_BL: jax.Array, batch: Batch, corrupted: Corrupted) -> LossSums:
    """The sums of the objective, see LossSums."""
    return LossSums(
        loss=jnp.sum(row_losses(ce_BL, batch, corrupted)),
        weight=jnp.sum(jnp.where(batch.maskable_BL, batch.weights_BL, 0.0)),
        masked=jnp.sum(corrupted.masked_BL, dtype=jnp.float32),
        maskable=jnp.sum(batch.maskable_BL, dtype=jnp.float32),
        correct=jnp.sum(correct_BL & corrupted.masked_BL, dtype=jnp.float32),
    )
