"""The host side of decoding: a queue of prompts, decoded by the compiled loop in a few shapes."""

import collections
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from illada_jax.config import DecodeConfig
from illada_jax.decoding.confidence import CONFIDENCES
from illada_jax.decoding.loop import Carry, Rules, next_length, run_blocks
from illada_jax.decoding.query import LogitsFn, SpecialIds
from illada_jax.decoding.reveal import REVEALS, make_reveal
from illada_jax.decoding.sampling import row_keys
from illada_jax.decoding.thinking import ThinkingBoost
from illada_jax.errors import ConfigError, InputError
from illada_jax.model.cache import Cache
from illada_jax.parallel.hosts import fetch
from illada_jax.parallel.mesh import use_mesh
from illada_jax.parallel.sharding import batch_sharding, replicated

UNLIMITED = np.int32(2**30)

InitCache = Callable[[int, int], Cache]


@dataclass(frozen=True)
class Decoded:
    """The result of one prompt.

    Attributes:
      tokens: `generate`: new tokens before the stop id. `infill`: all tokens, gaps filled.
      nfe: network evaluations (number of function evaluations) of the row.
      stopped_by: `eos`, `stop_id`, `callback` (on_block returned true), `length` (the budget) or `filled` (infilling).
      reveal_step: the step that wrote each of the tokens; -1 for given ones.
      log_probs: natural log-probability of each of the tokens when it was written; 0 for given ones.
      canvas: ids of the final row: given tokens and all written ones, also those after the stop id.
      canvas_step: the step that wrote each id of the canvas; -1 for ids that were given or never written.
    """

    tokens: list[int]
    nfe: int
    stopped_by: str
    reveal_step: list[int]
    log_probs: list[float]
    canvas: list[int]
    canvas_step: list[int]


OnBlock = Callable[[int, Decoded], bool | None]


@dataclass(frozen=True)
class Request:
    """A prompt in the queue or in a slot of the batch.

    Attributes:
      index: position of its result.
      tokens: initial canvas, MASK in columns to be written.
      start: first column of the result: the end of the prompt, or 0 in infilling.
      limit: columns that the row may grow to.
      stopped_by: `Decoded.stopped_by` of a row with nothing left to write.
    """

    index: int
    tokens: list[int]
    start: int
    limit: int
    stopped_by: str


def canvas_buckets(max_length: int) -> tuple[int, ...]:
    """Canvas lengths to compile: 64, 96, 128, 192, 256, … and max_length. At most a third of a canvas is padding."""
    lengths = (base << power for power in itertools.count() for base in (64, 96))
    return (*itertools.takewhile(lambda length: length < max_length, lengths), max_length)


