"""The compiled loop: one function per (batch size, canvas length, rules) that denoises block after block.

A row starts at column 0 of its canvas and is padded on the right, so that positions never shift; its next block begins
where the row ends. The three kinds of decoding differ only in the initial row:

  variable length (iLLaDA): the canvas ends after the prompt and grows by one block of masks at a time, up to limit_B;
  fixed length (LLaDA): all masks are present from the start, length_B == limit_B;
  infilling: the masks are gaps anywhere in the text, and length_B == limit_B.

In all three a block is the first `block_length` masked columns from the left. All rows denoise their blocks in
lockstep; a row that has finished its block waits for the others, frozen.

With the cache `append` a row of either length grows block by block. Before a block is opened, the finished columns that
the cache lacks are evaluated, once: they attend to what the cache holds and to each other, and are never seen again.
While the block is denoised its columns attend to the cache and to each other.

Dimensions: B rows, L canvas columns, Q columns of a block, T columns of a slice, V vocabulary.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from illada_jax.config import DecodeConfig
from illada_jax.decoding.confidence import CONFIDENCES, chosen_log_prob, negative_entropy
from illada_jax.decoding.query import CanvasSlice, LogitsFn, guided_logits, keep_columns
from illada_jax.decoding.reveal import reveal_mask
from illada_jax.decoding.sampling import RowSettings, mask_logits, predict
from illada_jax.decoding.thinking import boost_end_of_thinking
from illada_jax.model.cache import Cache


@dataclass(frozen=True)
class Rules:
    """Settings of the compiled loop, static under jit.

    Attributes:
      settings: the sampler; fields that vary by row, or have no effect, must not vary, or the loop compiles again.
      vocab_size: ids from here on are never chosen.
      suppressed_ids: ids that are never chosen, MASK among them.
      last_ids: ids that are written last.
      greedy_last_ids: more of them, in rows with a temperature of 0.
      thinking_ids: the end-of-thinking string to boost; empty: no boost.
      init_cache: `(rows, canvas length) -> empty cache`; None evaluates the whole canvas at every step. Pass the same
        object for the same network, or the loop compiles again.
      slice_length: columns that are evaluated between refreshes: the block; with a prefix cache also all later masks.
    """

    settings: DecodeConfig
    mask_id: int
    vocab_size: int
    suppressed_ids: tuple[int, ...]
    last_ids: tuple[int, ...]
    greedy_last_ids: tuple[int, ...]
    thinking_ids: tuple[int, ...]
    init_cache: Callable[[int, int], Cache] | None
    slice_length: int

    @property
    def appends(self) -> bool:
        """True with the cache `append`, which lives as long as its rows; other caches live within a block."""
        return self.settings.cache == "append"

    @property
    def passes(self) -> int:
        """Rows that the network evaluates for each row: two with guidance."""
        return 2 if self.settings.cfg_scale else 1


class Carry(NamedTuple):
    """Decoding state of a batch; between calls it lives on the host, as numpy arrays.

    Attributes:
      tokens_BL: int32 canvas; MASK in columns still to be written, PAD beyond the row's length.
      length_B: int32, columns that the network sees.
      prompt_B: int32, columns of the prompt.
      limit_B: int32, columns that the row may grow to.
      done_B: bool, finished rows and empty slots: frozen.
      keys_B2: uint32 key data, see `sampling.row_keys`.
      steps_B: int32, denoising steps that the row has taken.
      reveal_step_BL: int32, the row's step that wrote the column; -1 for the prompt and unwritten columns.
      log_prob_BL: float32 log-probability of the token when it was written; 0 elsewhere.
      settings: settings that vary by row.
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
    settings: RowSettings


class Block(NamedTuple):
    """The active block of every row.

    Attributes:
      columns_BQ: int32, distinct columns, from left to right.
      open_BQ: bool, slots that hold a column to write; False in the unused slots of a short block and in finished rows.
      slice_BT: int32, columns that are evaluated between refreshes of a cache: those of the block, then, up to the
        slice length, those of the masks beyond it. An unused slot holds the canvas length.
    """

    columns_BQ: jax.Array
    open_BQ: jax.Array
    slice_BT: jax.Array


def next_length(length_B, limit_B, block_length: int):
    """Columns that a row needs for its next block; for jax and for numpy arrays."""
    return length_B + (limit_B - length_B).clip(0, block_length)


