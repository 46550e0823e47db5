"""Cached keys and values: exact where nothing changed since the refresh, an approximation elsewhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from illada_jax import model
from illada_jax.config import DecodeConfig
from illada_jax.decoding import Decoder
from tests.decoding.toys import IDS, TRANSFORMER, transformer

SETTINGS = DecodeConfig(max_new_tokens=24, block_length=8, steps_per_block=8, batch_size=4)
PROMPTS = [[4, 5], [6] * 20, [7, 8, 9], [10] * 33, [5, 9, 5, 9]]
INIT_CACHE = model.make_init_cache(TRANSFORMER)


def decode(settings, prompts=PROMPTS, infill=False):
    decoder = Decoder(transformer()[0], settings, IDS, TRANSFORMER.max_length, INIT_CACHE)
    return [r.tokens for r in decoder.generate(prompts, infill)]


def test_a_slice_with_a_cache_equals_the_whole_canvas():
    logits_fn, _ = transformer()
    rng = np.random.default_rng(0)
    tokens_BL = jnp.asarray(rng.integers(0, 11, (2, 24)), jnp.int32)
    columns_BL = jnp.broadcast_to(jnp.arange(24), (2, 24))
    segments_BL = (columns_BL < jnp.array([[24], [17]])).astype(jnp.int32)
    call = jax.jit(lambda f, *arguments: f(*arguments))
    empty = INIT_CACHE(2, 24).replace(writes=True)
    whole_BLV, cache = call(logits_fn, tokens_BL, columns_BL, segments_BL, columns_BL, empty)
    assert not cache.writes
    exact_BLV, _ = call(logits_fn, tokens_BL, columns_BL, segments_BL, columns_BL, None)
    np.testing.assert_allclose(whole_BLV, exact_BLV, atol=1e-6)
    # Any columns in any order; the last slot of the second row is unused.
    slice_BT = jnp.array([[5, 3, 20, 0], [16, 2, 9, 24]])
    used_BT = (slice_BT < 24).astype(jnp.int32)
    tokens_BT = jnp.take_along_axis(tokens_BL, slice_BT, axis=1, mode="clip")
    query_columns_BT = jnp.broadcast_to(jnp.arange(4), (2, 4))
    part_BTV, _ = call(logits_fn, tokens_BT, slice_BT, used_BT, query_columns_BT, cache)
    for row, used in ((0, 4), (1, 3)):
        np.testing.assert_allclose(part_BTV[row, :used], whole_BLV[row, slice_BT[row, :used]], atol=2e-5)
    # The cache does matter: with other tokens outside of the slice the logits are others.
    _, other = call(logits_fn, (tokens_BL + 1) % 11, columns_BL, segments_BL, columns_BL, empty)
    assert np.abs(call(logits_fn, tokens_BT, slice_BT, used_BT, query_columns_BT, other)[0] - part_BTV).max() > 0.01


@pytest.mark.parametrize("changes", [
    {"cache": "prefix"}, {"cache": "dual"}, {"cache": "dual", "cfg_scale": 0.7},
    {"cache": "prefix", "length": "fixed"}, {"cache": "dual", "length": "fixed"},
], ids=lambda changes: ",".join(map(str, changes.values())))
def test_refreshed_at_every_step_it_is_exact_and_otherwise_close(changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    exact = decode(dataclasses.replace(settings, cache="none"))
    assert decode(dataclasses.replace(settings, cache_refresh=1)) == exact
    lazy = decode(settings)
    same = [a == b for x, y in zip(lazy, exact, strict=True) for a, b in zip(x, y, strict=False)]
    assert np.mean(same) > 0.2
    assert all(len(tokens) == 24 or tokens == e for tokens, e in zip(lazy, exact, strict=True) if len(e) == 24)


def test_with_one_step_per_block_every_evaluation_is_a_refresh():
    settings = dataclasses.replace(SETTINGS, steps_per_block=1)
    exact = decode(settings)
    for cache in ("prefix", "dual"):
        assert decode(dataclasses.replace(settings, cache=cache)) == exact


@pytest.mark.parametrize("cache_refresh, wholes", [(0, 3), (3, 9), (1, 24)])
def test_the_whole_canvas_is_computed_at_refreshes_only(cache_refresh, wholes):
    """Three blocks of eight steps, the block starts and every third step within it."""
    logits_fn, computed = transformer()[0], []

    def counted(tokens_BT, positions_BT, segments_BT, query_columns_BQ, cache):
        jax.debug.callback(lambda _: computed.append(tokens_BT.shape[1]), tokens_BT)
        return logits_fn(tokens_BT, positions_BT, segments_BT, query_columns_BQ, cache)

    settings = dataclasses.replace(SETTINGS, cache="prefix", cache_refresh=cache_refresh, suppressed_ids=(IDS.eos,))
    Decoder(jax.tree_util.Partial(counted), settings, IDS, TRANSFORMER.max_length, INIT_CACHE).generate([[4] * 20])
    jax.effects_barrier()
    assert len(computed) == 24 and computed.count(8) == 24 - wholes


def test_a_cached_row_does_not_depend_on_the_batch():
    settings = dataclasses.replace(SETTINGS, cache="dual", reveal="threshold", threshold=0.5)
    alone = [decode(settings, [prompt])[0] for prompt in PROMPTS]
    assert decode(settings) == alone
    assert decode(dataclasses.replace(settings, batch_size=2), PROMPTS[::-1]) == alone[::-1]


def test_infilling_with_a_cache():
    texts = [[4, 0, 0, 5, 6, 0], [0] * 12 + [7], [8, 9] + [0] * 3]
    exact = decode(SETTINGS, texts, infill=True)
    for cache in ("prefix", "dual"):
        settings = dataclasses.replace(SETTINGS, cache=cache)
        filled = decode(settings, texts, infill=True)
        assert [len(t) for t in filled] == [len(t) for t in texts] and all(0 not in t for t in filled)
        assert decode(dataclasses.replace(settings, cache_refresh=1), texts, infill=True) == exact