def make_rules(settings: DecodeConfig, ids: SpecialIds, infill: bool = False, init_cache: InitCache | None = None,
               slice_length: int = 0) -> Rules:
    """The settings of the compiled loop.

    Args:
      settings: the sampler.
      ids: special ids.
      infill: gaps are filled: MASK, EOS and PAD are never chosen, and no id stops a row.
      init_cache: see `Decoder`.
      slice_length: columns to evaluate between refreshes of a cache, if more than a block.

    Raises:
      ConfigError: a strategy is unknown (the message lists the known ones), the network has no cache, an id lies
        outside the vocabulary, or no id is left to choose.
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
        raise ConfigError(f"config.decode.cache = {settings.cache!r}: this network has no cache; set it to 'none'")
    suppressed = {*settings.suppressed_ids, *ids.unused} | ({ids.eos} if settings.logits_eos_inf else set())
    suppressed |= {ids.eos, ids.pad} if infill else set()
    if len(suppressed | {ids.mask}) >= ids.vocab_size:
        raise ConfigError("config.decode.suppressed_ids: leaves no token to choose; suppress fewer ids")
    # LLaDA's public code suppresses EOS in its noisy logits only; without noise those are the logits themselves.
    last = {settings.eot_id} | ({ids.eos} if not settings.temperature else set())
    boost = ThinkingBoost(settings.end_of_thinking_boost, settings.end_of_thinking_power,
                          settings.end_of_thinking_ids or ids.end_of_thinking)
    if settings.end_of_thinking_boost and not boost.ids:
        raise ConfigError(f"config.decode.end_of_thinking_boost = {settings.end_of_thinking_boost!r}: needs "
                          "config.decode.end_of_thinking_ids, as there is no tokenizer that encodes </think>")
    return Rules(
        block_length=settings.block_length,
        reveal=make_reveal(settings),
        confidence=CONFIDENCES[settings.confidence],
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
    """Checks settings as `Decoder` does; for the arguments see there.

    Raises:
      ConfigError: a block is longer than the context, or see `make_rules`.
    """
    if settings.block_length > max_length:
        raise ConfigError(f"config.decode.block_length = {settings.block_length}: must not exceed the context of "
                          f"{max_length} tokens")
    make_rules(settings, ids, init_cache=init_cache)


class Decoder:
    """Decodes prompts of any length with one network.

    A result depends on its prompt, the seed and its row number; not on the other prompts, the batch size or their order
    (in float32, except for near-ties).
    """

    def __init__(self, logits_fn: LogitsFn, settings: DecodeConfig, ids: SpecialIds, max_length: int,
                 init_cache: InitCache | None = None, mesh: Mesh | None = None, buckets: Sequence[int] | None = None):
        """Prepares decoding; nothing is compiled yet.

        Args:
          logits_fn: the network, see `query.LogitsFn`. A Partial with other params does not compile again.
          settings: the sampler.
          ids: special ids.
          max_length: the context: columns of the longest canvas.
          init_cache: the network's `(rows, length) -> empty cache`, always the same object; for settings.cache.
          mesh: devices to shard the rows over; must hold the params of logits_fn.
          buckets: canvas lengths to compile, ascending; by default `canvas_buckets(max_length)`.

        Raises:
          ConfigError: see `check_settings`.
        """
        check_settings(settings, ids, max_length, init_cache)
        self.logits_fn = logits_fn
        self.settings = settings
        self.ids = ids
        self.max_length = max_length
        self.init_cache = init_cache
        self.mesh = mesh
        # A canvas holds at least a block: the draws of a row must not depend on its canvas.
        self.buckets = tuple(b for b in buckets or canvas_buckets(max_length) if b >= settings.block_length)

    def generate(self, prompts: Sequence[Sequence[int]], rows: Sequence[int] | None = None,
                 on_block: OnBlock | None = None) -> list[Decoded]:
        """Continues prompts; one result per prompt, in order. For the arguments see `as_completed`."""
        return _in_order(self.as_completed(prompts, rows=rows, on_block=on_block), len(prompts))

    def infill(self, texts: Sequence[Sequence[int]], rows: Sequence[int] | None = None) -> list[Decoded]:
        """Fills gaps; one result per text, in order. For the arguments see `as_completed`."""
        return _in_order(self.as_completed(texts, infill=True, rows=rows), len(texts))

    def as_completed(self, prompts: Sequence[Sequence[int]], infill: bool = False, rows: Sequence[int] | None = None,
                     on_block: OnBlock | None = None) -> Iterator[tuple[int, Decoded]]:
        """Decodes prompts and yields (index of the prompt, result) as they finish.

        Args:
          prompts: token ids, used as they are; may be empty.
          infill: every MASK in the prompts becomes a token and nothing is appended. Blocks are counted over masked
            positions, from left to right; MASK, EOS and PAD are never chosen.
          rows: row numbers, which random draws depend on: row r of seed s always draws the same. By default 0, 1, 2, …
          on_block: called with (index of the prompt, result so far) after each of its blocks; a true return value
            stops the row.

        Raises:
          InputError: a prompt does not fit, has an id outside the vocabulary, or has MASK (to continue) or no MASK (to
            infill).
        """
        make_request = self._infilling if infill else self._continuation
        requests = [make_request(index, list(prompt)) for index, prompt in enumerate(prompts)]
        row_numbers = range(len(requests)) if rows is None else rows
        if len(row_numbers) != len(requests):
            raise InputError(f"rows: {len(row_numbers)} row numbers for {len(requests)} prompts")
        return self._run(requests, self._rules(requests, infill), row_numbers, on_block)

    def _rules(self, requests: list[Request], infill: bool) -> Rules:
        """Compiled settings. With a prefix cache a slice holds all masks of a row: those beyond the block, too."""
        slice_length = 0
        if self.settings.cache == "prefix":
            masks = max((request.tokens.count(self.ids.mask) for request in requests), default=0)
            slice_length = next(length for length in self.buckets if length >= masks) if masks else 0
        return make_rules(self.settings, self.ids, infill, self.init_cache, slice_length)

    def _continuation(self, index: int, prompt: list[int]) -> Request:
        self._check_ids(index, prompt)
        if self.ids.mask in prompt:
            raise InputError(f"prompt {index}: contains MASK (id {self.ids.mask}) at position "
                             f"{prompt.index(self.ids.mask)}; use infilling to fill gaps")
        budget = self._budget(index, len(prompt))
        canvas = prompt + [self.ids.mask] * budget if self.settings.length == "fixed" else prompt
        return Request(index, canvas, len(prompt), len(prompt) + budget, "length")

    def _budget(self, index: int, prompt_length: int) -> int:
        """New tokens that fit into the context, at most those asked for."""
        available = self.max_length - prompt_length
        budget = self.settings.max_new_tokens
        if available < 1:
            raise InputError(f"prompt {index}: its {prompt_length} tokens leave no room in the context of "
                             f"{self.max_length} tokens")
        if budget <= available:
            return budget
        if self.settings.over_budget == "error":
            raise InputError(f"prompt {index}: its {prompt_length} tokens and config.decode.max_new_tokens = {budget} "
                             f"exceed the context of {self.max_length} tokens")
        # Whole blocks, as in the published code; a shorter block only where no whole one fits.
        cut = available - available % self.settings.block_length or available
        logging.warning("prompt %d: max_new_tokens cut from %d to %d to fit the context of %d tokens", index, budget,
                        cut, self.max_length)
        return cut

    def _infilling(self, index: int, text: list[int]) -> Request:
        self._check_ids(index, text)
        if self.ids.mask not in text:
            raise InputError(f"text {index}: no gap to fill (no MASK, id {self.ids.mask})")
        if len(text) > self.max_length:
            raise InputError(f"text {index}: its {len(text)} tokens exceed the context of {self.max_length} tokens")
        return Request(index, text, 0, len(text), "filled")

    def _check_ids(self, index: int, tokens: list[int]) -> None:
        for id_ in tokens:
            if not 0 <= id_ < self.ids.vocab_size:
                raise InputError(f"prompt {index}: id {id_} lies outside the vocabulary of {self.ids.vocab_size}")

    def _run(self, requests: list[Request], rules: Rules, row_numbers: Sequence[int],
             on_block: OnBlock | None) -> Iterator[tuple[int, Decoded]]:
        """Yields (index, result) as rows finish; a finished row frees its slot for the next request."""
        if not requests:
            return
        keys = np.asarray(row_keys(self.settings.seed, jnp.asarray(row_numbers)))
        pending = collections.deque(requests)
        slots: list[Request | None] = [None] * self._num_slots(len(requests))
        carry = _empty_carry(len(slots), self.buckets[0], self.ids)
        while pending or any(slots):
            for slot, request in enumerate(slots):
                if request is None and pending:
                    slots[slot] = pending.popleft()
                    carry = _admit(carry, slot, slots[slot], keys[slots[slot].index], self.ids)
            carry = _resize(carry, self._bucket(carry, rules), self.ids)
            # The host acts after every block if a request waits for a slot or the caller has a callback.
            num_blocks = np.int32(1) if pending or on_block else UNLIMITED
            carry = self._call(carry, num_blocks, rules)
            for slot, request in enumerate(slots):
                if request is None:
                    continue
                cancelled = bool(on_block and on_block(request.index, self._decoded(carry, slot, request, rules)))
                if carry.done_B[slot] or cancelled:
                    carry.done_B[slot] = True
                    slots[slot] = None
                    yield request.index, self._decoded(carry, slot, request, rules, cancelled)

    def _num_slots(self, rows: int) -> int:
        """The smallest power of two that holds all rows, at most the batch size; a multiple of the mesh's shards."""
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

    def _tokens(self, carry: Carry, slot: int, request: Request, rules: Rules) -> list[int]:
        tokens = carry.tokens_BL[slot, request.start : carry.length_B[slot]].tolist()
        if request.stopped_by == "filled":
            return tokens
        ends = {*rules.stop_ids, self.ids.mask}
        return list(itertools.takewhile(lambda id_: id_ not in ends, tokens))

    def _decoded(self, carry: Carry, slot: int, request: Request, rules: Rules, cancelled: bool = False) -> Decoded:
        start, tokens = request.start, self._tokens(carry, slot, request, rules)
        end = start + len(tokens)
        end_id = carry.tokens_BL[slot, end] if end < carry.length_B[slot] else self.ids.mask
        if end_id == self.ids.mask:
            stopped_by = "callback" if cancelled else request.stopped_by
        else:
            stopped_by = "eos" if end_id == self.ids.eos else "stop_id"
        return Decoded(
            tokens=tokens,
            nfe=int(carry.steps_B[slot]) * (2 if rules.cfg_scale else 1),
            stopped_by=stopped_by,
            reveal_step=carry.reveal_step_BL[slot, start:end].tolist(),
            log_probs=carry.log_prob_BL[slot, start:end].tolist(),
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


def _admit(carry: Carry, slot: int, request: Request, key_2: np.ndarray, ids: SpecialIds) -> Carry:
    """Puts a request into a free slot."""
    length = len(request.tokens)
    if length > carry.tokens_BL.shape[1]:
        carry = _resize(carry, length, ids)
    new = _empty_carry(1, carry.tokens_BL.shape[1], ids)
    new.tokens_BL[0, :length] = request.tokens
    new = new._replace(length_B=np.int32([length]), prompt_B=np.int32([request.start]),
                       limit_B=np.int32([request.limit]), done_B=np.array([False]), keys_B2=key_2[None])
    for batch, one in zip(carry, new, strict=True):
        batch[slot] = one[0]
    return carry


def _resize(carry: Carry, length: int, ids: SpecialIds) -> Carry:
    """Moves the rows to a canvas of another length, which all unfinished rows must fit."""
    common = min(length, carry.tokens_BL.shape[1])
    moved = _empty_carry(carry.tokens_BL.shape[0], length, ids)
    for old, new in zip(carry, moved, strict=True):
        if old.ndim == 2 and old is not carry.keys_B2:
            new[:, :common] = old[:, :common]
        else:
            new[...] = old
    return moved
