"""One table from logical axis names to mesh axes, and shardings of whole trees made from it."""

from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Params: `embed` is spread for memory (FSDP), heads, feed-forward and vocabulary for compute (tensor parallelism).
# Activations carry names of their own: rows are spread over both data axes, widths over `tensor`.
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
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays [B, …]: rows over both data axes."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def param_shardings(mesh: Mesh, axes: Any) -> Any:
    """A NamedSharding for every param, from its logical axis names (`model.param_axes`)."""
    return nn.logical_to_mesh_sharding(axes, mesh, list(RULES.items()))


def like_params(mesh: Mesh, tree: Any, shardings: Any) -> Any:
    """Shardings for a tree that holds copies of the params, such as optimizer state.

    A leaf whose path ends in the path of a param lies as that param does; every other leaf is replicated.

    Args:
      mesh: the mesh.
      tree: arrays or ShapeDtypeStructs.
      shardings: a NamedSharding for every param.
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


def _names(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
