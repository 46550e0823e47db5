"""The transformer, as pure functions of its params.

Begin with `functional`, the interface of the package: `init_params`, `hidden`, `head`, `make_logits_fn`. `transformer`
is the network (bidirectional, RMSNorm, SwiGLU, rotary positions, grouped queries), `attention` its attention back ends,
`cache` the keys and values cached in decoding, `dense` and `embedding` the matrix product and the look-up over a mesh,
`int8` eight-bit weights, `flops` the operations by formula.

May import only the config: it does not depend on masks, losses or decoding.
"""

from illada_jax.model.cache import make_init_cache
from illada_jax.model.functional import (
    abstract_params,
    head,
    hidden,
    init_params,
    make_logits_fn,
    num_params,
    param_axes,
)

__all__ = ["abstract_params", "head", "hidden", "init_params", "make_init_cache", "make_logits_fn", "num_params",
           "param_axes"]
