"""Small networks for the tests of decoding, as jax functions and as networks for the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from illada_jax import model
from illada_jax.config import ModelConfig
from illada_jax.decoding import SpecialIds, plain_logits_fn
from illada_jax.model.cache import KeysValues
from tests.util import random_params

IDS = SpecialIds(mask=0, eos=1, bos=2, pad=3, vocab_size=11)
NETWORK_SIZE = 12  # one id more than the tokenizer has


def table(seed: int = 0, length: int = 96, scale: float = 2.0, eos_bias: float = 0.0):
    """Logits of column c: a table row, plus a row for the token at column c - 1. Padding has no influence."""
    rng = np.random.default_rng(seed)
    by_token_VV = rng.normal(size=(NETWORK_SIZE, NETWORK_SIZE)) * scale / 2
    by_column_LV = rng.normal(size=(length, NETWORK_SIZE)) * scale
    by_column_LV[:, IDS.eos] += eos_bias
    return from_tables(by_token_VV, by_column_LV)


def from_tables(by_token_VV, by_column_LV):
    """(LogitsFn, network of the oracle) of `by_column_LV[c] + by_token_VV[token at c - 1]`."""
    by_token_VV, by_column_LV = np.float32(by_token_VV), np.float32(by_column_LV)

    def network(canvas):
        logits_LV = by_column_LV[: len(canvas)].copy()
        logits_LV[1:] += by_token_VV[canvas[:-1]]
        return logits_LV

    return plain_logits_fn(jax.tree_util.Partial(_table, by_token_VV, by_column_LV)), network


def _table(by_token_VV, by_column_LV, tokens_BL):
    left_BLV = jnp.pad(by_token_VV[tokens_BL][:, :-1], ((0, 0), (1, 0), (0, 0)))
    return left_BLV + by_column_LV[None, : tokens_BL.shape[1]]


TRANSFORMER = ModelConfig(vocab_size=NETWORK_SIZE, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
                          d_ff=32, max_length=96)


def transformer(seed: int = 0, config: ModelConfig = TRANSFORMER):
    """(LogitsFn, network of the oracle) of a random transformer with weights large enough to make it matter."""
    params = random_params(config, seed=seed)
    return model.make_logits_fn(config, params), network_of(config, params)


def network_of(config: ModelConfig, params):
    """A transformer behind the interface that the oracle calls."""
    forward = _forward(config)

    def network(canvas):
        # One padded length for all: the oracle would compile for every length otherwise.
        tokens_L = np.zeros(config.max_length, np.int32)
        tokens_L[: len(canvas)] = canvas
        segments_L = (np.arange(config.max_length) < len(canvas)).astype(np.int32)
        return np.asarray(forward(params, tokens_L[None], segments_L[None]))[0, : len(canvas)]

    return network


@functools.cache
def _forward(config):
    return jax.jit(functools.partial(_whole, config))


def _whole(config, params, tokens_BL, segments_BL):
    positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
    return model.head(config, params, model.hidden(config, params, tokens_BL, positions_BL, segments_BL))


def causal(seed: int = 0, layers: int = 2, width: int = 8, length: int = 96):
    """(LogitsFn, init_cache) of a network whose columns attend to themselves and to columns on their left."""
    rng = np.random.default_rng(seed)
    config = ModelConfig(vocab_size=NETWORK_SIZE, d_model=width, num_layers=layers, num_heads=1, num_kv_heads=1)
    weights = {"embedding": rng.normal(size=(NETWORK_SIZE, width)), "position": rng.normal(size=(length + 1, width)),
               "qkv": rng.normal(size=(layers, 3, width, width)), "head": rng.normal(size=(width, NETWORK_SIZE))}
    return jax.tree_util.Partial(_causal, jax.tree.map(jnp.float32, weights)), model.make_init_cache(config)


def _causal(weights, tokens_BT, positions_BT, segments_BT, query_columns_BQ, cache):
    x_BTD = weights["embedding"][tokens_BT] + weights["position"][positions_BT]
    kept = []
    for layer, qkv in enumerate(weights["qkv"]):
        q_BTD, k_BSD, v_BSD = (x_BTD @ w for w in qkv)
        new = KeysValues(k_BSD[:, :, None], v_BSD[:, :, None], segments_BT)
        columns_BS, segments_BS = positions_BT, segments_BT
        if cache is not None and not cache.writes:
            old = cache.read(layer, cache.segments_without(positions_BT))
            k_BSD, v_BSD, segments_BS = (jnp.concatenate([x.reshape(*x.shape[:2], *y.shape[2:]), y], axis=1)
                                         for x, y in zip(old, (k_BSD, v_BSD, segments_BT), strict=True))
            canvas_BS = jnp.broadcast_to(jnp.arange(old.segments_BS.shape[1]), old.segments_BS.shape)
            columns_BS = jnp.concatenate([canvas_BS, positions_BT], axis=1)
        seen_BTS = (segments_BS[:, None] == segments_BT[:, :, None]) & (columns_BS[:, None] <= positions_BT[:, :, None])
        scores_BTS = jnp.where(seen_BTS, q_BTD @ k_BSD.swapaxes(1, 2), -1e9)
        x_BTD = x_BTD + jax.nn.softmax(scores_BTS) @ v_BSD
        x_BTD /= 1e-6 + jnp.sqrt(jnp.mean(x_BTD**2, axis=-1, keepdims=True))
        kept.append(new)
    if cache is not None and (cache.writes or cache.appends):
        stacks = (jnp.stack(x) for x in zip(*(new[:2] for new in kept), strict=True))
        cache = cache.append(*stacks, segments_BT, positions_BT).replace(writes=False)
    x_BQD = jnp.take_along_axis(x_BTD, query_columns_BQ[:, :, None], axis=1)
    return x_BQD @ weights["head"], cache
