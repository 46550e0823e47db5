"""What must not be in the memory of a device: whole logits, or a parameter of the layers that every device holds."""

import math
from typing import Any

import jax

from illada_jax.config import Config
from illada_jax.planning.hlo import Module


def whole_logits(module: Module, config: Config, rows: int, vocab_shards: int) -> list[str]:
    """Buffers that hold logits of `rows` whole rows (one micro-batch, one device), as text; [] is as it must be."""
    vocab = config.model.vocab_size // vocab_shards
    positions = rows * config.data.length
    return [f"{i.name}: {shape.dtype}{list(shape.dims)}" for i, shape in module.buffers()
            if vocab in shape.dims and math.prod(shape.dims) >= vocab * positions and positions > 1
            and config.model.d_model * vocab != math.prod(shape.dims)]


def replicated_params(module: Module, params: Any) -> list[str]:
    """Buffers of the size of a whole stack of layers' parameters, as text, although it lies over several devices.

    Args:
      module: the program.
      params: the params as ShapeDtypeStructs with their shardings.
    """
    stacked = {tuple(sorted(x.shape)): jax.tree_util.keystr(path, simple=True, separator="/")
               for path, x in jax.tree_util.tree_leaves_with_path(params)
               if x.ndim > 2 and x.sharding.shard_shape(x.shape) != x.shape}
    found = []
    for instruction, shape in module.buffers():
        name = stacked.get(tuple(sorted(dim for dim in shape.dims if dim > 1)))
        if name:
            found.append(f"{instruction.name}: {shape.dtype}{list(shape.dims)}, the whole of {name}")
    return found
