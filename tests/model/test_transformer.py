"""The transformer against a numpy oracle, and the changes that must not affect its output."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from illada_jax import model
from illada_jax.config import ModelConfig
from tests import reference_model
from tests.util import random_params

SMALL = ModelConfig(vocab_size=50, d_model=24, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=8, d_ff=40)


def inputs(batch_size=3, length=12):
    rng = np.random.default_rng(0)
    tokens_BL = rng.integers(0, 50, (batch_size, length), dtype=np.int32)
    segments_BL = np.ones((batch_size, length), np.int32)
    positions_BL = np.tile(np.arange(length, dtype=np.int32), (batch_size, 1))
    segments_BL[1, 5:] = 2
    positions_BL[1, 5:] = np.arange(length - 5)
    segments_BL[2, 9:] = 0
    positions_BL[2, 9:] = 0
    return tokens_BL, positions_BL, segments_BL


@jax.jit
def run(logits_fn, tokens_BL, positions_BL, segments_BL):
    columns_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
    return logits_fn(tokens_BL, positions_BL, segments_BL, columns_BL, None)[0]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
def test_equals_the_numpy_oracle(tied, kv_heads):
    config = dataclasses.replace(SMALL, tied_head=tied, num_kv_heads=kv_heads)
    params = random_params(config)
    rows = inputs()
    got_BLV = run(model.make_logits_fn(config, params), *rows)
    assert got_BLV.dtype == jnp.float32
    for row, got_LV in enumerate(got_BLV):
        expected_LV = reference_model.logits(config, params, *(x[row] for x in rows))
        np.testing.assert_allclose(got_LV, expected_LV, atol=2e-4, rtol=2e-4)


def test_a_segment_does_not_see_its_neighbours():
    logits_fn = model.make_logits_fn(SMALL, random_params(SMALL))
    tokens_BL, positions_BL, segments_BL = inputs()
    packed_LV = run(logits_fn, tokens_BL, positions_BL, segments_BL)[1]
    for start, stop in ((0, 5), (5, 12)):
        alone = tokens_BL[1:2, start:stop], positions_BL[1:2, start:stop], np.ones((1, stop - start), np.int32)
        np.testing.assert_allclose(run(logits_fn, *alone)[0], packed_LV[start:stop], atol=1e-5)


def test_attention_looks_both_ways_and_padding_is_not_seen():
    logits_fn = model.make_logits_fn(SMALL, random_params(SMALL))
    tokens_BL, positions_BL, segments_BL = inputs()
    before = run(logits_fn, tokens_BL, positions_BL, segments_BL)
    changed_BL = tokens_BL.copy()
    changed_BL[0, -1] += 1
    changed_BL[2, 9:] += 1
    after = run(logits_fn, changed_BL, positions_BL, segments_BL)
    assert np.abs(after[0, 0] - before[0, 0]).max() > 1e-3
    np.testing.assert_array_equal(after[2, :9], before[2, :9])


@pytest.mark.parametrize("scan_unroll", [1, 2])
@pytest.mark.parametrize("num_layers", [1, 3, 4])
def test_queried_columns_are_those_of_the_whole(num_layers, scan_unroll):
    """Decoding computes the last layer for queried columns only, training for all: in any order, across segments."""
    config = dataclasses.replace(SMALL, num_layers=num_layers)
    if num_layers % scan_unroll == 0:
        config = dataclasses.replace(config, scan_unroll=scan_unroll)
    params, rows = random_params(config), inputs()
    whole_BLV = model.head(config, params, model.hidden(config, params, *rows))
    query_columns_BQ = np.array([[7, 0], [6, 2], [1, 8]])
    some_BQV, _ = jax.jit(lambda f, *x: f(*x, None))(model.make_logits_fn(config, params), *rows, query_columns_BQ)
    np.testing.assert_allclose(some_BQV, np.take_along_axis(whole_BLV, query_columns_BQ[:, :, None], 1), atol=2e-5)


@pytest.mark.parametrize("change", [{"remat": "full"}, {"remat": "dots"}, {"scan_unroll": 0}])
def test_how_it_is_computed_changes_neither_values_nor_gradients(change):
    params = random_params(SMALL)
    rows = inputs()

    def total(params, config):
        logits_BLV = model.head(config, params, model.hidden(config, params, *rows))
        return jnp.mean(jax.nn.log_softmax(logits_BLV)[..., 3])

    value, grads = jax.value_and_grad(total)(params, SMALL)
    other, other_grads = jax.value_and_grad(total)(params, dataclasses.replace(SMALL, **change))
    np.testing.assert_allclose(other, value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, other_grads)


def test_queried_columns_are_those_of_all_columns():
    logits_fn = model.make_logits_fn(SMALL, random_params(SMALL))
    rows = inputs()
    query_columns_BQ = np.array([[3, 0], [11, 4], [2, 2]], np.int32)
    all_BLV = np.asarray(run(logits_fn, *rows))
    some_BQV, _ = logits_fn(*(jnp.asarray(x) for x in rows), jnp.asarray(query_columns_BQ), None)
    np.testing.assert_allclose(some_BQV, np.take_along_axis(all_BLV, query_columns_BQ[..., None], 1), atol=1e-5)


def test_other_params_do_not_compile_again():
    first, second = (model.make_logits_fn(SMALL, random_params(SMALL, seed=seed)) for seed in (1, 2))
    run(first, *inputs(5))
    size = run._cache_size()
    run(second, *inputs(5))
    assert run._cache_size() == size


def test_parameter_counts_are_the_published_ones():
    illada = ModelConfig(vocab_size=155_136, d_model=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
                         d_ff=14_336, max_length=8192, tied_head=True)
    llada = ModelConfig(vocab_size=126_464, d_model=4096, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128,
                        d_ff=12_288, max_length=4096, tied_head=False)
    assert model.num_params(illada) == 7_615_025_152
    assert model.num_params(llada) == 8_015_581_184


def test_initialisation_has_the_public_scales():
    config = ModelConfig(vocab_size=4000, d_model=256, num_layers=2, num_heads=8, num_kv_heads=8, d_ff=512)
    params = jax.jit(lambda: model.init_params(config, jax.random.key(0)))()
    std = (2 / (5 * 256)) ** 0.5
    attention, mlp = params["layers"]["attention"], params["layers"]["mlp"]
    for name, x, expected in (
        ("embedding", params["embedding"], (1 / 512) ** 0.5),
        ("q", attention["q"], std),
        ("gate", mlp["gate"], std),
        ("o", attention["o"], std / 2),
        ("down", mlp["down"], std / 2),
    ):
        assert abs(float(jnp.std(x)) / expected - 1) < 0.03, name
