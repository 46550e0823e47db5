"""The host's side of decoding: many prompts through a few compiled shapes, results in the order of the prompts."""

import collections
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from illada_jax.config import DecodeConfig
from illada_jax.decoding.confidence import CONFIDENCES
from illada_jax.decoding.loop import Carry, Rules, next_length, run_blocks
from illada_jax.decoding.query import LogitsFn, SpecialIds
from illada_jax.decoding.reveal import REVEALS
from illada_jax.decoding.sampling import row_keys
from illada_jax.decoding.thinking import ThinkingBoost
from illada_jax.errors import ConfigError, InputError
from illada_jax.parallel.hosts import fetch
from illada_jax.parallel.mesh import use_mesh
from illada_jax.parallel.sharding import batch_sharding, replicated

UNLIMITED = np.int32(2**30)

InitCache = Callable[[int, int], Any]


@dataclass(frozen=True)
class Decoded:
    """What became of one prompt.

    Attributes:
      tokens: `generate`: the new tokens, up to and without the stop id. `infill`: all tokens, gaps filled.
      nfe: network evaluations that the row took part in.
      stopped_by: `eos`, `stop_id`, `callback` (the caller's on_block), `length` (the budget), or `filled` (infilling).
      reveal_step: for each of the tokens, the step at which it was written; -1 for what was given.
      confidence: for each of the tokens, its log-probability when it was written; 0 for what was given.
      canvas: the whole row at the end: what was given, what was written, also behind the end of the answer.
      canvas_step: for each id of the canvas, the step at which it was written; -1 for what was given or never written.
    """

    tokens: list[int]
    nfe: int
    stopped_by: str
    reveal_step: list[int]
    confidence: list[float]
    canvas: list[int]
    canvas_step: list[int]


OnBlock = Callable[[int, Decoded], bool | None]


@dataclass(frozen=True)
class Row:
    """A prompt on its way into the batch.

    Attributes:
      index: where its result belongs.
      tokens: the canvas at the start, MASK where something is to be written.
      start: the first column of the result: behind the prompt, or 0 in infilling.
      limit: columns that the row may grow to.
      ends_by: what `Decoded.stopped_by` says when everything is written.
    """

    index: int
    tokens: list[int]
    start: int
    limit: int
    ends_by: str


def canvas_buckets(max_length: int) -> tuple[int, ...]:
    """Canvas lengths that are compiled: 64, 96, 128, 192, 256, … and max_length itself. At most a third is waste."""
    lengths = (base << power for power in itertools.count() for base in (64, 96))
    return (*itertools.takewhile(lambda length: length < max_length, lengths), max_length)


def make_rules(settings: DecodeConfig, ids: SpecialIds, infill: bool = False, init_cache: InitCache | None = None,
               slice_length: int = 0) -> Rules:
    """The part of the settings that is compiled.

    Raises:
      ConfigError: an unknown strategy (the message lists the known), a cache that the network does not offer, an id
        outside the vocabulary, or nothing left to choose from.
    """
    for key, value, known in (("reveal", settings.reveal, REVEALS), ("confidence", settings.confidence, CONFIDENCES)):
        if value not in known:
            raise ConfigError(f"config.decode.{key} = {value!r}: must be one of {', '.join(map(repr, known))}")
    for key in ("suppressed_ids", "stop_ids", "end_of_thinking_ids"):
        for id_ in getattr(settings, key):
            if not 0 <= id_ < ids.vocab_size:
                raise ConfigError(f"config.decode.{key}: id {id_} lies outside the vocabulary of {ids.vocab_size}")
    if settings.eot_id >= ids.vocab_size:
        raise ConfigError(f"config.decode.eot_id = {settings.eot_id}: lies outside the vocabulary of {ids.vocab_size}")
    if settings.cache != "none" and init_cache is None:
        raise ConfigError(f"config.decode.cache = {settings.cache!r}: this network has no cache; use 'none'")
    suppressed = {*settings.suppressed_ids, *ids.unused} | ({ids.eos} if settings.logits_eos_inf else set())
    suppressed |= {ids.eos, ids.pad} if infill else set()
    if len(suppressed | {ids.mask}) >= ids.vocab_size:
        raise ConfigError("config.decode.suppressed_ids: leaves no token to choose")
    # LLaDA's public code removes EOS from its noisy logits only: without noise those are the logits themselves.
    last = {settings.eot_id} | ({ids.eos} if not settings.temperature else set())
    boost = ThinkingBoost(settings.end_of_thinking_boost, settings.end_of_thinking_power, settings.end_of_thinking_ids or ids.end_of_thinking)
    if settings.end_of_thinking_boost and not boost.ids:
        raise ConfigError(f"config.decode.end_of_thinking_boost = {settings.end_of_thinking_boost!r}: needs config.decode.end_of_thinking_ids: there is no "
                          "tokenizer to ask for </think>")
    return Rules(
        block_length=settings.block_length,
        reveal=REVEALS[settings.reveal](settings),
        confidence=CONFIDENCES[settings.confidence](),
        temperature=settings.temperature,
        top_p=settings.top_p,
        cfg_scale=settings.cfg_scale,
        mask_id=ids.mask,
        vocab_size=ids.vocab_size,
        suppressed_ids=tuple(sorted(suppressed)),
        last_ids=tuple(sorted(last - {-1})) if settings.confidence_eos_eot_inf else (),
        stop_ids=() if infill else (ids.eos, *settings.stop_ids),
        boost=boost if settings.end_of_thinking_boost and not infill else None,
        init_cache=init_cache if settings.cache != "none" else None,
        cache_refresh=settings.cache_refresh,
        slice_length=max(settings.block_length, slice_length),
    )


