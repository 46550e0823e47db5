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
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from illada_jax.decoding.confidence import Confidence, chosen_log_prob, entropy
from illada_jax.decoding.contract import LogitsFn
from illada_jax.decoding.reveal import Reveal, reveal_mask
from illada_jax.decoding.sampling import guess, suppress


@dataclass(frozen=True)
class Rules:
    """What is fixed when the loop is compiled, see DecodeConfig for the meaning of the settings.

    Attributes:
      block_length: Q.
      reveal: how many positions a step reveals.
      confidence: the order in which they are revealed.
      temperature: of the choice of tokens.
      mask_id: the id that stands for a position still to be written.
      vocab_size: ids from here on are never chosen.
      suppressed_ids: ids that are never chosen.
      stop_ids: a row is done after the first block that contains one of them.
    """

    block_length: int
    reveal: Reveal
    confidence: Confidence
    temperature: float
    mask_id: int
    vocab_size: int
    suppressed_ids: tuple[int, ...]
    stop_ids: tuple[int, ...]


class Carry(NamedTuple):
    """All that is known of the rows of a batch. Between calls it lives on the host, as numpy arrays.

    Attributes:
      tokens_BL: int32 canvas; MASK where a token is still to be written.
      length_B: int32, columns that the network sees; the rest is padding.
      limit_B: int32, columns that the row may grow to.
      done_B: bool, finished rows (and empty slots): nothing of them changes any more.
      keys_B2: uint32 key data, see `sampling.row_keys`.
      steps_B: int32, denoising steps that the row has had.
      reveal_step_BL: int32, the row's step at which the column was written; -1 for the prompt and unwritten columns.
      log_prob_BL: float32 log-probability that the token had when it was written; 0 elsewhere.
    """

    tokens_BL: jax.Array
    length_B: jax.Array
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
    """

    columns_BQ: jax.Array
    open_BQ: jax.Array


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
        carry, _ = state
        return jnp.any(masked_slots(carry, block, rules))

    def one_step(state):
        carry, step = state
        return denoise(logits_fn, carry, block, total_B, step, rules), step + 1

    carry, _ = jax.lax.while_loop(unfinished, one_step, (carry, jnp.int32(0)))
    return close_block(carry, block, rules)


def open_block(carry: Carry, rules: Rules) -> tuple[Carry, Block]:
    """Lets rows grow by a block of masks where their limit allows it, and finds the first masked columns of each."""
    columns_BL = jax.lax.broadcasted_iota(jnp.int32, carry.tokens_BL.shape, 1)
    grown_B = jnp.where(carry.done_B, carry.length_B,
                        next_length(carry.length_B, carry.limit_B, rules.block_length))
    new_BL = (columns_BL >= carry.length_B[:, None]) & (columns_BL < grown_B[:, None])
    tokens_BL = jnp.where(new_BL, rules.mask_id, carry.tokens_BL)
    masked_BL = (tokens_BL == rules.mask_id) & ~carry.done_B[:, None]
    columns_BQ = jnp.argsort(~masked_BL, axis=1, stable=True)[:, : rules.block_length].astype(jnp.int32)
    open_BQ = jnp.take_along_axis(masked_BL, columns_BQ, axis=1)
    return carry._replace(tokens_BL=tokens_BL, length_B=grown_B), Block(columns_BQ, open_BQ)


def masked_slots(carry: Carry, block: Block, rules: Rules) -> jax.Array:
    """Slots of the block that are still masked, bool [B, Q]."""
    return block.open_BQ & (jnp.take_along_axis(carry.tokens_BL, block.columns_BQ, axis=1) == rules.mask_id)


def denoise(logits_fn: LogitsFn, carry: Carry, block: Block, total_B: jax.Array, step: jax.Array,
            rules: Rules) -> Carry:
    """One step: the network looks at the canvas, every masked slot gets a token, and the surest are written."""
    positions_BL = jax.lax.broadcasted_iota(jnp.int32, carry.tokens_BL.shape, 1)
    segments_BL = (positions_BL < carry.length_B[:, None]).astype(jnp.int32)
    logits_BQV, _ = logits_fn(carry.tokens_BL, positions_BL, segments_BL, block.columns_BQ, None)
    logits_BQV = suppress(logits_BQV, rules.vocab_size, (rules.mask_id, *rules.suppressed_ids))

    guessed = guess(logits_BQV, rules.temperature, carry.keys_B2, carry.steps_B)
    masked_BQ = masked_slots(carry, block, rules)
    reveal_BQ = reveal_mask(rules.reveal, rules.confidence(guessed), masked_BQ, total_B, entropy(guessed), step)

    def write(canvas_BL, values_BQ):
        old_BQ = jnp.take_along_axis(canvas_BL, block.columns_BQ, axis=1)
        new_BQ = jnp.where(reveal_BQ, values_BQ, old_BQ)
        return canvas_BL.at[jnp.arange(len(canvas_BL))[:, None], block.columns_BQ].set(new_BQ)

    return carry._replace(
        tokens_BL=write(carry.tokens_BL, guessed.tokens_BQ),
        reveal_step_BL=write(carry.reveal_step_BL, carry.steps_B[:, None]),
        log_prob_BL=write(carry.log_prob_BL, chosen_log_prob(guessed)),
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