@functools.partial(jax.jit, static_argnames=("rules",), donate_argnames=("cache",))
def run_blocks(logits_fn: LogitsFn, carry: Carry, num_blocks: jax.Array, cache: Cache | None = None, *,
               rules: Rules) -> tuple[Carry, Cache | None]:
    """Decodes until all rows are done, the canvas is full, or `num_blocks` (traced) blocks are written.

    A cache, for rules that append, holds the keys and values of each unfinished row, at least of its prompt. It stays
    on the device, and its memory is used again.
    """
    batch, canvas_length = carry.tokens_BL.shape
    chex.assert_shape([carry.reveal_step_BL, carry.log_prob_BL], (batch, canvas_length))
    chex.assert_shape([carry.length_B, carry.prompt_B, carry.limit_B, carry.done_B, carry.steps_B], (batch,))

    def has_work(state):
        carry, _, blocks = state
        fits_B = next_length(carry.length_B, carry.limit_B, rules.settings.block_length) <= canvas_length
        return (blocks < num_blocks) & ~jnp.all(carry.done_B) & jnp.all(fits_B | carry.done_B)

    def one_block(state):
        carry, cache, blocks = state
        return *decode_block(logits_fn, carry, cache, rules), blocks + 1

    return jax.lax.while_loop(has_work, one_block, (carry, cache, jnp.int32(0)))[:2]


def decode_block(logits_fn: LogitsFn, carry: Carry, kept: Cache | None, rules: Rules) -> tuple[Carry, Cache | None]:
    """Opens a block in every unfinished row, denoises it, and marks the rows that are done."""
    if rules.appends:
        kept = keep_finished(logits_fn, carry, kept, rules)
    carry, block = open_block(carry, rules)
    total_B = jnp.sum(block.open_BQ, axis=1)

    def unfinished(state):
        carry, _, _ = state
        return jnp.any(masked_slots(carry, block, rules))

    def one_step(state):
        carry, cache, step = state
        logits_BQV, cache = block_logits(logits_fn, carry, block, cache, step, rules)
        return write(carry, block, logits_BQV, total_B, step, rules), cache, step + 1

    # If the slice is the whole canvas, there is nothing to cache. Guidance evaluates two rows for each.
    rows, canvas_length = carry.tokens_BL.shape
    cache = kept
    if not rules.appends and rules.init_cache is not None and rules.slice_length < canvas_length:
        cache = rules.init_cache(rules.passes * rows, canvas_length)
    carry, cache, _ = jax.lax.while_loop(unfinished, one_step, (carry, cache, jnp.int32(0)))
    return close_block(carry, block, rules), cache if rules.appends else None


def keep_finished(logits_fn: LogitsFn, carry: Carry, cache: Cache, rules: Rules) -> Cache:
    """The cache with the last block of every unfinished row, where it lacks it."""
    def lacks_columns(cache):
        return jnp.any((cache.lengths_B[:: rules.passes] < carry.length_B) & ~carry.done_B)

    def keep(cache):
        kept_B = cache.lengths_B[:: rules.passes]
        columns_BQ = kept_B[:, None] + jnp.arange(rules.settings.block_length)[None, :]
        tokens_BQ = jnp.take_along_axis(carry.tokens_BL, columns_BQ, axis=1, mode="clip")
        end_B = jnp.where(carry.done_B, kept_B, carry.length_B)
        return keep_columns(logits_fn, cache.replace(appends=True), tokens_BQ, kept_B, end_B,
                            cfg_scale=rules.settings.cfg_scale, mask_id=rules.mask_id)

    # Once or never. A loop updates the cache in place, `lax.cond` would copy it.
    return jax.lax.while_loop(lacks_columns, keep, cache)


def open_block(carry: Carry, rules: Rules) -> tuple[Carry, Block]:
    """Appends masks up to the row's limit, at most a block, and finds the first masked columns of each row."""
    columns_BL = jax.lax.broadcasted_iota(jnp.int32, carry.tokens_BL.shape, 1)
    grown_B = jnp.where(carry.done_B, carry.length_B,
                        next_length(carry.length_B, carry.limit_B, rules.settings.block_length))
    new_BL = (columns_BL >= carry.length_B[:, None]) & (columns_BL < grown_B[:, None])
    tokens_BL = jnp.where(new_BL, rules.mask_id, carry.tokens_BL)
    masked_BL = (tokens_BL == rules.mask_id) & ~carry.done_B[:, None]
    masked_first_BL = jnp.argsort(~masked_BL, axis=1, stable=True).astype(jnp.int32)
    slice_BT = masked_first_BL[:, : rules.slice_length]
    slice_BT = jnp.where(jnp.take_along_axis(masked_BL, slice_BT, axis=1), slice_BT, carry.tokens_BL.shape[1])
    columns_BQ = masked_first_BL[:, : rules.settings.block_length]
    open_BQ = jnp.take_along_axis(masked_BL, columns_BQ, axis=1)
    return carry._replace(tokens_BL=tokens_BL, length_B=grown_B), Block(columns_BQ, open_BQ, slice_BT)


def masked_slots(carry: Carry, block: Block, rules: Rules) -> jax.Array:
    """Slots of the block that are masked, bool [B, Q]."""
    return block.open_BQ & (jnp.take_along_axis(carry.tokens_BL, block.columns_BQ, axis=1) == rules.mask_id)


