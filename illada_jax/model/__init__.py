"""The transformer: `functional` is what other rooms use."""

from illada_jax.model.cache import make_init_cache
from illada_jax.model.functional import head, hidden, init_params, make_logits_fn, num_params, param_axes

__all__ = ["head", "hidden", "init_params", "make_init_cache", "make_logits_fn", "num_params", "param_axes"]
