"""How many positions a step reveals.

Every strategy reveals the surest positions first, so all it decides is how many. A strategy is a frozen dataclass
(hence static under jit) that maps a `Ranking` to int32 [B]; the loop reveals at least one position of an unfinished
block, whatever the answer, so that decoding always ends. To add one, write it here and enter it in REVEALS with a
function that makes it from the settings; its name is what `config.decode.reveal` takes.
"""

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
      confidence_BR: float32, see `confidence.py`; rank 0 is the surest. Ranks from masked_B on mean nothing.
      entropy_BR: float32 entropy of each position's distribution in nats, in the same order.
      masked_B: int32, masked positions now.
      total_B: int32, masked positions when the block was opened.
      step: int32 scalar, steps that the block has had.
    """

    confidence_BR: jax.Array
    entropy_BR: jax.Array
    masked_B: jax.Array
    total_B: jax.Array
    step: jax.Array


@dataclass(frozen=True)
class FixedSchedule:
    """A fixed number per step: total // steps, and one more in the first total % steps steps (LLaDA's schedule)."""

    steps: int

    def __call__(self, ranking: Ranking) -> jax.Array:
        """Number of positions to reveal, [B]."""
        return ranking.total_B // self.steps + (ranking.step < ranking.total_B % self.steps)


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

    The more positions are revealed together, the surer the least sure of them must be: under that condition with
    factor = 1 the greedy joint choice equals the greedy product of marginals.
    """

    factor: float

    def __call__(self, ranking: Ranking) -> jax.Array:
        """Number of positions to reveal, [B]."""
        n_BR = 1 + jax.lax.broadcasted_iota(jnp.float32, ranking.confidence_BR.shape, 1)
        return _leading(ranking, (n_BR + 1) * -jnp.expm1(ranking.confidence_BR) < self.factor)


@dataclass(frozen=True)
class EntropyBound:
    """The largest n whose summed entropy less the largest one is at most the bound (EB-sampler, Ben-Hamu et al., 2025).

    Σ H_i - max H_i bounds what is lost by drawing the n positions independently instead of jointly.
    """

    bound: float

    def __call__(self, ranking: Ranking) -> jax.Array:
        """Number of positions to reveal, [B]."""
        total_BR = jnp.cumsum(ranking.entropy_BR, axis=1)
        largest_BR = jax.lax.cummax(ranking.entropy_BR, axis=1)
        return _leading(ranking, total_BR - largest_BR <= self.bound)


def _leading(ranking: Ranking, accepted_BR: jax.Array) -> jax.Array:
    """How many ranks from the first on are accepted without a gap; only masked positions count."""
    ranks_BR = jax.lax.broadcasted_iota(jnp.int32, accepted_BR.shape, 1)
    accepted_BR &= ranks_BR < ranking.masked_B[:, None]
    return jnp.sum(jnp.cumprod(accepted_BR, axis=1, dtype=jnp.int32), axis=1)


Reveal = Callable[[Ranking], jax.Array]
REVEALS: dict[str, Callable[[DecodeConfig], Reveal]] = {
    "schedule": lambda settings: FixedSchedule(settings.steps_per_block),
    "threshold": lambda settings: Threshold(settings.threshold),
    "factor": lambda settings: Factor(settings.factor),
    "entropy_bound": lambda settings: EntropyBound(settings.entropy_bound),
}


def reveal_mask(reveal: Reveal, confidence_BQ: jax.Array, masked_BQ: jax.Array, total_B: jax.Array,
                entropy_BQ: jax.Array, step: jax.Array) -> jax.Array:
    """Which positions of the active block to reveal, bool [B, Q]: masked ones, at least one if there is any."""
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
