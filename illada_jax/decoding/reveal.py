"""How many positions a step reveals.

Every strategy reveals the surest positions first, so all it decides is how many. A strategy is a frozen dataclass
(hence static under jit) that maps a `Ranking` to int32 [B]; the loop reveals at least one position of an unfinished
block, whatever the answer, so that decoding always ends. To add one, write it here and enter it in REVEALS with a
function that makes it from the settings; its name is what `config.decode.reveal` takes.
"""

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
class TopK:
    """A fixed number per step: total // steps, and one more in the first total % steps steps (LLaDA's schedule)."""

    steps: int

    def __call__(self, ranking: Ranking) -> jax.Array:
        """Number of positions to reveal, [B]."""
        return ranking.total_B // self.steps + (ranking.step < ranking.total_B % self.steps)


Reveal = Callable[[Ranking], jax.Array]
REVEALS: dict[str, Callable[[DecodeConfig], Reveal]] = {"top_k": lambda s: TopK(s.steps_per_block)}


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
