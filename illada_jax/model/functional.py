"""The transformer as pure functions of its params: the interface of the package."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from illada_jax.config import ModelConfig
from illada_jax.model.transformer import Transformer

Params = Any  # a tree of arrays


def _initialise(config: ModelConfig, key: jax.Array) -> Any:
    # One token initialises the model: shapes of params do not depend on the tokens.
    one_BL = jnp.ones((1, 1), jnp.int32)
    return Transformer(config).init(key, one_BL, one_BL, one_BL, method=Transformer.hidden)["params"]


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Random float32 params by iLLaDA's public initialisation. `key` is a typed key; config.vocab_size must be set."""
    return nn.unbox(_initialise(config, key))


@functools.lru_cache(maxsize=16)  # tracing the initialisation takes a second
def abstract_params(config: ModelConfig) -> Params:
    """The params as ShapeDtypeStructs, float32, without shardings; nothing is allocated."""
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)


@functools.lru_cache(maxsize=16)
def param_axes(config: ModelConfig) -> Any:
    """Logical axis names, one PartitionSpec per param; nothing is computed."""
    return nn.get_partition_spec(jax.eval_shape(lambda: _initialise(config, jax.random.key(0))))


def num_params(config: ModelConfig) -> int:
    """Number of parameters; nothing is allocated."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))


def hidden(config: ModelConfig, params: Params, tokens_BT: jax.Array, positions_BT: jax.Array,
           segments_BT: jax.Array) -> jax.Array:
    """Final hidden states hidden_BTD, see `Transformer.hidden`."""
    return Transformer(config).apply({"params": params}, tokens_BT, positions_BT, segments_BT,
                                     method=Transformer.hidden)


def head(config: ModelConfig, params: Params, hidden_BQD: jax.Array) -> jax.Array:
    """Logits of hidden states, float32 [B, Q, V], see `Transformer.head`."""
    return Transformer(config).apply({"params": params}, hidden_BQD, method=Transformer.head)


@functools.cache
def _logits_function(config: ModelConfig) -> Callable[..., Any]:
    """One function object per config: jit recognises it and compiles once for all params."""

    def logits(params, *inputs):
        hidden_BQD, cache = Transformer(config).apply({"params": params}, *inputs, method=Transformer.at_columns)
        return head(config, params, hidden_BQD), cache

    return logits


def make_logits_fn(config: ModelConfig, params: Params) -> jax.tree_util.Partial:
    """The network as decoding and scoring call it, see `decoding.query.LogitsFn`.

    Returns:
      `logits_fn(tokens_BT, positions_BT, segments_BT, query_columns_BQ, cache) -> (logits_BQV, cache)`: float32 logits
      of the queried columns. A pytree that carries the params: pass it to jitted functions as an argument.
    """
    return jax.tree_util.Partial(_logits_function(config), params)
