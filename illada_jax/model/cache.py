"""Keys and values of a canvas, cached between decoding steps."""

import enum
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from illada_jax.config import ModelConfig

KeysValues = tuple[jax.Array, jax.Array]


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
        """Segments [B, S] with -1, which no token attends to, in these columns; ignores columns beyond the canvas."""
        rows_B1 = jnp.arange(len(columns_BT))[:, None]
        return self.segments_BS.at[rows_B1, columns_BT].set(-1, mode="drop")

    def layer(self, index: jax.Array) -> KeysValues:
        """Keys and values [B, S, K, H] of one layer."""
        return (jax.lax.dynamic_index_in_dim(self.keys_YBSKH, index, keepdims=False),
                jax.lax.dynamic_index_in_dim(self.values_YBSKH, index, keepdims=False))

    def with_layer(self, index: jax.Array, new_kv: KeysValues) -> "Cache":
        """The cache with all columns of one layer replaced; in place under jit, never twice in memory."""
        new_k_BSKH, new_v_BSKH = new_kv
        return self.replace(
            keys_YBSKH=jax.lax.dynamic_update_index_in_dim(self.keys_YBSKH, new_k_BSKH, index, 0),
            values_YBSKH=jax.lax.dynamic_update_index_in_dim(self.values_YBSKH, new_v_BSKH, index, 0))


@functools.cache
def make_init_cache(config: ModelConfig) -> Callable[[int, int], Cache]:
    """`(rows, canvas length) -> empty cache`; one function object per config, as it is static under jit."""

    def init_cache(rows: int, length: int) -> Cache:
        shape = (config.num_layers, rows, length, config.num_kv_heads, config.head_dim)
        empty_YBSKH = jnp.zeros(shape, config.dtype)
        return Cache(empty_YBSKH, empty_YBSKH, jnp.zeros((rows, length), jnp.int32))

    return init_cache
