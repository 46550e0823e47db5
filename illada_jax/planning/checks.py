"""Checks of what a device must never hold: whole logits, or the parameters of all layers unsharded."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from illada_jax.config import Config
from illada_jax.planning.hlo import ITEM_BYTES, Module, Origin


def whole_logits(module: Module, config: Config, rows: int, vocab_shards: int) -> list[str]:
    """Buffers that hold the logits of `rows` whole rows (one micro-batch, one device), as text; should be empty."""
    vocab = config.model.vocab_size // vocab_shards
    positions = rows * config.data.length
    return [f"{i.name}: {shape.dtype}{list(shape.dims)}" for _, i, shape in module.buffers()
            if vocab in shape.dims and math.prod(shape.dims) >= vocab * positions and positions > 1
            and config.model.d_model * vocab != math.prod(shape.dims)]


def replicated_params(module: Module, params: Any) -> list[str]:
    """Buffers that hold the whole stack of a sharded parameter of the layers, or its gradient; should be empty.

    An activation may have the same number of elements, or even the same shape. Therefore origins decide: copies of
    parameters depend on parameters only; gradients (and sums of them) have the stack's own shape and element size.
    `params` are ShapeDtypeStructs with shardings.
    """
    sharded = {jax.tree_util.keystr(path, simple=True, separator="/"): x
               for path, x in jax.tree_util.tree_leaves_with_path(params)
               if x.ndim > 2 and x.sharding.shard_shape(x.shape) != x.shape}
    stacked = {tuple(sorted(x.shape)): name for name, x in sharded.items()}
    item_bytes = {x.shape: jnp.dtype(x.dtype).itemsize for x in sharded.values()}
    shards = {x.sharding.shard_shape(x.shape) for x in sharded.values()}
    origins = module.origins(lambda i: i.shapes[0].dims in shards)
    found = []
    for computation, instruction, shape in module.buffers():
        dims = tuple(dim for dim in shape.dims if dim > 1)
        name = stacked.get(tuple(sorted(dims)))
        if name and (origins.get((computation, instruction.name)) == Origin.CHOSEN
                     or ITEM_BYTES.get(shape.dtype) == item_bytes.get(dims)):
            found.append(f"{instruction.name}: {shape.dtype}{list(shape.dims)}, the whole of {name}")
    return found
