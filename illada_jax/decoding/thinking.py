"""The end-of-thinking boost, which ends the reasoning before the budget is used up (iLLaDA paper)."""

import jax
import jax.numpy as jnp

from illada_jax.config import DecodeConfig


def boost_end_of_thinking(settings: DecodeConfig, ids: tuple[int, ...], logits_BQV: jax.Array, tokens_BL: jax.Array,
                          prompt_B: jax.Array, limit_B: jax.Array, columns_BQ: jax.Array,
                          masked_BQ: jax.Array) -> jax.Array:
    """Adds boost · progress^power to the logit of the next token of the end-of-thinking string.

    It applies at the first masked position of the active block, until the row has generated the string. progress is
    (position - prompt length + 1) / budget, clipped to [0, 1]. The next token continues the longest prefix of the
    string that the generated text before the position ends with.

    The string is `ids`; for the arrays see `loop.Carry` and `loop.Block`. masked_BQ is True in masked columns.
    """
    slot_B = jnp.argmax(masked_BQ, axis=1)
    column_B = jnp.take_along_axis(columns_BQ, slot_B[:, None], axis=1)[:, 0]
    progress_B = ((column_B - prompt_B + 1) / jnp.maximum(limit_B - prompt_B, 1)).clip(0, 1)
    boost_B = settings.end_of_thinking_boost * progress_B**settings.end_of_thinking_power
    boost_B = jnp.where(_generated(ids, tokens_BL, prompt_B), 0.0, boost_B)
    next_B = _next_id(ids, tokens_BL, prompt_B, column_B)
    at_slot_BQ = masked_BQ & (jnp.arange(masked_BQ.shape[1])[None, :] == slot_B[:, None])
    at_id_BV = jnp.arange(logits_BQV.shape[-1])[None, :] == next_B[:, None]
    return logits_BQV + jnp.where(at_slot_BQ[:, :, None] & at_id_BV[:, None, :], boost_B[:, None, None], 0.0)


def _generated(ids: tuple[int, ...], tokens_BL: jax.Array, prompt_B: jax.Array) -> jax.Array:
    """True where the generated text contains the whole string, bool [B]."""
    starts_BL = jax.lax.broadcasted_iota(jnp.int32, tokens_BL.shape, 1) >= prompt_B[:, None]
    for offset, id_ in enumerate(ids):
        starts_BL &= jnp.pad(tokens_BL[:, offset:], ((0, 0), (0, offset)), constant_values=-1) == id_
    return jnp.any(starts_BL, axis=1)


def _next_id(ids: tuple[int, ...], tokens_BL: jax.Array, prompt_B: jax.Array, column_B: jax.Array) -> jax.Array:
    """The id that continues the string at the column, int32 [B]."""
    next_B = jnp.full_like(column_B, ids[0])
    for length in range(1, len(ids)):
        matches_B = column_B - length >= prompt_B
        for offset, id_ in enumerate(ids[:length]):
            before_B1 = jnp.maximum(column_B - length + offset, 0)[:, None]
            matches_B &= jnp.take_along_axis(tokens_BL, before_B1, axis=1)[:, 0] == id_
        next_B = jnp.where(matches_B, ids[length], next_B)
    return next_B
