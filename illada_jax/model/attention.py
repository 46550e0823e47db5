"""Attention back ends: bidirectional, within segments, grouped keys and values.

A back end is `f(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS) -> out_BTNH`: it may be replaced by another with the
same meaning. Every token attends to all tokens of its own segment, before and after it.
"""

from collections.abc import Callable

import jax

from illada_jax.errors import ConfigError

AttentionFn = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def xla_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segments_BT: jax.Array, segments_BS: jax.Array
) -> jax.Array:
    """Attention by `jax.nn.dot_product_attention`: any platform, softmax in float32, memory grows with T·S."""
    same_BNTS = (segments_BT[:, :, None] == segments_BS[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=same_BNTS, implementation="xla")


BACK_ENDS: dict[str, AttentionFn] = {"xla": xla_attention}


def attention_fn(name: str) -> AttentionFn:
    """The back end called `name`; `auto` takes the best for the platform. Raises ConfigError for an unknown one."""
    if name == "auto":
        name = "xla"
    if name not in BACK_ENDS:
        raise ConfigError(f"config.model.attention = {name!r}: must be auto or one of {', '.join(BACK_ENDS)}")
    return BACK_ENDS[name]
