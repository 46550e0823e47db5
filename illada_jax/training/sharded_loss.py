"""Token losses over a mesh: each device computes the logits of its own rows, chunk by chunk; no activations move.

Left to the partitioner, every chunk would gather the head's weights and all-reduce their gradient: 16 times the traffic
at 8,192 tokens. Here the weights are gathered once before the chunks and the gradient is scattered once after them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from illada_jax import model
from illada_jax.config import Config
from illada_jax.diffusion.token_losses import token_losses
from illada_jax.parallel.sharding import RULES

ROWS = PartitionSpec(RULES["batch"])


def sharded_token_losses(
    config: Config, mesh: Mesh, params: Any, hidden_BLD: jax.Array, targets_BL: jax.Array, weights_BL: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`token_losses`, with its arguments and results, of a batch whose rows are sharded over `data` and `fsdp`.

    Each device skips positions of weight 0. The sharding of the vocabulary (`tensor`) is unchanged.
    """
    name, spec = ("embedding", (None, RULES["embed"])) if config.model.tied_head else ("head", (RULES["embed"], None))

    def local_losses(weights, hidden_BLD, targets_BL, weights_BL):
        whole = _gather(weights, spec.index(RULES["embed"]), config.model.dtype)
        head = functools.partial(model.head, config.model, {**params, name: whole})
        loss, *by_position = token_losses(
            head, hidden_BLD, targets_BL, weights_BL, config.train.logits_chunk, compact=True)
        return loss[None], *by_position

    # The head's gradient, float32 and whole until it is scattered, must be freed before the layers' backward pass, and
    # the gathered weights must not exist during their forward pass: without the barrier the compiler moves both. It is
    # free, because the collectives run inside loops or on their own.
    hidden_BLD, weights = jax.lax.optimization_barrier((hidden_BLD, params[name]))
    losses, ce_BL, correct_BL = jax.shard_map(
        local_losses, mesh=mesh, axis_names=set(RULES["batch"]), in_specs=(PartitionSpec(*spec), ROWS, ROWS, ROWS),
        out_specs=(ROWS, ROWS, ROWS), check_vma=False,
    )(weights, hidden_BLD, targets_BL, weights_BL)
    return jnp.sum(losses), ce_BL, correct_BL


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: jax.Array, axis: int, dtype: str) -> jax.Array:
    """All-gathers x in the compute dtype; its gradient is summed in float32."""
    return jax.lax.all_gather(x.astype(dtype), RULES["embed"], axis=axis, tiled=True).astype(x.dtype)


def _gather_forward(x: jax.Array, axis: int, dtype: str):
    return _gather(x, axis, dtype), None


def _gather_backward(axis: int, dtype: str, _: None, gradient: jax.Array):
    del dtype
    # Over the other axes, where x is replicated, shard_map sums gradients by itself. Piece by piece, because the sum
    # may need a separate buffer before it is scattered.
    vocab = gradient.shape[1 - axis]
    size = vocab // next(count for count in (8, 4, 2, 1) if vocab % count == 0)

    def scatter(start: jax.Array) -> jax.Array:
        piece = jax.lax.dynamic_slice_in_dim(gradient, start, size, axis=1 - axis)
        return jax.lax.psum_scatter(piece, RULES["embed"], scatter_dimension=axis, tiled=True)

    pieces = jax.lax.map(scatter, jnp.arange(0, vocab, size))
    return (jnp.concatenate(pieces, axis=1 - axis),)


_gather.defvjp(_gather_forward, _gather_backward)
