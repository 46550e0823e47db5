"""The objective: a weighted cross-entropy on masked tokens that bounds -log p(x) (iLLaDA paper, objective).

B is rows, L positions, D model width, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from illada_jax.data.batch import Batch
from illada_jax.diffusion.process import Corrupted

NUM_BUCKETS = 10

HeadFn = Callable[[jax.Array], jax.Array]


class LossSums(NamedTuple):
    """Sums over a batch, float32 scalars (and [K] by masking probability): add them up, divide once.

    Attributes:
      loss: Σ over masked of weight · CE / p, in nats.
      weight: Σ over maskable of weight; loss / weight is the bound per token.
      masked: number of masked tokens.
      maskable: number of maskable tokens.
      correct: number of masked tokens that the argmax predicts.
      masked_K, ce_K, correct_K: the number of masked tokens, the sum of their unweighted cross-entropies in nats and
        the number predicted, by masking probability: the k-th of NUM_BUCKETS equal parts of (0, 1].
    """

    loss: jax.Array
    weight: jax.Array
    masked: jax.Array
    maskable: jax.Array
    correct: jax.Array
    masked_K: jax.Array
    ce_K: jax.Array
    correct_K: jax.Array


def token_losses(
    head: HeadFn, hidden_BLD: jax.Array, targets_BL: jax.Array, weights_BL: jax.Array, chunk: int = 0,
    compact: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cross-entropy of the positions that count, with at most B·chunk·V logits alive at a time.

    Forward and backward of the head are done chunk by chunk in one go, as the weights are known: exact for every draw,
    and nothing is computed twice. Only the first result is differentiable.

    Args:
      head: hidden [..., D] to float32 logits [..., V].
      hidden_BLD: final hidden states.
      targets_BL: int32 original tokens.
      weights_BL: float32 factor of each position's cross-entropy in the loss; 0 where it does not count.
      chunk: positions of a row per chunk, dividing L; 0 takes all at once.
      compact: gathers the positions of weight ≠ 0 first and leaves out the chunks that have none. It pays where the
        head is a large part of a small model, on one device: over a mesh it would move tokens between devices.

    Returns:
      (loss: Σ weight · CE, float32; ce_BL float32 in nats; correct_BL bool: the argmax is the target). Where the weight
      is 0, ce_BL and correct_BL are 0 if the position was left out.
    """
    batch_size, length = targets_BL.shape
    chunk = chunk or length
    if compact:
        order_N = jnp.argsort(weights_BL.reshape(-1) == 0, stable=True)
        rows = (length // chunk, batch_size * chunk)
        num_chunks = -(-jnp.sum(weights_BL != 0) // rows[1])
        to_chunks = lambda x: x.reshape(-1, *x.shape[2:])[order_N].reshape(*rows, *x.shape[2:])  # noqa: E731
        from_chunks = lambda x: jnp.zeros_like(x).reshape(-1).at[order_N].set(x.reshape(-1))  # noqa: E731
    else:
        num_chunks = length // chunk
        to_chunks = lambda x: jnp.moveaxis(  # noqa: E731
            x.reshape(batch_size, num_chunks, chunk, *x.shape[2:]), 1, 0)
        from_chunks = lambda x: jnp.moveaxis(x, 0, 1)  # noqa: E731
    arrays = (to_chunks(jnp.asarray(x)) for x in (hidden_BLD, targets_BL, weights_BL))
    chunks = _Chunks(*arrays, jnp.asarray(num_chunks))
    pure_head, head_params = jax.closure_convert(head, chunks.hidden[0])
    loss, ce, correct = _chunked_losses(pure_head, head_params, chunks)
    return loss, from_chunks(ce).reshape(targets_BL.shape), from_chunks(correct).reshape(targets_BL.shape)


class _Chunks(NamedTuple):
    """Positions cut into chunks, [n, …]; only the first `num_chunks` (traced) are computed."""

    hidden: jax.Array
    targets: jax.Array
    weights: jax.Array
    num_chunks: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_losses(head, head_params: list[jax.Array], chunks: _Chunks) -> tuple[jax.Array, jax.Array, jax.Array]:
    def one_chunk(i, total):
        loss, ce, correct = total
        loss_i, (ce_i, correct_i) = _chunk_loss(head, chunks.hidden[i], head_params, chunks.targets[i],
                                                chunks.weights[i])
        return loss + loss_i, ce.at[i].set(ce_i), correct.at[i].set(correct_i)

    return jax.lax.fori_loop(0, chunks.num_chunks, one_chunk, _no_losses(chunks))


def _chunked_losses_forward(head, head_params: list[jax.Array], chunks: _Chunks):
    def one_chunk(i, total):
        (loss, ce, correct), d_hidden, d_params = total
        (loss_i, (ce_i, correct_i)), (d_hidden_i, d_params_i) = jax.value_and_grad(
            _chunk_loss, argnums=(1, 2), has_aux=True)(head, chunks.hidden[i], head_params, chunks.targets[i],
                                                       chunks.weights[i])
        losses = loss + loss_i, ce.at[i].set(ce_i), correct.at[i].set(correct_i)
        return losses, d_hidden.at[i].set(d_hidden_i), jax.tree.map(jnp.add, d_params, d_params_i)

    zeros = jax.tree.map(jnp.zeros_like, (chunks.hidden, head_params))
    losses, *gradients = jax.lax.fori_loop(0, chunks.num_chunks, one_chunk, (_no_losses(chunks), *zeros))
    return losses, gradients


def _chunked_losses_backward(head, gradients, cotangents):
    del head
    scale = cotangents[0]
    d_hidden, d_params = jax.tree.map(lambda x: (scale * x.astype(jnp.float32)).astype(x.dtype), gradients)
    return d_params, _Chunks(d_hidden, None, jnp.zeros(d_hidden.shape[:-1], jnp.float32), None)


_chunked_losses.defvjp(_chunked_losses_forward, _chunked_losses_backward)


def _no_losses(chunks: _Chunks) -> tuple[jax.Array, jax.Array, jax.Array]:
    return jnp.zeros(()), jnp.zeros(chunks.targets.shape), jnp.zeros(chunks.targets.shape, bool)


def _chunk_loss(head, hidden: jax.Array, head_params: list[jax.Array], targets: jax.Array, weights: jax.Array):
    """(Σ weight · CE, (CE, correct)) of one chunk."""
    logits = head(hidden, *head_params)
    ce = cross_entropy(logits, targets)
    return jnp.sum(weights * ce), (ce, _take(logits, targets) >= jnp.max(logits, axis=-1))


@jax.custom_vjp
def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] of logits [..., V] and int32 targets [...]: float32 [...] in nats.

    Its backward pass is written out, softmax - onehot in one sweep: autodiff scatters the targets into a second array
    of the size of the logits.
    """
    return jax.nn.logsumexp(logits, axis=-1) - _take(logits, targets)


def _cross_entropy_forward(logits: jax.Array, targets: jax.Array):
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    return normaliser - _take(logits, targets), (logits, normaliser, targets)


def _cross_entropy_backward(saved: tuple[jax.Array, jax.Array, jax.Array], g: jax.Array):
    logits, normaliser, targets = saved
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]
    return g[..., None] * (jnp.exp(logits - normaliser[..., None]) - is_target), None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, index[..., None], axis=-1)[..., 0]


def loss_weights(batch: Batch, corrupted: Corrupted) -> jax.Array:
    """What the cross-entropy of each position is multiplied with: weight / p where masked, else 0. float32 [B, L]."""
    # p may be 0 where nothing is masked.
    p_BL = jnp.where(corrupted.masked_BL, corrupted.p_BL, 1.0)
    return jnp.where(corrupted.masked_BL, batch.weights_BL / p_BL, 0.0)


def total_weight(batch: Batch) -> jax.Array:
    """Σ over maskable of weight, float32.

    Rows first, then over the rows: as one long float32 sum it would be off by more than what any part contributes, and
    the compiler makes one of two that follow each other.
    """
    weight_B = jnp.sum(jnp.where(batch.maskable_BL, batch.weights_BL, 0.0), axis=1)
    return jnp.sum(jax.lax.optimization_barrier(weight_B))


def loss_sums(
    loss: jax.Array, ce_BL: jax.Array, correct_BL: jax.Array, batch: Batch, corrupted: Corrupted
) -> LossSums:
    """The sums of the objective, see LossSums, from what `token_losses` returns."""
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
