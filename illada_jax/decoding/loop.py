"""The compiled loop: one function per (batch, canvas bucket, rules) that denoises block after block.

A row starts at column 0 of its canvas, with padding on its right, so that its positions never shift; its next block
begins where the row ends. The three ways of decoding differ only in how a row starts:

  variable length (iLLaDA): the canvas ends after the prompt and grows by one block of masks at a time, up to limit_B;
  fixed length (LLaDA): all masks are there from the start, length_B == limit_B;
  infilling: the masks are gaps, wherever they are, and length_B == limit_B.

In all three a block is the first `block_length` masked columns from the left. All rows work on their block in step; a
row that has finished its block waits for the others, frozen.

Dimensions: B rows, L canvas columns, Q columns of a block, V vocabulary.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from illada_jax.decoding.confidence import Confidence, chosen_log_prob, entropy
from illada_jax.decoding.query import LogitsFn
from illada_jax.decoding.reveal import Reveal, reveal_mask
from illada_jax.decoding.sampling import classifier_free_guidance, mask_logits, predict
from illada_jax.decoding.thinking import ThinkingBoost


@dataclass(frozen=True)
class Rules:
    """What is fixed when the loop is compiled, see DecodeConfig for the meaning of the settings.

    Attributes:
      block_length: Q.
      reveal: how many positions a step reveals.
      confidence: the order in which they are revealed.
      temperature: of the choice of tokens.
      top_p: of the choice of tokens.
      cfg_scale: classifier-free guidance.
      mask_id: the id that stands for a position still to be written.
      vocab_size: ids from here on are never chosen.
      suppressed_ids: ids that are never chosen.
      last_ids: ids that are written last.
      stop_ids: a row is done after the first block that contains one of them.
      boost: end-of-thinking boost, or None.
      init_cache: maps (rows, canvas length) to an empty cache of the network; None computes the whole canvas at every
        step. Always the same object for the same network, or the loop compiles again.
      cache_refresh: steps between refreshes within a block; 0 refreshes at its start only.
      slice_length: columns that are computed between refreshes: a block, or also the masks beyond it.
    """

    block_length: int
    reveal: Reveal
    confidence: Confidence
    temperature: float
    top_p: float
    cfg_scale: float
    mask_id: int
    vocab_size: int
    suppressed_ids: tuple[int, ...]
    last_ids: tuple[int, ...]
    stop_ids: tuple[int, ...]
    boost: ThinkingBoost | None
    init_cache: Callable[[int, int], Any] | None
    cache_refresh: int
    slice_length: int


class Carry(NamedTuple):
    """All that is known of the rows of a batch. Between calls it lives on the host, as numpy arrays.

    Attributes:
      tokens_BL: int32 canvas; MASK where a token is still to be written.
      length_B: int32, columns that the network sees; the rest is padding.
      prompt_B: int32, columns of the prompt.
      limit_B: int32, columns that the row may grow to.
      done_B: bool, finished rows (and empty slots): nothing of them changes any more.
      keys_B2: uint32 key data, see `sampling.row_keys`.
      steps_B: int32, denoising steps that the row has had.
      reveal_step_BL: int32, the row's step at which the column was written; -1 for the prompt and unwritten columns.
      log_prob_BL: float32 log-probability that the token had when it was written; 0 elsewhere.
    """

    tokens_BL: jax.Array
    length_B: jax.Array
    prompt_B: jax.Array
    limit_B: jax.Array
    done_B: jax.Array
    keys_B2: jax.Array
    steps_B: jax.Array
    reveal_step_BL: jax.Array
    log_prob_BL: jax.Array


class Block(NamedTuple):
    """The active block of every row: its columns, and which of its slots are columns to write at all.

    Attributes:
      columns_BQ: int32, distinct columns of a row, from left to right.
      open_BQ: bool, False in slots that a block does not fill (the last one of a row) and in finished rows.
      slice_BT: int32, columns that are computed between refreshes of a cache: first those of the block, then, where
        masks lie beyond it and are not cached, those of the masks. An unused slot holds the canvas length.
    """

    columns_BQ: jax.Array
    open_BQ: jax.Array
    slice_BT: jax.Array


def next_length(length_B, limit_B, block_length: int):
    """Columns that a row needs for its next block: jax or numpy arrays in, the same out."""
    return length_B + (limit_B - length_B).clip(0, block_length)


@functools.partial(jax.jit, static_argnames=("rules",))
def run_blocks(logits_fn: LogitsFn, carry: Carry, num_blocks: jax.Array, *, rules: Rules) -> Carry:
    """Decodes until all rows are done, the canvas is full, or `num_blocks` (traced) blocks are written."""
    canvas_length = carry.tokens_BL.shape[1]

    def going(state):
        carry, blocks = state
        fits_B = next_length(carry.length_B, carry.limit_B, rules.block_length) <= canvas_length
        return (blocks < num_blocks) & ~jnp.all(carry.done_B) & jnp.all(fits_B | carry.done_B)

    def one_block(state):
        carry, blocks = state
        return decode_block(logits_fn, carry, rules), blocks + 1

    return jax.lax.while_loop(going, one_block, (carry, jnp.int32(0)))[0]


def decode_block(logits_fn: LogitsFn, carry: Carry, rules: Rules) -> Carry:
    """Opens a block in every unfinished row, denoises it completely, and marks the rows that are done with it."""
    carry, block = open_block(carry, rules)
    total_B = jnp.sum(block.open_BQ, axis=1)

    def unfinished(state):
        carry, _, _ = state
        return jnp.any(masked_slots(carry, block, rules))

    def one_step(state):
        carry, cache, step = state
        logits_BQV, cache = look(logits_fn, carry, block, cache, step, rules)
        return write(carry, block, logits_BQV, total_B, step, rules), cache, step + 1

    state = (carry, empty_cache(carry, rules), jnp.int32(0))
    carry, _, _ = jax.lax.while_loop(unfinished, one_step, state)
    return close_block(carry, block, rules)


def open_block(carry: Carry, rules: Rules) -> tuple[Carry, Block]:
    """Lets rows grow by a block of masks where their limit allows it, and finds the first masked columns of each."""
    columns_BL = jax.lax.broadcasted_iota(jnp.int32, carry.tokens_BL.shape, 1)
    grown_B = jnp.where(carry.done_B, carry.length_B,
                        next_length(carry.length_B, carry.limit_B, rules.block_length))
    new_BL = (columns_BL >= carry.length_B[:, None]) & (columns_BL < grown_B[:, None])
    tokens_BL = jnp.where(new_BL, rules.mask_id, carry.tokens_BL)
    masked_BL = (tokens_BL == rules.mask_id) & ~carry.done_B[:, None]
    masked_first_BL = jnp.argsort(~masked_BL, axis=1, stable=True).astype(jnp.int32)
    slice_BT = masked_first_BL[:, : rules.slice_length]
    slice_BT = jnp.where(jnp.take_along_axis(masked_BL, slice_BT, axis=1), slice_BT, carry.tokens_BL.shape[1])
    columns_BQ = masked_first_BL[:, : rules.block_length]
    open_BQ = jnp.take_along_axis(masked_BL, columns_BQ, axis=1)
    return carry._replace(tokens_BL=tokens_BL, length_B=grown_B), Block(columns_BQ, open_BQ, slice_BT)


def masked_slots(carry: Carry, block: Block, rules: Rules) -> jax.Array:
    """Slots of the block that are still masked, bool [B, Q]."""
    return block.open_BQ & (jnp.take_along_axis(carry.tokens_BL, block.columns_BQ, axis=1) == rules.mask_id)


def uses_cache(canvas_length: int, rules: Rules) -> bool:
    """A slice as long as the canvas is the canvas: nothing is left to be cached."""
    return rules.init_cache is not None and rules.slice_length < canvas_length


def empty_cache(carry: Carry, rules: Rules) -> Any:
    """A cache for the rows (twice as many under guidance), or None."""
    rows, canvas_length = carry.tokens_BL.shape
    if not uses_cache(canvas_length, rules):
        return None
    return rules.init_cache(2 * rows if rules.cfg_scale else rows, canvas_length)


def look(logits_fn: LogitsFn, carry: Carry, block: Block, cache: Any, step: jax.Array,
         rules: Rules) -> tuple[jax.Array, Any]:
    """Logits of the active block, float32 [B, Q, V], from the whole canvas or from a slice of it, and the cache."""
    columns_BL = jax.lax.broadcasted_iota(jnp.int32, carry.tokens_BL.shape, 1)
    segments_BL = (columns_BL < carry.length_B[:, None]).astype(jnp.int32)

    def whole(cache):
        return guided(logits_fn, carry, carry.tokens_BL, columns_BL, segments_BL, block.columns_BQ, cache, rules)

    def part(cache):
        tokens_BT = jnp.take_along_axis(carry.tokens_BL, block.slice_BT, axis=1, mode="clip")
        segments_BT = (block.slice_BT < carry.tokens_BL.shape[1]).astype(jnp.int32)
        query_columns_BQ = jax.lax.broadcasted_iota(jnp.int32, block.columns_BQ.shape, 1)
        return guided(logits_fn, carry, tokens_BT, block.slice_BT, segments_BT, query_columns_BQ, cache, rules)

    if not uses_cache(carry.tokens_BL.shape[1], rules):
        return whole(None)
    refresh = step % rules.cache_refresh == 0 if rules.cache_refresh else step == 0
    return jax.lax.cond(refresh, whole, part, cache)


def guided(logits_fn: LogitsFn, carry: Carry, tokens_BT: jax.Array, columns_BT: jax.Array, segments_BT: jax.Array,
           query_columns_BQ: jax.Array, cache: Any, rules: Rules) -> tuple[jax.Array, Any]:
    """The network's logits, guided where that is wanted."""
    if not rules.cfg_scale:
        return logits_fn(tokens_BT, columns_BT, segments_BT, query_columns_BQ, cache)
    given_BT = jnp.take_along_axis(carry.reveal_step_BL, columns_BT, axis=1, mode="clip") < 0
    uncond_BT = jnp.where(given_BT & (segments_BT > 0), rules.mask_id, tokens_BT)

    def twice(x):
        return jnp.concatenate([x, x])

    logits, cache = logits_fn(jnp.concatenate([tokens_BT, uncond_BT]), twice(columns_BT), twice(segments_BT),
                              twice(query_columns_BQ), cache)
    cond_BQV, uncond_BQV = jnp.split(logits, 2)
    return classifier_free_guidance(cond_BQV, uncond_BQV, rules.cfg_scale), cache


