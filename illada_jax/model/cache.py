"""Keys and values of a canvas, cached between evaluations."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from illada_jax.config import ModelConfig


class KeysValues(NamedTuple):
    """Rotated keys and values of one layer, and their int32 segments; no token attends to segment -1."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array
    segments_BS: jax.Array


@struct.dataclass
class Cache:
    """Keys, values and segments of every canvas column as of the last pass that wrote them.

    Attributes:
      keys_YBSKH, values_YBSKH: rotated keys, and values, in the compute dtype; Y is layers.
      segments_BS: int32 segments; 0 is padding, or a column without keys and values.
      writes: static under jit. True: the next pass is over the whole canvas, attends to it alone, and replaces keys,
        values and segments. False: the next pass is over a slice of the canvas, which attends to itself and to the
        cached columns outside.
      appends: static. True: a pass over a slice also writes keys, values and segments of its columns.

    A pass returns the cache with both False: it stays as it is until it is told to change.
    """

    keys_YBSKH: jax.Array
    values_YBSKH: jax.Array
    segments_BS: jax.Array
    writes: bool = struct.field(pytree_node=False, default=False)
    appends: bool = struct.field(pytree_node=False, default=False)

    @property
    def lengths_B(self) -> jax.Array:
        """The number of columns that each row holds, int32 [B]; they are the first ones."""
        return jnp.sum(self.segments_BS > 0, axis=1, dtype=jnp.int32)

    def segments_without(self, columns_BT: jax.Array) -> jax.Array:
        """Segments [B, S] with -1 in the given columns; columns beyond the canvas are ignored."""
        rows_B1 = jnp.arange(len(columns_BT))[:, None]
        return self.segments_BS.at[rows_B1, columns_BT].set(-1, mode="drop")

    def read(self, index: jax.Array, segments_BS: jax.Array) -> KeysValues:
        """Keys and values of a layer, with the given segments."""
        stacks = self.keys_YBSKH, self.values_YBSKH
        return KeysValues(*(jax.lax.dynamic_index_in_dim(x, index, keepdims=False) for x in stacks), segments_BS)

    def write(self, index: jax.Array, new_kv: KeysValues) -> "Cache":
        """The cache with all columns of a layer replaced; in place under jit, never twice in memory."""
        return self.replace(
            keys_YBSKH=jax.lax.dynamic_update_index_in_dim(self.keys_YBSKH, new_kv.k_BSKH, index, 0),
            values_YBSKH=jax.lax.dynamic_update_index_in_dim(self.values_YBSKH, new_kv.v_BSKH, index, 0))

    def append(self, keys_YBTKH: jax.Array, values_YBTKH: jax.Array, segments_BT: jax.Array,
               columns_BT: jax.Array) -> "Cache":
        """The cache with the given columns replaced in all layers; columns beyond the canvas are ignored."""
        rows_B1 = jnp.arange(len(columns_BT))[:, None]
        return self.replace(
            keys_YBSKH=self.keys_YBSKH.at[:, rows_B1, columns_BT].set(keys_YBTKH, mode="drop"),
            values_YBSKH=self.values_YBSKH.at[:, rows_B1, columns_BT].set(values_YBTKH, mode="drop"),
            segments_BS=self.segments_BS.at[rows_B1, columns_BT].set(segments_BT, mode="drop"), appends=False)


@functools.cache
def make_init_cache(config: ModelConfig) -> Callable[[int, int], Cache]:
    """`(rows, canvas length) -> empty cache`; one function object per config, as it is static under jit."""

    def init_cache(rows: int, length: int) -> Cache:
        shape = (config.num_layers, rows, length, config.num_kv_heads, config.head_dim)
        # Two arrays: a program that updates both in place must own both.
        keys_YBSKH, values_YBSKH = jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)
        return Cache(keys_YBSKH, values_YBSKH, jnp.zeros((rows, length), jnp.int32))

    return init_cache
