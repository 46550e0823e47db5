"""Int8 weights: their rounding, products and bytes, and the params that are not quantised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from illada_jax import model
from illada_jax.config import ModelConfig
from illada_jax.model.dense import dense
from illada_jax.model.int8 import Int8, quantize, quantize_params
from tests import reference_model
from tests.util import random_params

SMALL = ModelConfig(vocab_size=50, d_model=24, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=8, d_ff=40,
                    tied_head=False)
ILLADA = ModelConfig(vocab_size=155_136, d_model=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
                     d_ff=14_336, max_length=8192, tied_head=True)
LLADA = ModelConfig(vocab_size=126_464, d_model=4096, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128,
                    d_ff=12_288, max_length=4096, tied_head=False)


def test_values_by_hand():
    w_io = np.array([[1.0, 0.0, -2.54], [-0.5, 0.0, 0.01]], np.float32)
    got = quantize(w_io, input_axes=1)
    np.testing.assert_array_equal(got.values, [[127, 0, -127], [-64, 0, 0]])  # -63.5 goes to the even -64
    np.testing.assert_allclose(got.scale, [1 / 127, 1, 2.54 / 127])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_weight_is_off_by_more_than_half_a_step(dtype):
    w_YNHD = np.random.default_rng(0).normal(size=(3, 4, 5, 7)).astype(jnp.dtype(dtype))
    got = quantize(w_YNHD, input_axes=2, first=1)
    assert got.values.dtype == jnp.int8 and got.scale.shape == (3, 7)
    step = np.abs(w_YNHD.astype(np.float32)).max((1, 2)) / 127
    error = np.abs(np.asarray(got.values) * step[:, None, None] - w_YNHD.astype(np.float32))
    assert (error <= 0.5001 * step[:, None, None]).all()
    assert np.abs(got.values).max((1, 2)).min() == 127  # each channel uses the whole range


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_are_those_of_the_rounded_matrix(dtype):
    rng = np.random.default_rng(0)
    x_BLi, w = rng.normal(size=(2, 3, 16)).astype(dtype), quantize(rng.normal(size=(16, 9)), 1)
    exact = x_BLi.astype(np.float64) @ (np.asarray(w.values, np.float64) * np.asarray(w.scale, np.float64))
    got = jax.jit(dense, static_argnums=2)(jnp.asarray(x_BLi), w, jnp.float32)
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5)


def test_the_model_takes_them():
    """Logits are those of the numpy oracle with the rounded matrices."""
    params = random_params(SMALL)
    int8 = quantize_params(params)
    assert isinstance(int8["layers"]["attention"]["o"], Int8) and isinstance(int8["head"], Int8)
    assert int8["embedding"] is params["embedding"]

    def back(leaf):
        if not isinstance(leaf, Int8):
            return leaf
        axes = {4: {(2, 6, 8, 24): (1, 2)}.get(leaf.shape, (1,)), 3: (1,), 2: (0,)}[len(leaf.shape)]
        return np.asarray(leaf.values) * np.expand_dims(np.asarray(leaf.scale), axes)

    rounded = jax.tree.map(back, int8, is_leaf=lambda node: isinstance(node, Int8))
    rng = np.random.default_rng(0)
    tokens_L, ones_L, positions_L = rng.integers(0, 50, 12), np.ones(12, int), np.arange(12)
    query_columns_BQ = jnp.arange(12)[None]
    logits_fn = model.make_logits_fn(SMALL, int8)
    got, _ = jax.jit(lambda f, *a: f(*a, query_columns_BQ, None))(logits_fn, *(jnp.asarray(a)[None] for a in (
        tokens_L, positions_L, ones_L)))
    expected = reference_model.logits(SMALL, rounded, tokens_L, positions_L, ones_L)
    np.testing.assert_allclose(got[0], expected, atol=2e-4, rtol=2e-4)
    exact = reference_model.logits(SMALL, params, tokens_L, positions_L, ones_L)
    assert 1e-3 < np.abs(exact - expected).max() < 0.2 * np.abs(exact).max()  # rounded, and not by much


@pytest.mark.parametrize("config", [ILLADA, LLADA], ids=["iLLaDA", "LLaDA"])
def test_8b_models_take_half_the_bytes(config):
    """Abstract shapes: nothing is allocated. An untied head is rounded, embeddings are not."""
    def init(quantized):
        params = model.init_params(config, jax.random.key(0))
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        return quantize_params(params) if quantized else params

    size = [sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(lambda q=q: init(q))))
            for q in (False, True)]
    assert size[1] <= 0.55 * size[0]
    assert size[1] < 9e9  # a chip of 16 GB has room left for a canvas
