"""Where random numbers come from: every key is folded from the seed, a purpose, a step and a row, never reused."""

import enum

import jax


class Purpose(enum.IntEnum):
    """What a key is for. The numbers are part of the format of a run: never renumber."""

    PARAMS = 0
    CORRUPTION = 1
    EVALUATION = 2
    SCORING = 3


def key_for(seed: int, purpose: Purpose, step: int | jax.Array = 0) -> jax.Array:
    """The key of (seed, purpose, step); rows are folded in by whoever draws for rows."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), int(purpose)), step)
