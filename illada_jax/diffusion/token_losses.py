"""Cross-entropy of the positions that count, without logits of all positions at once.

B is rows, L positions, D model width, V vocabulary, N = B·L positions in chunks.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp


def token_losses(
    head: Callable[[jax.Array], jax.Array], hidden_BLD: jax.Array, targets_BL: jax.Array, weights_BL: jax.Array,
    chunk: int = 0, compact: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weighted sum of the cross-entropies, with at most B·chunk·V logits alive at a time.

    Both passes of the head run chunk by chunk in one sweep, because the weights are known beforehand: the result is
    exact for every draw of masks and nothing is computed twice. Only the first result is differentiable.

    Args:
      head: hidden [..., D] to float32 logits [..., V].
      hidden_BLD: final hidden states.
      targets_BL: int32 original tokens.
      weights_BL: float32 factor of each position's cross-entropy in the loss; 0 where it does not count.
      chunk: positions of a row per chunk; divides L; 0 takes all at once.
      compact: gather the positions of weight ≠ 0 first and skip chunks without any. Worthwhile where the head is a
        large part of a small model, on one device: over a mesh it would move tokens between devices.

    Returns:
      (loss: Σ weight · CE, float32; ce_BL float32 in nats; correct_BL bool: the argmax is the target). Where the weight
      is 0, ce_BL and correct_BL are 0 if the position was skipped.
    """
    chex.assert_rank([hidden_BLD, targets_BL, weights_BL], [3, 2, 2])
    chex.assert_equal_shape_prefix([hidden_BLD, targets_BL, weights_BL], 2)
    batch_size, length = targets_BL.shape
    chunk = chunk or length
    if compact:
        order_N = jnp.argsort(weights_BL.reshape(-1) == 0, stable=True)
        shape = (length // chunk, batch_size * chunk)
        num_chunks = -(-jnp.sum(weights_BL != 0) // shape[1])

        def to_chunks(x: jax.Array) -> jax.Array:
            return x.reshape(-1, *x.shape[2:])[order_N].reshape(*shape, *x.shape[2:])

        def from_chunks(x: jax.Array) -> jax.Array:
            return jnp.zeros_like(x).reshape(-1).at[order_N].set(x.reshape(-1))
    else:
        num_chunks = length // chunk

        def to_chunks(x: jax.Array) -> jax.Array:
            return jnp.moveaxis(x.reshape(batch_size, num_chunks, chunk, *x.shape[2:]), 1, 0)

        def from_chunks(x: jax.Array) -> jax.Array:
            return jnp.moveaxis(x, 0, 1)

    arrays = (to_chunks(jnp.asarray(x)) for x in (hidden_BLD, targets_BL, weights_BL))
    chunks = _Chunks(*arrays, jnp.asarray(num_chunks))
    pure_head, head_params = jax.closure_convert(head, chunks.hidden[0])
    loss, ce, correct = _chunked_losses(pure_head, head_params, chunks)
    return loss, from_chunks(ce).reshape(targets_BL.shape), from_chunks(correct).reshape(targets_BL.shape)


class _Chunks(NamedTuple):
    """Positions in chunks, [number of chunks, …]; only the first `num_chunks` (traced) are computed."""

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
    return jnp.sum(weights * ce), (ce, _gather(logits, targets) >= jnp.max(logits, axis=-1))


@jax.custom_vjp
def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] of logits [..., V] and int32 targets [...]: float32 [...] in nats.

    Its backward pass, softmax - onehot in one sweep, is written out because autodiff scatters the targets into a second
    array of the size of the logits.
    """
    return jax.nn.logsumexp(logits, axis=-1) - _gather(logits, targets)


def _cross_entropy_forward(logits: jax.Array, targets: jax.Array):
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    return normaliser - _gather(logits, targets), (logits, normaliser, targets)


def _cross_entropy_backward(saved: tuple[jax.Array, jax.Array, jax.Array], g: jax.Array):
    logits, normaliser, targets = saved
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]
    return g[..., None] * (jnp.exp(logits - normaliser[..., None]) - is_target), None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _gather(x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, index[..., None], axis=-1)[..., 0]