def check_settings(settings: DecodeConfig, ids: SpecialIds, max_length: int, init_cache: InitCache | None) -> None:
    """Whether a Decoder would take them; for arguments see `Decoder`.

    Raises:
      ConfigError: what `make_rules` refuses, or a block longer than the context.
    """
    if settings.block_length > max_length:
        raise ConfigError(f"config.decode.block_length = {settings.block_length}: must not exceed the context of "
                          f"{max_length} tokens")
    make_rules(settings, ids, init_cache=init_cache)


class Decoder:
    """Decodes prompts of any length with one network.

    What a row becomes depends on its prompt, the seed and its row number; not on the other prompts, the batch size or
    the order (in float32; design law 3).
    """

    def __init__(self, logits_fn: LogitsFn, settings: DecodeConfig, ids: SpecialIds, max_length: int,
                 init_cache: InitCache | None = None, mesh: Mesh | None = None, buckets: Sequence[int] | None = None):
        """Prepares decoding; nothing is compiled yet.

        Args:
          logits_fn: the network, see `contract.LogitsFn`. A Partial with other params does not compile again.
          settings: the sampler.
          ids: ids with a meaning.
          max_length: the context: columns of the longest canvas.
          init_cache: the network's `(rows, length) -> empty cache`, always the same object; for settings.cache.
          mesh: devices to spread the rows over; the params of logits_fn lie on them.
          buckets: canvas lengths to compile, ascending; by default `canvas_buckets(max_length)`.
        """
        check_settings(settings, ids, max_length, init_cache)
        self.logits_fn = logits_fn
        self.settings = settings
        self.ids = ids
        self.max_length = max_length
        self.init_cache = init_cache
        self.mesh = mesh
        # A canvas holds a block at least: what a row draws must not depend on its canvas.
        self.buckets = tuple(b for b in buckets or canvas_buckets(max_length) if b >= settings.block_length)

    def generate(self, prompts: Sequence[Sequence[int]], rows: Sequence[int] | None = None,
                 on_block: OnBlock | None = None) -> list[Decoded]:
        """Continues prompts; one result for each, in their order. For the arguments see `as_completed`."""
        return _in_order(self.as_completed(prompts, rows=rows, on_block=on_block), len(prompts))

    def infill(self, texts: Sequence[Sequence[int]], rows: Sequence[int] | None = None) -> list[Decoded]:
        """Fills gaps; one result for each text, in their order. For the arguments see `as_completed`."""
        return _in_order(self.as_completed(texts, infill=True, rows=rows), len(texts))

    def as_completed(self, prompts: Sequence[Sequence[int]], infill: bool = False, rows: Sequence[int] | None = None,
                     on_block: OnBlock | None = None) -> Iterator[tuple[int, Decoded]]:
        """Decodes prompts and yields (index of the prompt, result) as they finish.

        Args:
          prompts: token ids, used as they are. An empty prompt starts from nothing.
          infill: every MASK in the prompts becomes a token and nothing is appended. Blocks are counted over masked
            positions, from left to right; MASK, EOS and PAD are never chosen.
          rows: numbers that the rows draw by (row r of seed s is always the same draw); by default 0, 1, 2, …
          on_block: called with (index of the prompt, what has become of it so far) after each of its blocks; a true
            result stops the row.

        Raises:
          InputError: a prompt does not fit, holds an id outside the vocabulary, or a mask where there must be none.
        """
        prepare = self._gaps if infill else self._continuation
        prepared = [prepare(index, list(prompt)) for index, prompt in enumerate(prompts)]
        numbers = range(len(prepared)) if rows is None else rows
        if len(numbers) != len(prepared):
            raise InputError(f"rows: {len(numbers)} row numbers for {len(prepared)} prompts")
        return self._run(prepared, self._rules(prepared, infill), numbers, on_block)

    def _rules(self, prepared: list[Row], infill: bool) -> Rules:
        """With a prefix cache, masks beyond the block are computed at every step: the slice must hold them all."""
        ahead = 0
        if self.settings.cache == "prefix":
            masks = max((row.tokens.count(self.ids.mask) for row in prepared), default=0)
            ahead = next(length for length in self.buckets if length >= masks) if masks else 0
        return make_rules(self.settings, self.ids, infill, self.init_cache, ahead)

    def _continuation(self, index: int, prompt: list[int]) -> Row:
        self._check_ids(index, prompt)
        if self.ids.mask in prompt:
            raise InputError(f"prompt {index}: holds a mask (id {self.ids.mask}) at position "
                             f"{prompt.index(self.ids.mask)}: gaps are filled by infilling only")
        budget = self._budget(index, len(prompt))
        canvas = prompt + [self.ids.mask] * budget if self.settings.length == "fixed" else prompt
        return Row(index, canvas, len(prompt), len(prompt) + budget, "length")

    def _budget(self, index: int, prompt_length: int) -> int:
        """New tokens that the context has room for, at most those asked for."""
        room = self.max_length - prompt_length
        budget = self.settings.max_new_tokens
        if room < 1:
            raise InputError(f"prompt {index}: its {prompt_length} tokens leave no room in the context of "
                             f"{self.max_length} tokens")
        if budget <= room:
            return budget
        if self.settings.over_budget == "error":
            raise InputError(f"prompt {index}: its {prompt_length} tokens and config.decode.max_new_tokens = {budget} "
                             f"exceed the context of {self.max_length} tokens")
        # Whole blocks, as published; less than one block only where there is no room for one.
        cut = room - room % self.settings.block_length or room
        logging.warning("prompt %d: max_new_tokens cut from %d to %d, the context is %d tokens", index, budget, cut,
                        self.max_length)
        return cut

    def _gaps(self, index: int, text: list[int]) -> Row:
        self._check_ids(index, text)
        if self.ids.mask not in text:
            raise InputError(f"text {index}: has no gap to fill (no mask, id {self.ids.mask})")
        if len(text) > self.max_length:
            raise InputError(f"text {index}: its {len(text)} tokens exceed the context of {self.max_length} tokens")
        return Row(index, text, 0, len(text), "filled")

    def _check_ids(self, index: int, tokens: list[int]) -> None:
        for id_ in tokens:
            if not 0 <= id_ < self.ids.vocab_size:
                raise InputError(f"prompt {index}: id {id_} lies outside the vocabulary of {self.ids.vocab_size}")

    def _run(self, prepared: list[Row], rules: Rules, numbers: Sequence[int],
             on_block: OnBlock | None) -> Iterator[tuple[int, Decoded]]:
        """The queue: yields (index, result) as rows finish; a finished row gives its slot to the next prompt."""
        if not prepared:
            return
        keys = np.asarray(row_keys(self.settings.seed, jnp.asarray(numbers)))
        pending = collections.deque(prepared)
        slots: list[Row | None] = [None] * self._slots(len(prepared))
        carry = _empty_carry(len(slots), self.buckets[0], self.ids)
        while pending or any(slots):
            for slot, row in enumerate(slots):
                if row is None and pending:
                    slots[slot] = pending.popleft()
                    carry = _admit(carry, slot, slots[slot], keys[slots[slot].index], self.ids)
            carry = _resize(carry, self._bucket(carry, rules), self.ids)
            # The host has something to do after every block: a prompt that waits for a slot, or the caller's callback.
            num_blocks = np.int32(1) if pending or on_block else UNLIMITED
            carry = self._call(carry, num_blocks, rules)
            for slot, row in enumerate(slots):
                if row is None:
                    continue
                called_off = bool(on_block and on_block(row.index, self._decoded(carry, slot, row, rules, False)))
                if carry.done_B[slot] or called_off:
                    carry.done_B[slot] = True
                    slots[slot] = None
                    yield row.index, self._decoded(carry, slot, row, rules, called_off)

    def _slots(self, rows: int) -> int:
        """The smallest power of two that holds all rows, or the batch size; with a mesh, a multiple of its shards."""
        shards = 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return -(-min(self.settings.batch_size, 1 << (rows - 1).bit_length()) // shards) * shards

    def _call(self, carry: Carry, num_blocks: np.int32, rules: Rules) -> Carry:
        """Runs the compiled loop: numpy in, numpy out."""
        if self.mesh is None:
            result = run_blocks(self.logits_fn, jax.device_put(carry), jax.device_put(num_blocks), rules=rules)
        else:
            with use_mesh(self.mesh):
                result = run_blocks(self.logits_fn, jax.device_put(carry, batch_sharding(self.mesh)),
                                    jax.device_put(num_blocks, replicated(self.mesh)), rules=rules)
        return Carry(*map(np.array, fetch(result)))

    def _bucket(self, carry: Carry, rules: Rules) -> int:
        needed_B = next_length(carry.length_B, carry.limit_B, rules.block_length)
        needed = int(needed_B[~carry.done_B].max())
        return next(length for length in self.buckets if length >= needed)

    def _tokens(self, carry: Carry, slot: int, row: Row, rules: Rules) -> list[int]:
        tokens = carry.tokens_BL[slot, row.start : carry.length_B[slot]].tolist()
        if row.ends_by == "filled":
            return tokens
        ends = {*rules.stop_ids, self.ids.mask}
        return list(itertools.takewhile(lambda id_: id_ not in ends, tokens))

    def _decoded(self, carry: Carry, slot: int, row: Row, rules: Rules, called_off: bool) -> Decoded:
        tokens = self._tokens(carry, slot, row, rules)
        end = row.start + len(tokens)
        ended_by = carry.tokens_BL[slot, end] if end < carry.length_B[slot] else self.ids.mask
        if ended_by == self.ids.mask:
            stopped_by = "callback" if called_off else row.ends_by
        else:
            stopped_by = "eos" if ended_by == self.ids.eos else "stop_id"
        return Decoded(
            tokens=tokens,
            nfe=int(carry.steps_B[slot]) * (2 if rules.cfg_scale else 1),
            stopped_by=stopped_by,
            reveal_step=carry.reveal_step_BL[slot, row.start : end].tolist(),
            confidence=carry.log_prob_BL[slot, row.start : end].tolist(),
            canvas=carry.tokens_BL[slot, : carry.length_B[slot]].tolist(),
            canvas_step=carry.reveal_step_BL[slot, : carry.length_B[slot]].tolist(),
        )


def _in_order(finished: Iterator[tuple[int, Decoded]], count: int) -> list[Decoded]:
    results = dict(finished)
    return [results[index] for index in range(count)]


def _empty_carry(batch: int, length: int, ids: SpecialIds) -> Carry:
    return Carry(
        tokens_BL=np.full((batch, length), ids.pad, np.int32),
        length_B=np.zeros(batch, np.int32),
        prompt_B=np.zeros(batch, np.int32),
        limit_B=np.zeros(batch, np.int32),
        done_B=np.ones(batch, bool),
        keys_B2=np.zeros((batch, 2), np.uint32),
        steps_B=np.zeros(batch, np.int32),
        reveal_step_BL=np.full((batch, length), -1, np.int32),
        log_prob_BL=np.zeros((batch, length), np.float32),
    )


def _admit(carry: Carry, slot: int, row: Row, key_2: np.ndarray, ids: SpecialIds) -> Carry:
    """Puts a row into a free slot."""
    length = len(row.tokens)
    if length > carry.tokens_BL.shape[1]:
        carry = _resize(carry, length, ids)
    fresh = _empty_carry(1, carry.tokens_BL.shape[1], ids)
    fresh.tokens_BL[0, :length] = row.tokens
    fresh = fresh._replace(length_B=np.int32([length]), prompt_B=np.int32([row.start]), limit_B=np.int32([row.limit]),
                           done_B=np.array([False]), keys_B2=key_2[None])
    for batch, one in zip(carry, fresh, strict=True):
        batch[slot] = one[0]
    return carry


def _resize(carry: Carry, length: int, ids: SpecialIds) -> Carry:
    """Moves the rows to a canvas of another length; unfinished rows fit in it."""
    kept = min(length, carry.tokens_BL.shape[1])
    moved = _empty_carry(carry.tokens_BL.shape[0], length, ids)
    for old, new in zip(carry, moved, strict=True):
        if old.ndim == 2 and old is not carry.keys_B2:
            new[:, :kept] = old[:, :kept]
        else:
            new[...] = old
    return moved
