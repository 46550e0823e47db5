"""The transformer, as pure functions of its params.

Begin with `functional`, which is what other rooms use: `init_params`, `hidden`, `head`, `make_logits_fn`. The network
itself is `transformer` (bidirectional, RMSNorm, SwiGLU, rotary positions, grouped queries), its attention back ends are
`attention`, keys and values kept for decoding `cache`, matrices of eight bits `quantized`.

May import the config alone: it knows nothing of masks, losses or decoding.
"""

from illada_jax.model.cache import make_init_cache
from illada_jax.model.functional import head, hidden, init_params, make_logits_fn, num_params, param_axes

__all__ = ["head", "hidden", "init_params", "make_init_cache", "make_logits_fn", "num_params", "param_axes"]
