"""One table from logical axis names to mesh axes, and the shardings of whole trees that follow from it."""

import math
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Params: `embed` is sharded for memory (FSDP); heads, feed-forward and vocabulary for compute (tensor parallelism).
# Activations have their own names: rows are sharded over both data axes, widths over `tensor`.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "layers": None,
    "norm": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "batch": ("data", "fsdp"),
    "length": None,
    "embed_act": None,
    "heads_act": "tensor",
    "mlp_act": "tensor",
}


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays of which every device holds a full copy."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays [B, …]: rows over both data axes."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def param_shardings(mesh: Mesh, axes: Any) -> Any:
    """A NamedSharding for every param, from its logical axis names (`model.param_axes`)."""
    return nn.logical_to_mesh_sharding(axes, mesh, list(RULES.items()))


def like_params(mesh: Mesh, tree: Any, shardings: Any) -> Any:
    """Shardings for a tree that holds copies of the params, such as optimizer state, from those of the params.

    A leaf whose path ends in the path of a param has the sharding of that param; every other leaf is replicated.
    """
    by_path = {_names(path): sharding for path, sharding in jax.tree_util.tree_leaves_with_path(shardings)}

    def find(path: Any, leaf: Any) -> NamedSharding:
        names = _names(path)
        for start in range(len(names)):
            sharding = by_path.get(names[start:])
            if sharding is not None and len(sharding.spec) <= leaf.ndim:
                return sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(find, tree)


def sharding_report(params: Any, axes: Any, threshold: int = 2**20) -> str:
    """A table of the params (name, shape, axes, bytes per device) that ends with the replicated ones.

    Args:
      params: arrays or ShapeDtypeStructs with a NamedSharding.
      axes: logical axis names of each param (`model.param_axes`).
      threshold: size in bytes from which the last line names a replicated param.
    """
    all_axes = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, PartitionSpec))
    rows, replicated_params = [("parameter", "shape", "logical axes", "mesh axes", "bytes per device")], []
    for (path, x), logical in zip(jax.tree_util.tree_leaves_with_path(params), all_axes, strict=True):
        name, size = "/".join(_names(path)), math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        mapped = [f"{axis}→{mesh_axis}" for axis, mesh_axis in zip(logical, x.sharding.spec, strict=False) if mesh_axis]
        rows.append((name, "×".join(map(str, x.shape)), ", ".join(map(str, logical)), ", ".join(mapped) or "-",
                     f"{size:,}"))
        if x.sharding.is_fully_replicated and x.sharding.num_devices > 1 and size >= threshold:
            replicated_params.append(f"{name} ({size:,} bytes)")
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    replicated_text = ", ".join(replicated_params) or f"nothing of {threshold:,} bytes or more"
    return "\n".join([*lines, f"on every device: {replicated_text}"])


def _names(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
