"""Which parameter lies where: a table, and what is on every device although it is large."""

import math
from typing import Any

import jax
from jax.sharding import PartitionSpec


def sharding_report(params: Any, axes: Any, threshold: int = 2**20) -> str:
    """A line per parameter: name, shape, logical axes, mesh axes, bytes on one device; then what is replicated.

    Args:
      params: arrays or ShapeDtypeStructs with a NamedSharding.
      axes: logical axis names of each (`model.param_axes`).
      threshold: bytes from which a parameter that is on every device is named.
    """
    names = {jax.tree_util.keystr(path): spec for path, spec in
             jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda x: isinstance(x, PartitionSpec))}
    rows, replicated = [("parameter", "shape", "logical axes", "mesh axes", "bytes per device")], []
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        size = math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        on = [f"{axis}→{x.sharding.spec[i]}" for i, axis in enumerate(names[jax.tree_util.keystr(path)])
              if i < len(x.sharding.spec) and x.sharding.spec[i]]
        logical = ", ".join(str(axis) for axis in names[jax.tree_util.keystr(path)])
        rows.append((name, "×".join(map(str, x.shape)), logical, ", ".join(on) or "-", f"{size:,}"))
        if x.sharding.is_fully_replicated and x.sharding.num_devices > 1 and size >= threshold:
            replicated.append(f"{name} ({size:,} bytes)")
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    on_every = ", ".join(replicated) or f"nothing of {threshold:,} bytes or more"
    return "\n".join([*lines, f"on every device: {on_every}"])
