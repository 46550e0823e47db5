"""Attention back ends: bidirectional, within segments, grouped keys and values.

A back end is `f(config, q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS) -> out_BTNH`; all compute the same function.
Every token attends to all tokens of its own segment, before and after it.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from etils import epy
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from illada_jax.config import ModelConfig

with epy.lazy_imports():  # for TPUs only
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

# The name of attention's output in remat policies.
ATTENTION_OUT = "attention_out"
LANES = 128  # block sizes of the splash kernel are multiples of it
NO_SEGMENT = -2  # segment of padding keys: neither a token's segment nor that of hidden cache columns (-1)


def xla_attention(config: ModelConfig, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array,
                  segments_BT: jax.Array, segments_BS: jax.Array) -> jax.Array:
    """Attention in plain XLA: any platform, softmax in float32, O(T·S) memory.

    The G = N/K query heads that share keys are rows of one product (g = G·T), and the mask is an additive bias: on CPU
    this takes 0.6 to 0.85 of the time of `jax.nn.dot_product_attention`.
    """
    del config
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BKgH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    scores_BKgS = jnp.einsum("BKgH,BSKH->BKgS", q_BKgH, k_BSKH, preferred_element_type=jnp.float32)
    # A token may always attend to itself: no row is all -inf.
    bias_BTS = jnp.where(segments_BT[:, :, None] == segments_BS[:, None, :], 0.0, -jnp.inf)
    scores_BKGTS = scores_BKgS.reshape(B, K, N // K, T, -1) + bias_BTS[:, None, None]
    scores_BKgS = scores_BKGTS.reshape(scores_BKgS.shape)
    max_BKg1 = jax.lax.stop_gradient(jnp.max(scores_BKgS, axis=-1, keepdims=True))
    unnormed_BKgS = jnp.exp(scores_BKgS - max_BKg1)
    out_BKgH = jnp.einsum("BKgS,BSKH->BKgH", unnormed_BKgS.astype(v_BSKH.dtype), v_BSKH,
                          preferred_element_type=jnp.float32)
    out_BKgH = out_BKgH / jnp.sum(unnormed_BKgS, axis=-1, keepdims=True)
    out_BTNH = out_BKgH.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)
    return checkpoint_name(out_BTNH.astype(q_BTNH.dtype), ATTENTION_OUT)


def cudnn_attention(config: ModelConfig, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array,
                    segments_BT: jax.Array, segments_BS: jax.Array) -> jax.Array:
    """Flash attention of cuDNN where it supports the shapes (bfloat16, even lengths, H at most 128), else XLA."""
    even = q_BTNH.shape[1] % 2 == 0 and k_BSKH.shape[1] % 2 == 0
    if not (q_BTNH.dtype == jnp.bfloat16 and even and config.head_dim % 8 == 0 and config.head_dim <= 128):
        return xla_attention(config, q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS)
    same_BNTS = (segments_BT[:, :, None] == segments_BS[:, None, :])[:, None]
    out_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=same_BNTS, implementation="cudnn")
    return checkpoint_name(out_BTNH, ATTENTION_OUT)


def splash_attention(config: ModelConfig, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array,
                     segments_BT: jax.Array, segments_BS: jax.Array, interpret: bool = False) -> jax.Array:
    """The TPU kernel: no array of size T·S is in memory, and the keys of a group are not repeated.

    Over a mesh each device computes its own rows and heads; along a mesh axis that does not divide them, devices repeat
    the same computation. Lengths are padded to whole blocks with keys that no query attends to.
    """
    arrays = q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS
    local = functools.partial(_local_splash, config, interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(*arrays)
    rules = dict(nn.get_logical_axis_rules())
    rows = _dividing(rules["batch"], mesh, q_BTNH.shape[0])
    heads = _dividing(rules["heads_act"], mesh, config.num_kv_heads)
    of_heads, of_rows = PartitionSpec(rows, None, heads), PartitionSpec(rows)
    # The check is off because the kernel does not declare the mesh axes over which its result varies.
    return jax.shard_map(local, in_specs=(of_heads, of_heads, of_heads, of_rows, of_rows), out_specs=of_heads,
                         check_vma=False)(*arrays)


def _dividing(axes: str | tuple[str, ...], mesh: jax.sharding.AbstractMesh, size: int) -> tuple[str, ...] | None:
    """The mesh axes of a logical axis, or None where they do not divide its size."""
    axes = (axes,) if isinstance(axes, str) else axes
    return axes if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None


def _local_splash(config: ModelConfig, interpret: bool, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array,
                  segments_BT: jax.Array, segments_BS: jax.Array) -> jax.Array:
    length, num_heads, width = q_BTNH.shape[1:]
    q_BTNH, segments_BT = _pad_length(q_BTNH), _pad_length(segments_BT, NO_SEGMENT)
    k_BSKH, v_BSKH, segments_BS = _pad_length(k_BSKH), _pad_length(v_BSKH), _pad_length(segments_BS, NO_SEGMENT)
    block_q = _block(config.attention_block_q, q_BTNH.shape[1])
    block_kv = _block(config.attention_block_kv, k_BSKH.shape[1])
    compute = _block(config.attention_block_kv_compute, block_kv)
    # The fused backward kernel recomputes scores once instead of twice: five matrix products, not seven.
    blocks = splash.BlockSizes(
        block_q=block_q, block_kv=block_kv, block_kv_compute=compute, block_q_dkv=block_q, block_kv_dkv=block_kv,
        block_kv_dkv_compute=compute, use_fused_bwd_kernel=True)
    mask = splash.MultiHeadMask([splash.FullMask((q_BTNH.shape[1], k_BSKH.shape[1]))] * num_heads)
    kernel = splash.make_splash_mha(mask=mask, head_shards=1, q_seq_shards=1, block_sizes=blocks, interpret=interpret,
                                    residual_checkpoint_name=ATTENTION_OUT)
    # The kernel does not scale the scores.
    q_BNTH, k_BKSH, v_BKSH = (x.swapaxes(1, 2) for x in (q_BTNH * width**-0.5, k_BSKH, v_BSKH))
    out_BNTH = jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, splash.SegmentIds(segments_BT, segments_BS))
    return out_BNTH.swapaxes(1, 2)[:, :length]


def _pad_length(x_BT: jax.Array, value: int = 0) -> jax.Array:
    """Pads the second axis to a multiple of LANES."""
    widths = [(0, 0), (0, -x_BT.shape[1] % LANES)] + [(0, 0)] * (x_BT.ndim - 2)
    return jnp.pad(x_BT, widths, constant_values=value)


def _block(limit: int, length: int) -> int:
    """The largest multiple of LANES that divides `length` and does not exceed `limit`."""
    return max(block for block in range(LANES, max(limit, LANES) + 1, LANES) if length % block == 0)


BACK_ENDS: dict[str, Callable[..., jax.Array]] = {
    "xla": xla_attention,
    "cudnn": cudnn_attention,
    "splash": splash_attention,
    "splash_interpret": functools.partial(splash_attention, interpret=True),
}
BEST = {"tpu": "splash", "gpu": "cudnn", "cpu": "xla"}


def attention_fn(config: ModelConfig) -> Callable[..., jax.Array]:
    """The back end `config.attention`; `auto` selects the best one for the default platform."""
    name = BEST[jax.default_backend()] if config.attention == "auto" else config.attention
    return functools.partial(BACK_ENDS[name], config)
