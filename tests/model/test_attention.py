"""Attention back ends agree: the TPU kernel in its interpreter against XLA, alone and over a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from illada_jax import model
from illada_jax.config import MeshConfig, ModelConfig
from illada_jax.model.attention import BACK_ENDS, LANES, _block, splash_attention, xla_attention
from illada_jax.parallel.mesh import make_mesh, use_mesh
from tests.util import random_params

BLOCKS = {"attention_block_q": 128, "attention_block_kv": 256, "attention_block_kv_compute": 128}


def arrays(batch_size, queries, keys, num_heads, num_kv_heads, width=16, seed=0):
    """Rows of several segments; in the first, some queries are padding and some keys are hidden."""
    rng = np.random.default_rng(seed)
    q_BTNH = rng.standard_normal((batch_size, queries, num_heads, width)).astype(np.float32)
    k_BSKH, v_BSKH = rng.standard_normal((2, batch_size, keys, num_kv_heads, width)).astype(np.float32)
    segments_BS = np.sort(rng.integers(1, 4, (batch_size, keys)), axis=1).astype(np.int32)
    segments_BS[:, :3] = (1, 2, 3)
    segments_BT = rng.integers(1, 4, (batch_size, queries)).astype(np.int32)
    if queries == keys:
        segments_BS[0, keys * 3 // 4 :] = 0
        segments_BT = segments_BS
    else:
        segments_BS[0, 3:9] = -1
    return q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS


def value_and_gradients(back_end, config, *args):
    """(what a back end returns, gradients of a mixed sum of it in q, k and v)."""
    q_BTNH, k_BSKH, v_BSKH, *segments = args
    weights_BTNH = np.random.default_rng(9).standard_normal(q_BTNH.shape).astype(np.float32)

    def mixed(q_BTNH, k_BSKH, v_BSKH):
        out_BTNH = BACK_ENDS[back_end](config, q_BTNH, k_BSKH, v_BSKH, *segments)
        return jnp.sum(weights_BTNH * out_BTNH), out_BTNH

    gradients, out_BTNH = jax.jit(jax.grad(mixed, argnums=(0, 1, 2), has_aux=True))(q_BTNH, k_BSKH, v_BSKH)
    return out_BTNH, *gradients


@pytest.mark.parametrize(
    ("queries", "keys", "num_heads", "num_kv_heads"),
    [(256, 256, 4, 4), (384, 384, 4, 2), (200, 200, 4, 1), (70, 300, 4, 2)],
    ids=["heads", "grouped", "ragged, one key head", "a slice against a cache"],
)
def test_splash_equals_xla_forward_and_backward(queries, keys, num_heads, num_kv_heads):
    config = ModelConfig(num_heads=num_heads, num_kv_heads=num_kv_heads, d_model=64, **BLOCKS)
    args = arrays(2, queries, keys, num_heads, num_kv_heads)
    expected = value_and_gradients("xla", config, *args)
    got = value_and_gradients("splash_interpret", config, *args)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("rows", [4, 3], ids=["rows divide", "rows do not divide"])
def test_splash_over_a_mesh_equals_one_device(rows):
    config = ModelConfig(num_heads=4, num_kv_heads=2, d_model=64, **BLOCKS)
    args = arrays(rows, 128, 128, 4, 2)
    with use_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        got = jax.jit(lambda *args: splash_attention(config, *args, interpret=True))(*args)
    np.testing.assert_allclose(got, xla_attention(config, *args), atol=1e-5)


def test_the_whole_model_gives_the_same_with_the_kernel():
    config = ModelConfig(vocab_size=50, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=40,
                         max_length=150, **BLOCKS)
    params = random_params(config)
    tokens_BL = np.random.default_rng(0).integers(0, 50, (2, 150), dtype=np.int32)
    segments_BL = np.repeat([[1, 2]], [90, 60], axis=1).astype(np.int32).repeat(2, axis=0)
    positions_BL = np.concatenate([np.arange(90), np.arange(60)]).astype(np.int32)[None].repeat(2, axis=0)
    run = jax.jit(model.hidden, static_argnums=0)
    expected = run(config, params, tokens_BL, positions_BL, segments_BL)
    kernel = dataclasses.replace(config, attention="splash_interpret")
    np.testing.assert_allclose(run(kernel, params, tokens_BL, positions_BL, segments_BL), expected, atol=2e-5)


@pytest.mark.parametrize(("limit", "length"), [(512, 8192), (512, 384), (1024, 640), (384, 4096)])
def test_blocks_divide_the_length_and_do_not_exceed_the_setting(limit, length):
    block = _block(limit, length)
    assert length % block == 0 and block <= limit
    larger = [b for b in range(block + LANES, limit + 1, LANES) if length % b == 0]
    assert not larger
