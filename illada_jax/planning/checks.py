"""What must not be in the memory of a device: whole logits, or a parameter of the layers that every device holds."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from illada_jax.config import Config
from illada_jax.planning.hlo import CHOSEN, ITEM_BYTES, Module


def whole_logits(module: Module, config: Config, rows: int, vocab_shards: int) -> list[str]:
    """Buffers that hold logits of `rows` whole rows (one micro-batch, one device), as text; [] is as it must be."""
    vocab = config.model.vocab_size // vocab_shards
    positions = rows * config.data.length
    return [f"{i.name}: {shape.dtype}{list(shape.dims)}" for _, i, shape in module.buffers()
            if vocab in shape.dims and math.prod(shape.dims) >= vocab * positions and positions > 1
            and config.model.d_model * vocab != math.prod(shape.dims)]


def replicated_params(module: Module, params: Any) -> list[str]:
    """Buffers that hold a whole stack of layers' parameters, or its gradient, although it lies over several devices.

    An activation may have as many elements, or the very shape. So what counts is where a buffer comes from: copies of
    parameters come from parameters alone; gradients (and sums of them) are told by the stack's own shape and type.

    Args:
      module: the program, some of whose parameters are `params`.
      params: the params as ShapeDtypeStructs with their shardings.

    Returns:
      A line for each; [] is as it must be.
    """
    spread = {jax.tree_util.keystr(path, simple=True, separator="/"): (x, x.sharding.shard_shape(x.shape))
              for path, x in jax.tree_util.tree_leaves_with_path(params) if x.ndim > 2}
    spread = {name: (x, part) for name, (x, part) in spread.items() if part != x.shape}
    stacked = {tuple(sorted(x.shape)): name for name, (x, _) in spread.items()}
    itself = {x.shape: jnp.dtype(x.dtype).itemsize for x, _ in spread.values()}
    parts = {part for _, part in spread.values()}
    origins = module.origins(lambda i: i.shapes[0].dims in parts)
    found = []
    for computation, instruction, shape in module.buffers():
        dims = tuple(dim for dim in shape.dims if dim > 1)
        name = stacked.get(tuple(sorted(dims)))
        if name and (origins.get((computation, instruction.name)) == CHOSEN
                     or ITEM_BYTES.get(shape.dtype) == itself.get(dims)):
            found.append(f"{instruction.name}: {shape.dtype}{list(shape.dims)}, the whole of {name}")
    return found
