"""Reveal strategies: the number of positions that a step reveals, surest first.

A strategy is a frozen dataclass (hence static under jit) that maps a `Ranking` to int32 [B]. The loop reveals at least
one position of an unfinished block, whatever the strategy returns, so that decoding always ends. To add one, write it
here, with fields named as the settings of DecodeConfig that it takes, and enter it in REVEALS under its name in
`config.decode.reveal`.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
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
      step: int32 scalar, steps taken in the block.
    """

    confidence_BR: jax.Array
    entropy_BR: jax.Array
    masked_B: jax.Array
    total_B: jax.Array
    step: jax.Array


@dataclass(frozen=True)
class FixedSchedule:
    """A fixed number per step: total // steps, and one more in the first total % steps steps (LLaDA's schedule)."""

    steps_per_block: int

    def __call__(self, ranking: Ranking) -> jax.Array:
        """Number of positions to reveal, [B]."""
        return ranking.total_B // self.steps_per_block + (ranking.step < ranking.total_B % self.steps_per_block)


@dataclass(frozen=True)
class Threshold:
    """All positions with exp(confidence) ≥ threshold (Fast-dLLM, 2025, confidence-aware parallel decoding)."""

    threshold: float

    def __call__(self, ranking: Ranking) -> jax.Array:
        """Number of positions to reveal, [B]."""
        return _leading(ranking, ranking.confidence_BR >= math.log(self.threshold))


@dataclass(frozen=True)
class Factor:
    """The largest n with (n + 1)·(1 - c_n) < factor, c_n the n-th highest exp(confidence) (Fast-dLLM, 2025).

    The more positions are revealed together, the surer the least sure of them must be. With factor = 1 the condition
    guarantees that the greedy joint choice equals the greedy product of marginals.
    """

    factor: float

    def __call__(self, ranking: Ranking) -> jax.Array:
        """Number of positions to reveal, [B]."""
        n_BR = 1 + jax.lax.broadcasted_iota(jnp.float32, ranking.confidence_BR.shape, 1)
        return _leading(ranking, (n_BR + 1) * -jnp.expm1(ranking.confidence_BR) < self.factor)


@dataclass(frozen=True)
class EntropyBound:
    """The largest n with Σ H_i - max H_i ≤ entropy_bound (EB-sampler, Ben-Hamu et al., 2025).

    The left side bounds the error of drawing the n positions independently instead of jointly.
    """

    entropy_bound: float

    def __call__(self, ranking: Ranking) -> jax.Array:
        """Number of positions to reveal, [B]."""
        total_BR = jnp.cumsum(ranking.entropy_BR, axis=1)
        largest_BR = jax.lax.cummax(ranking.entropy_BR, axis=1)
        return _leading(ranking, total_BR - largest_BR <= self.entropy_bound)


def _leading(ranking: Ranking, accepted_BR: jax.Array) -> jax.Array:
    """Length of the leading run of accepted ranks, int32 [B]; only masked positions count."""
    ranks_BR = jax.lax.broadcasted_iota(jnp.int32, accepted_BR.shape, 1)
    accepted_BR &= ranks_BR < ranking.masked_B[:, None]
    return jnp.sum(jnp.cumprod(accepted_BR, axis=1, dtype=jnp.int32), axis=1)


Reveal = Callable[[Ranking], jax.Array]
REVEALS: dict[str, Callable[..., Reveal]] = {
    "schedule": FixedSchedule,
    "threshold": Threshold,
    "factor": Factor,
    "entropy_bound": EntropyBound,
}


def make_reveal(settings: DecodeConfig) -> Reveal:
    """The strategy `settings.reveal`; its fields are taken from the settings of the same names."""
    strategy = REVEALS[settings.reveal]
    return strategy(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(strategy)})


def reveal_mask(reveal: Reveal, confidence_BQ: jax.Array, masked_BQ: jax.Array, total_B: jax.Array,
                entropy_BQ: jax.Array, step: jax.Array) -> jax.Array:
    """Positions of the active block to reveal, bool [B, Q]: masked ones, at least one where any is left."""
    # Masked positions come first even at a confidence of -inf; a stable sort gives ties to the lower position.
    order_BR = jnp.lexsort((-confidence_BQ, ~masked_BQ), axis=-1)
    masked_B = jnp.sum(masked_BQ, axis=1)
    ranking = Ranking(
        confidence_BR=jnp.take_along_axis(confidence_BQ, order_BR, axis=1),
        entropy_BR=jnp.take_along_axis(entropy_BQ, order_BR, axis=1),
        masked_B=masked_B,
        total_B=total_B,
        step=step,
    )
    count_B = jnp.clip(reveal(ranking), 1, masked_B)
    rank_BQ = jnp.argsort(order_BR, axis=1)
    return (rank_BQ < count_B[:, None]) & masked_BQ
