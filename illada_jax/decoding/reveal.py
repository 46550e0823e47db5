"""Reveal strategies: the number of positions that a step reveals, surest first.

A strategy is a function of a `Ranking` and the settings that returns int32 [B]. The loop reveals at least one position
of an unfinished block, whatever the strategy returns, so that decoding always ends. To add one, write it here and enter
it in REVEALS under its name in `config.decode.reveal`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from illada_jax.config import DecodeConfig


class Ranking(NamedTuple):
    """The masked positions of the active block, surest first; ties go to the lower position.

    Attributes:
      confidence_BR: float32, see `confidence.py`; rank 0 is the surest. Ranks from masked_B on are undefined.
      entropy_BR: float32 entropy of each position's distribution in nats, in the same order.
      masked_B: int32, masked positions now.
      total_B: int32, masked positions when the block was opened.
      log_threshold_B: float32, logarithm of the row's threshold.
      step: int32 scalar, steps taken in the block.
    """

    confidence_BR: jax.Array
    entropy_BR: jax.Array
    masked_B: jax.Array
    total_B: jax.Array
    log_threshold_B: jax.Array
    step: jax.Array


def schedule(ranking: Ranking, settings: DecodeConfig) -> jax.Array:
    """A fixed number per step: total // steps, and one more in the first total % steps steps (LLaDA's schedule)."""
    steps = settings.steps_per_block
    return ranking.total_B // steps + (ranking.step < ranking.total_B % steps)


def threshold(ranking: Ranking, settings: DecodeConfig) -> jax.Array:
    """All positions with exp(confidence) ≥ threshold (Fast-dLLM, 2025, confidence-aware parallel decoding)."""
    del settings
    return _leading(ranking, ranking.confidence_BR >= ranking.log_threshold_B[:, None])


def factor(ranking: Ranking, settings: DecodeConfig) -> jax.Array:
    """The largest n with (n + 1)·(1 - c_n) < factor, c_n the n-th highest exp(confidence) (Fast-dLLM, 2025).

    The more positions are revealed together, the surer the least sure of them must be. With factor = 1 the condition
    guarantees that the greedy joint choice equals the greedy product of marginals.
    """
    n_BR = 1 + jax.lax.broadcasted_iota(jnp.float32, ranking.confidence_BR.shape, 1)
    return _leading(ranking, (n_BR + 1) * -jnp.expm1(ranking.confidence_BR) < settings.factor)


def entropy_bound(ranking: Ranking, settings: DecodeConfig) -> jax.Array:
    """The largest n with Σ H_i - max H_i ≤ entropy_bound (EB-sampler, Ben-Hamu et al., 2025).

    The left side bounds the error of drawing the n positions independently instead of jointly.
    """
    total_BR = jnp.cumsum(ranking.entropy_BR, axis=1)
    largest_BR = jax.lax.cummax(ranking.entropy_BR, axis=1)
    return _leading(ranking, total_BR - largest_BR <= settings.entropy_bound)


def _leading(ranking: Ranking, accepted_BR: jax.Array) -> jax.Array:
    """Length of the leading run of accepted ranks, int32 [B]; only masked positions count."""
    ranks_BR = jax.lax.broadcasted_iota(jnp.int32, accepted_BR.shape, 1)
    accepted_BR &= ranks_BR < ranking.masked_B[:, None]
    return jnp.sum(jnp.cumprod(accepted_BR, axis=1, dtype=jnp.int32), axis=1)


REVEALS: dict[str, Callable[[Ranking, DecodeConfig], jax.Array]] = {
    "schedule": schedule,
    "threshold": threshold,
    "factor": factor,
    "entropy_bound": entropy_bound,
}


def reveal_mask(settings: DecodeConfig, confidence_BQ: jax.Array, masked_BQ: jax.Array, total_B: jax.Array,
                entropy_BQ: jax.Array, log_threshold_B: jax.Array, step: jax.Array) -> jax.Array:
    """Positions of the active block to reveal, bool [B, Q]: masked ones, at least one where any is left."""
    # Masked positions come first even at a confidence of -inf; a stable sort gives ties to the lower position.
    order_BR = jnp.lexsort((-confidence_BQ, ~masked_BQ), axis=-1)
    masked_B = jnp.sum(masked_BQ, axis=1)
    confidence_BR, entropy_BR = (jnp.take_along_axis(x_BQ, order_BR, axis=1) for x_BQ in (confidence_BQ, entropy_BQ))
    ranking = Ranking(confidence_BR, entropy_BR, masked_B, total_B, log_threshold_B, step)
    count_B = jnp.clip(REVEALS[settings.reveal](ranking, settings), 1, masked_B)
    rank_BQ = jnp.argsort(order_BR, axis=1)
    return (rank_BQ < count_B[:, None]) & masked_BQ
