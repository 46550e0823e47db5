"""Random keys, each folded from the seed, a purpose, a step and a row, and never reused."""

import enum

import jax


class Purpose(enum.IntEnum):
    """The purpose of a key. The numbers determine a run's randomness: never renumber them."""

    PARAMS = 0
    CORRUPTION = 1
    EVALUATION = 2
    SCORING = 3


def key_for(seed: int, purpose: Purpose, step: int | jax.Array = 0) -> jax.Array:
    """The key of (seed, purpose, step); code that draws per row folds the row in."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), int(purpose)), step)
