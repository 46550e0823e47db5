"""Confidence in each masked position: positions are revealed in descending order of it.

A confidence is a function of a `Prediction` that returns float32 [B, Q], at most 0; larger is surer. All are logarithms
of a number in (0, 1], so that every reveal strategy combines with every confidence. To add one, write it here and enter
it in CONFIDENCES under its name in `config.decode.confidence`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Prediction(NamedTuple):
    """Predicted tokens of the active block.

    Attributes:
      tokens_BQ: int32, the chosen token of each position.
      log_probs_BQV: float32 log-probabilities from the logits without temperature and noise.
      uniform_BQ: float32 uniform numbers in [0, 1), for random orders.
    """

    tokens_BQ: jax.Array
    log_probs_BQV: jax.Array
    uniform_BQ: jax.Array


def argmax(x_BQV: jax.Array) -> jax.Array:
    """The lowest index of the largest value of the last axis, int32 [B, Q].

    Two plain reductions: on CPU a tenth of the time that XLA takes for `jnp.argmax`.
    """
    largest_BQ1 = jnp.max(x_BQV, axis=-1, keepdims=True)
    last = x_BQV.shape[-1] - 1
    index_BQV = jax.lax.broadcasted_iota(jnp.int32, x_BQV.shape, x_BQV.ndim - 1)
    return jnp.min(jnp.where(x_BQV == largest_BQ1, index_BQV, last), axis=-1)


def log_softmax(logits_BQV: jax.Array) -> jax.Array:
    """Log softmax without saturation: log p = (z - z_max) - log1p(Σ_{v≠argmax} exp(z_v - z_max)), in float32.

    A float32 softmax reaches exactly 1 on a trained model, which makes false ties between confident positions; here the
    distance from 1 survives down to 1e-38.

    >>> log_p = float(log_softmax(jnp.array([[[0.0, 30.0]]]))[0, 0, 1])
    >>> f"{log_p:.1e}", float(jax.nn.log_softmax(jnp.array([0.0, 30.0]))[1])
    ('-9.4e-14', 0.0)
    """
    best_BQ1 = argmax(logits_BQV)[:, :, None]
    shifted_BQV = logits_BQV - jnp.take_along_axis(logits_BQV, best_BQ1, axis=-1)
    is_best_BQV = jax.lax.broadcasted_iota(jnp.int32, logits_BQV.shape, 2) == best_BQ1
    others_BQ1 = jnp.sum(jnp.where(is_best_BQV, 0.0, jnp.exp(shifted_BQV)), axis=-1, keepdims=True)
    return shifted_BQV - jnp.log1p(others_BQ1)


def chosen_log_prob(prediction: Prediction) -> jax.Array:
    """Log p of each position's token, float32 [B, Q]. As a confidence: LLaDA's `low_confidence` remasking."""
    return jnp.take_along_axis(prediction.log_probs_BQV, prediction.tokens_BQ[:, :, None], axis=-1)[:, :, 0]


def margin(prediction: Prediction) -> jax.Array:
    """Log of p(best token) - p(second best). `topk_margin` of Dream 7B (2025); Kim et al. (2025)."""
    best_BQ, second_BQ = jnp.moveaxis(jax.lax.top_k(prediction.log_probs_BQV, 2)[0], -1, 0)
    # log(p1 - p2) = log p1 + log(1 - p2/p1), each term in the form that keeps its small values.
    ratio_BQ = second_BQ - best_BQ
    return best_BQ + jnp.where(ratio_BQ > -0.7, jnp.log(-jnp.expm1(ratio_BQ)), jnp.log1p(-jnp.exp(ratio_BQ)))


def negative_entropy(prediction: Prediction) -> jax.Array:
    """Σ_v p_v log p_v in nats; its exp is one over the perplexity. Dream's `entropy` (Dream 7B, 2025)."""
    probs_BQV = jnp.exp(prediction.log_probs_BQV)
    return jnp.sum(jnp.where(probs_BQV > 0, probs_BQV * prediction.log_probs_BQV, 0.0), axis=-1)


def random(prediction: Prediction) -> jax.Array:
    """Log u with u uniform in [0, 1): a random order, as in training. LLaDA's `random` remasking."""
    return jnp.log(prediction.uniform_BQ)


CONFIDENCES: dict[str, Callable[[Prediction], jax.Array]] = {
    "low_confidence": chosen_log_prob,
    "margin": margin,
    "entropy": negative_entropy,
    "random": random,
}
