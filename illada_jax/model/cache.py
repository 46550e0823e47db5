"""Keys and values of a canvas, cached between decoding steps."""

import enum
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


class CacheMode(enum.Enum):
    """How a forward pass uses a cache.

    READ: the tokens are a slice of the canvas. They attend to themselves and to the cached columns outside the slice;
      the cache stays as it is.
    WRITE: the tokens are the whole canvas. They attend to themselves; their keys, values and segments become the cache.
    """

    READ = enum.auto()
    WRITE = enum.auto()


@struct.dataclass
class Cache:
    """Keys, values and segments of every canvas column as of the last WRITE.

    Attributes:
      keys_YBSKH: rotated keys in the compute dtype; Y is layers.
      values_YBSKH: values.
      segments_BS: int32 segments; 0 is padding.
      mode: how the next forward pass uses the cache, static under jit. A pass returns it in mode READ.
    """

    keys_YBSKH: jax.Array
    values_YBSKH: jax.Array
    segments_BS: jax.Array
    mode: CacheMode = struct.field(pytree_node=False, default=CacheMode.READ)

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


@functools.cache
def make_init_cache(config: ModelConfig) -> Callable[[int, int], Cache]:
    """`(rows, canvas length) -> empty cache`; one function object per config, as it is static under jit."""

    def init_cache(rows: int, length: int) -> Cache:
        shape = (config.num_layers, rows, length, config.num_kv_heads, config.head_dim)
        empty_YBSKH = jnp.zeros(shape, config.dtype)
        return Cache(empty_YBSKH, empty_YBSKH, jnp.zeros((rows, length), jnp.int32))

    return init_cache
