"""Lookup in an embedding table whose width is sharded over devices."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec


def embed(embedding_VD: jax.Array, tokens_BT: jax.Array, dtype: str) -> jax.Array:
    """Rows of the embedding in the compute dtype, [B, T, D].

    Over a mesh every device gathers its columns for all rows of its group, and the group exchanges them: traffic of the
    size of the result. The partitioner may gather the whole table, and its gradient, on every device.
    """
    def gather(table_VD, tokens_BT):
        return jnp.take(table_VD, tokens_BT, axis=0).astype(dtype)

    mesh, rules = jax.sharding.get_abstract_mesh(), dict(nn.get_logical_axis_rules())
    axis, rows = rules.get("embed"), rules.get("batch", ())
    sharded = not mesh.empty and mesh.shape[axis] > 1
    if not sharded or tokens_BT.shape[0] % math.prod(mesh.shape[name] for name in rows):
        return gather(embedding_VD, tokens_BT)

    def local(table_Vd, tokens_bT):
        of_group_BTd = gather(table_Vd, jax.lax.all_gather(tokens_bT, axis, axis=0, tiled=True))
        return jax.lax.all_to_all(of_group_BTd, axis, split_axis=0, concat_axis=2, tiled=True)

    of_rows = PartitionSpec(rows)
    return jax.shard_map(local, axis_names=set(rows), in_specs=(PartitionSpec(None, axis), of_rows), out_specs=of_rows,
                         check_vma=False)(embedding_VD, tokens_BT)
