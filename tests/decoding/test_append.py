"""The cache `append`: it equals the naive statement of its rule, and no cache for a causal network."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from illada_jax import model
from illada_jax.config import DecodeConfig, MeshConfig
from illada_jax.decoding import Decoder, kept, loop
from illada_jax.decoding.kept import KeptPrefix
from illada_jax.errors import ConfigError
from illada_jax.parallel.mesh import make_mesh
from illada_jax.parallel.sharding import param_shardings
from tests import reference_model
from tests.decoding.agree import assert_agree
from tests.decoding.toys import IDS, TRANSFORMER, causal
from tests.util import random_params

# 20 new tokens in blocks of 8 leave a short last block; 3 steps leave a remainder.
SETTINGS = DecodeConfig(max_new_tokens=20, block_length=8, steps_per_block=3, batch_size=4, seed=3, cache="append")
PROMPTS = [[4], [5, 6, 7, 4, 9], [], [8] * 61, [9, 2, 9, 8, 7, 6], [10, 3]]
INIT_CACHE = model.make_init_cache(TRANSFORMER)


@functools.cache
def networks():
    """(LogitsFn, naive network) of one transformer."""
    params = random_params(TRANSFORMER)
    return model.make_logits_fn(TRANSFORMER, params), functools.partial(reference_model.evaluate, TRANSFORMER, params)


def decode(prompts=PROMPTS, settings=SETTINGS, network=None, init_cache=INIT_CACHE, **arguments):
    """(Tokens, reveal steps, why it stopped) of each prompt."""
    decoder = Decoder(network or networks()[0], settings, IDS, TRANSFORMER.max_length, init_cache)
    return [(r.tokens, r.reveal_step, r.stopped_by) for r in decoder.generate(prompts, **arguments)]


@pytest.mark.parametrize("changes", [
    {}, {"cache_refresh": 1}, {"cache_refresh": 2, "temperature": 0.7},
    {"length": "fixed", "reveal": "threshold", "threshold": 0.3},
    {"cfg_scale": 0.8}, {"cfg_scale": 1.5, "length": "fixed", "cache_refresh": 1, "logits_eos_inf": True},
    {"batch_size": 2, "stop_ids": (10, 7), "confidence": "margin"},
], ids=lambda changes: ",".join(map(str, changes.values())) or "plain")
def test_equals_the_naive_rule(changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    assert assert_agree(networks(), settings, PROMPTS, exact_ties=False, init_cache=INIT_CACHE) <= 1


def test_nothing_behind_a_block_exists_with_a_fixed_length_too():
    assert decode(settings=dataclasses.replace(SETTINGS, length="fixed")) == decode()


def test_a_row_does_not_depend_on_the_others_or_their_order():
    settings = dataclasses.replace(SETTINGS, temperature=0.9, cfg_scale=0.5, cache_refresh=2, stop_ids=(10,))
    rows = range(len(PROMPTS))
    alone = [decode([PROMPTS[row]], settings, rows=[row])[0] for row in rows]
    assert len({len(tokens) for tokens, *_ in alone}) > 1  # they end at different blocks
    for batch_size, order in itertools.product((1, 2, 3, 4), (list(rows), list(rows)[::-1], [3, 0, 5, 1, 4, 2])):
        batch = decode([PROMPTS[row] for row in order], dataclasses.replace(settings, batch_size=batch_size),
                       rows=order)
        assert batch == [alone[row] for row in order], (batch_size, order)


@pytest.mark.parametrize("changes", [{}, {"cfg_scale": 0.5}, {"length": "fixed"}, {"cache_refresh": 1}],
                         ids=lambda changes: ",".join(changes) or "plain")
def test_is_exact_for_a_causal_network(changes):
    network, init_cache = causal()
    settings = dataclasses.replace(SETTINGS, temperature=0.5, **changes)
    exact = decode(settings=dataclasses.replace(settings, cache="none", cache_refresh=0), network=network)
    assert decode(settings=settings, network=network, init_cache=init_cache) == exact
    approximate = decode(settings=dataclasses.replace(settings, cache="none", cache_refresh=0))
    assert decode(settings=settings) != approximate  # the other network does look ahead


@pytest.mark.parametrize("reused", [[], [8] * 30, [8] * 60 + [7]])
def test_with_reuse_only_what_follows_the_common_prefix_is_computed(reused):
    """Exact for a causal network; a conversation of growing turns computes about the same for each."""
    network, init_cache = causal()
    computed = []

    def counted(tokens_BT, positions_BT, segments_BT, query_columns_BQ, cache):
        jax.debug.callback(lambda used: computed.append(int(used)), (segments_BT > 0).sum())
        return network(tokens_BT, positions_BT, segments_BT, query_columns_BQ, cache)

    prefix = KeptPrefix()
    counting, prompt = jax.tree_util.Partial(counted), [8] * 30
    decode([reused], network=counting, init_cache=init_cache, prefix=prefix)
    settings = dataclasses.replace(SETTINGS, max_new_tokens=8, block_length=8)
    for turn in range(5):
        del computed[:]
        common = prefix.common(prompt, 1)
        (tokens, *_), = decode([prompt], settings, network=counting, init_cache=init_cache, prefix=prefix)
        jax.effects_barrier()
        assert sum(computed) == len(prompt) - common + 3 * 8, turn
        assert decode([prompt], settings, network=network, init_cache=init_cache)[0][0] == tokens
        assert prefix.tokens == prompt
        prompt = [*prompt, *tokens, 4 + turn, 9]
    assert common > 40


def test_reuse_of_another_conversation_is_no_reuse():
    prefix = KeptPrefix()
    decode([[4, 5, 6, 7]], prefix=prefix)
    assert decode([[5, 6]], prefix=prefix) == decode([[5, 6]])
    guided = dataclasses.replace(SETTINGS, cfg_scale=1.0)
    assert decode([[5, 6]], guided, prefix=prefix) == decode([[5, 6]], guided)


def test_compiled_programs_are_bounded_and_the_cache_has_the_size_of_the_formula():
    for function in (loop.run_blocks, kept.row_cache, kept._insert, kept._resized):
        function.clear_cache()
    caches, insert = [], kept._insert
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, 11, n).tolist() for n in rng.integers(0, 80, 24)]
    for seed in range(2):
        for batch in (prompts, prompts[::-1]):
            decode(batch, dataclasses.replace(SETTINGS, seed=seed, cache_refresh=2 * seed, temperature=0.1 * seed))
    n = len(Decoder(networks()[0], SETTINGS, IDS, TRANSFORMER.max_length, INIT_CACHE).buckets)
    assert loop.run_blocks._cache_size() <= n and kept.row_cache._cache_size() <= n
    assert insert._cache_size() <= n * (n + 1) // 2 and kept._resized._cache_size() <= n * (n - 1)
    rows = kept.KeptRows(networks()[0], loop.Rules(dataclasses.replace(SETTINGS, cfg_scale=1.0), 0, 11, (), (), (), (),
                                                   INIT_CACHE, 8), [64, 96], None, 0)
    del caches
    c = TRANSFORMER
    cache = kept._empty(INIT_CACHE, rows.rules.passes * 4, 96, None)
    assert cache.keys_YBSKH.nbytes + cache.values_YBSKH.nbytes == 2 * 4 * (2 * c.num_layers * 4 * 96 * c.num_kv_heads
                                                                          * c.head_dim)


def test_over_a_mesh():
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), jax.devices()[:4])
    config = dataclasses.replace(TRANSFORMER, num_kv_heads=2)  # to spread
    params = random_params(config)
    spread = jax.device_put(params, param_shardings(mesh, model.param_axes(config)))
    settings = dataclasses.replace(SETTINGS, cache_refresh=2, temperature=0.7)
    prompts = [prompt for prompt in PROMPTS if prompt]  # without one, all columns of the first block tie
    results = [[(r.tokens, r.stopped_by) for r in Decoder(
        model.make_logits_fn(config, p), settings, IDS, config.max_length, model.make_init_cache(config),
        m).generate(prompts)] for p, m in ((params, None), (spread, mesh))]
    assert results[0] == results[1]


def test_gaps_are_refused():
    with pytest.raises(ConfigError, match=r"config.decode.cache = 'append': cannot infill"):
        decode([[4, IDS.mask]], infill=True)