def block_logits(logits_fn: LogitsFn, carry: Carry, block: Block, cache: Cache | None, step: jax.Array,
                 rules: Rules) -> tuple[jax.Array, Cache | None]:
    """Logits of the active block, float32 [B, Q, V], and the cache.

    The whole canvas is evaluated, or, with a cache and not at its refreshes, the block's slice of it.
    """
    query = functools.partial(guided_logits, logits_fn, cfg_scale=rules.settings.cfg_scale, mask_id=rules.mask_id)

    def from_canvas(cache):
        columns_BL = jax.lax.broadcasted_iota(jnp.int32, carry.tokens_BL.shape, 1)
        segments_BL = (columns_BL < carry.length_B[:, None]).astype(jnp.int32)
        given_BL = _given(carry.reveal_step_BL, columns_BL, block, rules)
        return query(CanvasSlice(carry.tokens_BL, columns_BL, segments_BL, given_BL), block.columns_BQ, cache)

    def from_slice(cache):
        tokens_BT, reveal_step_BT = (jnp.take_along_axis(canvas_BL, block.slice_BT, axis=1, mode="clip")
                                     for canvas_BL in (carry.tokens_BL, carry.reveal_step_BL))
        segments_BT = (block.slice_BT < carry.tokens_BL.shape[1]).astype(jnp.int32)
        query_columns_BQ = jax.lax.broadcasted_iota(jnp.int32, block.columns_BQ.shape, 1)
        given_BT = _given(reveal_step_BT, block.slice_BT, block, rules)
        return query(CanvasSlice(tokens_BT, block.slice_BT, segments_BT, given_BT), query_columns_BQ, cache)

    if cache is None:
        return from_canvas(None)
    if rules.appends:
        return from_slice(cache)
    refresh = step % rules.settings.cache_refresh == 0 if rules.settings.cache_refresh else step == 0
    return jax.lax.cond(refresh, lambda cache: from_canvas(cache.replace(writes=True)), from_slice, cache)


def _given(reveal_step_BT: jax.Array, columns_BT: jax.Array, block: Block, rules: Rules) -> jax.Array:
    """Tokens that guidance hides, bool [B, T]: the prompt; with variable length also the finished blocks.

    iLLaDA's released sampler calls LLaDA's for each block, with all that precedes the block as the prompt.
    """
    if rules.settings.length == "variable":
        return columns_BT < block.columns_BQ[:, :1]
    return reveal_step_BT < 0


def write(carry: Carry, block: Block, logits_BQV: jax.Array, total_B: jax.Array, step: jax.Array,
          rules: Rules) -> Carry:
    """Predicts a token for every masked slot and writes the most confident ones."""
    masked_BQ = masked_slots(carry, block, rules)
    settings = rules.settings
    if rules.thinking_ids:
        logits_BQV = boost_end_of_thinking(settings, rules.thinking_ids, logits_BQV, carry.tokens_BL, carry.prompt_B,
                                           carry.limit_B, block.columns_BQ, masked_BQ)
    logits_BQV = mask_logits(logits_BQV, rules.suppressed_ids, rules.vocab_size)
    prediction = predict(logits_BQV, carry.settings, rules.last_ids, rules.greedy_last_ids, carry.keys_B2,
                         carry.steps_B)
    confidence_BQ, entropy_BQ = CONFIDENCES[settings.confidence](prediction), -negative_entropy(prediction)
    reveal_BQ = reveal_mask(settings, confidence_BQ, masked_BQ, total_B, entropy_BQ, carry.settings.log_threshold_B,
                            step)

    def scatter(canvas_BL, new_BQ):
        old_BQ = jnp.take_along_axis(canvas_BL, block.columns_BQ, axis=1)
        rows_B1 = jnp.arange(len(canvas_BL))[:, None]
        return canvas_BL.at[rows_B1, block.columns_BQ].set(jnp.where(reveal_BQ, new_BQ, old_BQ))

    return carry._replace(
        tokens_BL=scatter(carry.tokens_BL, prediction.tokens_BQ),
        reveal_step_BL=scatter(carry.reveal_step_BL, carry.steps_B[:, None]),
        log_prob_BL=scatter(carry.log_prob_BL, chosen_log_prob(prediction)),
        steps_B=carry.steps_B + jnp.any(masked_BQ, axis=1),
    )


def close_block(carry: Carry, block: Block, rules: Rules) -> Carry:
    """Marks rows as done whose block holds a stop id or that have nothing left to write."""
    tokens_BQ = jnp.take_along_axis(carry.tokens_BL, block.columns_BQ, axis=1)
    stopped_BQ = block.open_BQ & jnp.any(tokens_BQ[:, :, None] == carry.settings.stop_ids_BI[:, None, :], axis=-1)
    # Padding is PAD, so a MASK anywhere on the canvas is still to be written.
    exhausted_B = (carry.length_B >= carry.limit_B) & ~jnp.any(carry.tokens_BL == rules.mask_id, axis=1)
    return carry._replace(done_B=carry.done_B | jnp.any(stopped_BQ, axis=1) | exhausted_B)