def write(carry: Carry, block: Block, logits_BQV: jax.Array, total_B: jax.Array, step: jax.Array,
          rules: Rules) -> Carry:
    """Every masked slot gets a token from its logits, and the surest are written."""
    masked_BQ = masked_slots(carry, block, rules)
    if rules.boost:
        logits_BQV = rules.boost(logits_BQV, carry.tokens_BL, carry.prompt_B, carry.limit_B, block.columns_BQ,
                                 masked_BQ)
    logits_BQV = mask_logits(logits_BQV, (rules.mask_id, *rules.suppressed_ids), rules.vocab_size)
    prediction = predict(logits_BQV, rules.temperature, rules.top_p, rules.last_ids, carry.keys_B2, carry.steps_B)
    reveal_BQ = reveal_mask(rules.reveal, rules.confidence(prediction), masked_BQ, total_B, entropy(prediction), step)

    def put(canvas_BL, values_BQ):
        old_BQ = jnp.take_along_axis(canvas_BL, block.columns_BQ, axis=1)
        new_BQ = jnp.where(reveal_BQ, values_BQ, old_BQ)
        return canvas_BL.at[jnp.arange(len(canvas_BL))[:, None], block.columns_BQ].set(new_BQ)

    return carry._replace(
        tokens_BL=put(carry.tokens_BL, prediction.tokens_BQ),
        reveal_step_BL=put(carry.reveal_step_BL, carry.steps_B[:, None]),
        log_prob_BL=put(carry.log_prob_BL, chosen_log_prob(prediction)),
        steps_B=carry.steps_B + jnp.any(masked_BQ, axis=1),
    )


def close_block(carry: Carry, block: Block, rules: Rules) -> Carry:
    """A row is done when its block holds a stop id, or when nothing is left to write."""
    tokens_BQ = jnp.take_along_axis(carry.tokens_BL, block.columns_BQ, axis=1)
    stopped_BQ = jnp.zeros_like(block.open_BQ)
    for id_ in rules.stop_ids:
        stopped_BQ |= block.open_BQ & (tokens_BQ == id_)
    # Padding is PAD, so a MASK anywhere on the canvas is still to be written.
    exhausted_B = (carry.length_B >= carry.limit_B) & ~jnp.any(carry.tokens_BL == rules.mask_id, axis=1)
    return carry._replace(done_B=carry.done_B | jnp.any(stopped_BQ, axis=1) | exhausted_B)
