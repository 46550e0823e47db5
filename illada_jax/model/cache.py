"""Keys and values of a canvas, kept between steps of decoding."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from illada_jax.config import ModelConfig


class Cache(NamedTuple):
    """What attention saw of every canvas column when the canvas was last computed as a whole.

    Attributes:
      keys_YBSKH: keys, rotated, in the compute dtype; Y is layers.
      values_YBSKH: values.
      segments_BS: int32 segments; 0 is padding.
    """

    keys_YBSKH: jax.Array
    values_YBSKH: jax.Array
    segments_BS: jax.Array

    def without(self, columns_BT: jax.Array) -> "Cache":
        """The cache with these columns hidden from attention; columns beyond the canvas are ignored."""
        rows_B1 = jnp.arange(len(columns_BT))[:, None]
        return self._replace(segments_BS=self.segments_BS.at[rows_B1, columns_BT].set(-1, mode="drop"))


@functools.cache
def make_init_cache(config: ModelConfig) -> Callable[[int, int], Cache]:
    """`(rows, canvas length) -> empty cache`: one function object per config, for it is static under jit."""

    def init_cache(batch: int, length: int) -> Cache:
        shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
        empty_YBSKH = jnp.zeros(shape, config.dtype)
        return Cache(empty_YBSKH, empty_YBSKH, jnp.zeros((batch, length), jnp.int32))

    return init_cache
