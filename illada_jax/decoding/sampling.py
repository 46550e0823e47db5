"""From logits to a token for every position of the active block: what may be chosen, and the noise of the choice."""

import enum
import math

import jax
import jax.numpy as jnp

from illada_jax.decoding.confidence import Guess, log_probs


class Draw(enum.IntEnum):
    """What a key of the decoder is for. The numbers are part of what a seed means: never renumber."""

    TOKEN = 0
    ORDER = 1


def row_keys(seed: int, rows: jax.Array) -> jax.Array:
    """Key data uint32 [B, 2] of the given rows: a row draws by the seed and its number, not by its batch."""
    fold_in = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return jax.random.key_data(fold_in(jax.random.key(seed), rows))


def step_keys(keys_B2: jax.Array, draw: Draw, steps_B: jax.Array) -> jax.Array:
    """Typed keys [B] of (row, the row's step, draw)."""
    return jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(keys_B2), steps_B * len(Draw) + int(draw))


def suppress(logits_BQV: jax.Array, vocab_size: int, suppressed: tuple[int, ...]) -> jax.Array:
    """Sets the logits of ids beyond the tokenizer and of the given ids to -inf."""
    ids_BQV = jax.lax.broadcasted_iota(jnp.int32, logits_BQV.shape, 2)
    never_BQV = ids_BQV >= vocab_size
    for id_ in suppressed:
        never_BQV |= ids_BQV == id_
    return jnp.where(never_BQV, -jnp.inf, logits_BQV)


def choose(logits_BQV: jax.Array, temperature: float, keys_B: jax.Array) -> jax.Array:
    """A token for each position, int32 [B, Q]: the argmax, or a sample of softmax(logits / temperature).

    The sample is argmax(logits / temperature + Gumbel noise). The noise is float32 in JAX's high-range mode: its upper
    tail reaches down to probabilities of 1e-38, where the usual float32 noise ends at 1e-7, which acts like a lower
    temperature (the published code draws in float64 for that reason).
    """
    if temperature > 0:
        shape_QV = logits_BQV.shape[1:]
        # Drawn flat: XLA's CPU compiler takes ten times as long over the same draw in more dimensions.
        gumbel = jax.vmap(lambda key: jax.random.gumbel(key, (math.prod(shape_QV),), mode="high").reshape(shape_QV))
        logits_BQV = logits_BQV / temperature + gumbel(keys_B)
    return jnp.argmax(logits_BQV, axis=-1).astype(jnp.int32)


def guess(logits_BQV: jax.Array, temperature: float, keys_B2: jax.Array, steps_B: jax.Array) -> Guess:
    """Chooses a token for each position and keeps what the confidences need. Logits are those after `suppress`."""
    uniform = jax.vmap(lambda key: jax.random.uniform(key, logits_BQV.shape[1:2]))
    return Guess(
        tokens_BQ=choose(logits_BQV, temperature, step_keys(keys_B2, Draw.TOKEN, steps_B)),
        log_probs_BQV=log_probs(logits_BQV),
        uniform_BQ=uniform(step_keys(keys_B2, Draw.ORDER, steps_B)),
    )
