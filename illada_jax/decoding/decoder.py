"""The host side of decoding: a queue of prompts, decoded by the compiled loop in a few shapes."""

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from illada_jax.config import DecodeConfig
from illada_jax.decoding.confidence import CONFIDENCES
from illada_jax.decoding.kept import KeptPrefix, KeptRows
from illada_jax.decoding.loop import Carry, Rules, next_length, run_blocks
from illada_jax.decoding.query import LogitsFn, SpecialIds
from illada_jax.decoding.reveal import REVEALS
from illada_jax.decoding.sampling import RowSettings, row_keys
from illada_jax.errors import ConfigError, InputError
from illada_jax.model.cache import Cache
from illada_jax.parallel.hosts import fetch
from illada_jax.parallel.mesh import use_mesh
from illada_jax.parallel.sharding import batch_sharding, replicated

UNLIMITED = 2**30
# Settings that the prompts of a batch need not share: another value compiles nothing.
VARY_BY_ROW = ("max_new_tokens", "over_budget", "temperature", "top_k", "top_p", "threshold", "stop_ids", "seed")

InitCache = Callable[[int, int], Cache]


@dataclass(frozen=True)
class Decoded:
    """The result of one prompt.

    Attributes:
      tokens: new tokens before the stop id; in infilling all tokens, gaps filled.
      nfe: network evaluations (number of function evaluations) of the row's steps, two each under guidance. Those that
        only fill the cache `append`, of the prompt and of each kept block, are not counted.
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


class Request(NamedTuple):
    """A prompt in the queue or in a slot of the batch.

    Attributes:
      index: position of its result.
      tokens: initial canvas, MASK in columns to be written.
      start: first column of the result: the end of the prompt, or 0 in infilling.
      limit: columns that the row may grow to.
      stopped_by: `Decoded.stopped_by` of a row with nothing left to write.
      settings: those of its row; see VARY_BY_ROW.
      stop_ids: ids that end the row.
    """

    index: int
    tokens: list[int]
    start: int
    limit: int
    stopped_by: str
    settings: DecodeConfig
    stop_ids: tuple[int, ...]


def canvas_buckets(max_length: int) -> tuple[int, ...]:
    """Canvas lengths to compile: 64, 96, 128, 192, 256, … and max_length. At most a third of a canvas is padding."""
    lengths = (base << power for power in itertools.count() for base in (64, 96))
    return (*itertools.takewhile(lambda length: length < max_length, lengths), max_length)


def make_rules(settings: DecodeConfig, ids: SpecialIds, infill: bool = False, init_cache: InitCache | None = None,
               slice_length: int = 0) -> Rules:
    """The settings of the compiled loop.

    In infilling MASK, EOS and PAD are never chosen, and no id stops a row. Between refreshes of a cache, a block or, if
    more, `slice_length` columns are evaluated.

    Raises:
      ConfigError: a strategy is unknown (the message lists the known ones), the network has no cache, the cache cannot
        infill, an id is outside the vocabulary, or no id is left to choose.
    """
    for key, known in (("reveal", REVEALS), ("confidence", CONFIDENCES)):
        value = getattr(settings, key)
        if value not in known:
            raise ConfigError(f"config.decode.{key} = {value!r}: must be one of {', '.join(map(repr, known))}")
    for key in ("suppressed_ids", "stop_ids", "end_of_thinking_ids"):
        for id_ in getattr(settings, key):
            if not 0 <= id_ < ids.vocab_size:
                raise ConfigError(f"config.decode.{key}: id {id_} is outside the vocabulary of {ids.vocab_size}")
    if settings.eot_id >= ids.vocab_size:
        raise ConfigError(f"config.decode.eot_id = {settings.eot_id}: is outside the vocabulary of {ids.vocab_size}")
    if settings.cache != "none" and init_cache is None:
        raise ConfigError(f"config.decode.cache = {settings.cache!r}: this network has no cache; set it to 'none'")
    if settings.cache == "append" and infill:
        raise ConfigError("config.decode.cache = 'append': cannot infill, because it does not see what follows a gap; "
                          "set it to 'none', 'prefix' or 'dual'")
    suppressed = {ids.mask, *settings.suppressed_ids, *ids.unused}
    suppressed |= {ids.eos} if settings.logits_eos_inf else set()
    suppressed |= {ids.eos, ids.pad} if infill else set()
    if len(suppressed) >= ids.vocab_size:
        raise ConfigError("config.decode.suppressed_ids: leaves no token to choose; suppress fewer ids")
    boost = settings.end_of_thinking_boost
    thinking_ids = settings.end_of_thinking_ids or ids.end_of_thinking
    if boost and not thinking_ids:
        raise ConfigError(f"config.decode.end_of_thinking_boost = {boost!r}: needs config.decode.end_of_thinking_ids, "
                          "because there is no tokenizer to encode </think>")
    return Rules(
        # Rows carry these settings: a change of them does not compile again. In the loop the length matters to guidance
        # only, and not in infilling; the cache `append` makes every row grow, and is refreshed outside.
        settings=dataclasses.replace(
            settings, **{name: getattr(DecodeConfig, name) for name in VARY_BY_ROW}, batch_size=1,
            length="variable" if settings.cache == "append"
            else settings.length if settings.cfg_scale and not infill else "fixed",
            cache_refresh=0 if settings.cache == "append" else settings.cache_refresh),
        mask_id=ids.mask,
        vocab_size=ids.vocab_size,
        suppressed_ids=tuple(sorted(suppressed)),
        last_ids=(settings.eot_id,) if settings.confidence_eos_eot_inf and settings.eot_id >= 0 else (),
        # LLaDA's public code suppresses EOS in its noisy logits only; without noise those are the logits themselves.
        greedy_last_ids=(ids.eos,) if settings.confidence_eos_eot_inf else (),
        thinking_ids=thinking_ids if boost and not infill else (),
        init_cache=init_cache if settings.cache != "none" else None,
        slice_length=max(settings.block_length, slice_length),
    )


@dataclass(repr=False, eq=False)
class Decoder:
    """Decodes prompts of any length with one network. Nothing is compiled before the first prompt.

    A result depends on its prompt, the seed and its row number; not on the other prompts, the batch size or their order
    (in float32, except for near-ties).

    Attributes:
      logits_fn: the network, see `query.LogitsFn`. A Partial with other params does not compile again.
      max_length: the context: columns of the longest canvas.
      init_cache: the network's `(rows, length) -> empty cache`, always the same object; for settings.cache.
      mesh: devices to shard the rows over; must hold the params of logits_fn.
      buckets: canvas lengths to compile, ascending; by default `canvas_buckets(max_length)`.

    Raises:
      ConfigError: a block is longer than the context, or see `make_rules`.
    """

    logits_fn: LogitsFn
    settings: DecodeConfig
    ids: SpecialIds
    max_length: int
    init_cache: InitCache | None = None
    mesh: Mesh | None = None
    buckets: Sequence[int] | None = None

    def __post_init__(self):
        block_length = self.settings.block_length
        if block_length > self.max_length:
            raise ConfigError(f"config.decode.block_length = {block_length}: must not exceed the context of "
                              f"{self.max_length} tokens")
        make_rules(self.settings, self.ids, init_cache=self.init_cache)
        # A canvas holds at least a block: the draws of a row must not depend on its canvas.
        buckets = self.buckets or canvas_buckets(self.max_length)
        self.buckets = [length for length in buckets if length >= block_length]

    def generate(self, prompts: Sequence[Sequence[int]], *arguments: Any, **options: Any) -> list[Decoded]:
        """Like `as_completed`; one result per prompt, in order."""
        return [result for _, result in sorted(self.as_completed(prompts, *arguments, **options))]

    def as_completed(self, prompts: Sequence[Sequence[int]], infill: bool = False, rows: Sequence[int] | None = None,
                     on_block: OnBlock | None = None, row_settings: Sequence[DecodeConfig] | None = None,
                     prefix: KeptPrefix | None = None) -> Iterator[tuple[int, Decoded]]:
        """Decodes prompts and yields (index of the prompt, result) as they finish.

        Args:
          prompts: token ids, used as they are; may be empty.
          infill: every MASK in the prompts becomes a token and nothing is appended. Blocks are counted over masked
            positions, from left to right; MASK, EOS and PAD are never chosen.
          rows: row numbers, which random draws depend on: row r of seed s always draws the same. By default 0, 1, 2, …
          on_block: called with (index of the prompt, result so far) after each of its blocks; a true return value
            stops the row.
          row_settings: settings of each prompt, which may differ from the decoder's in VARY_BY_ROW.
          prefix: with the cache `append`: a prompt that begins with its tokens takes their keys and values from it, and
            the row that finishes last leaves its own. Then a result depends on earlier calls.

        Raises:
          InputError: a prompt does not fit, has an id outside the vocabulary, or has MASK (to continue) or no MASK (to
            infill); or a setting that cannot vary by row does.
        """
        row_numbers = range(len(prompts)) if rows is None else rows
        row_settings = [self.settings] * len(prompts) if row_settings is None else row_settings
        for name, values in (("row numbers", row_numbers), ("settings", row_settings)):
            if len(values) != len(prompts):
                raise InputError(f"rows: {len(values)} {name} for {len(prompts)} prompts")
        for index, settings in enumerate(row_settings):
            self._check_row(index, settings)
        requests = [self._request(index, list(prompt), infill, settings)
                    for index, (prompt, settings) in enumerate(zip(prompts, row_settings, strict=True))]
        rules = self._rules(requests, infill)
        kept = None
        if rules.appends:
            kept = KeptRows(self.logits_fn, rules, self.buckets, self.mesh, self.settings.cache_refresh, prefix)
        return self._run(requests, rules, row_numbers, on_block, kept)

    def _check_row(self, index: int, settings: DecodeConfig) -> None:
        """Raises InputError if a row differs in a setting that all must share, or ConfigError if a value is invalid."""
        if settings == self.settings:
            return
        for name, value in vars(settings).items():
            shared = getattr(self.settings, name)
            if name not in VARY_BY_ROW and value != shared:
                raise InputError(f"prompt {index}: config.decode.{name} = {value!r}: must be {shared!r}, as for the "
                                 f"other prompts; only {', '.join(VARY_BY_ROW)} may differ")
        make_rules(settings, self.ids, init_cache=self.init_cache)

    def _rules(self, requests: list[Request], infill: bool) -> Rules:
        """Compiled settings. With a prefix cache a slice holds all masks of a row: those beyond the block, too."""
        slice_length = 0
        if self.settings.cache == "prefix":
            masks = max((request.tokens.count(self.ids.mask) for request in requests), default=0)
            slice_length = next(length for length in self.buckets if length >= masks) if masks else 0
        return make_rules(self.settings, self.ids, infill, self.init_cache, slice_length)

    def _request(self, index: int, tokens: list[int], infill: bool, settings: DecodeConfig) -> Request:
        mask = self.ids.mask
        for id_ in tokens:
            if not 0 <= id_ < self.ids.vocab_size:
                raise InputError(f"prompt {index}: id {id_} is outside the vocabulary of {self.ids.vocab_size}")
        if infill:
            if mask not in tokens:
                raise InputError(f"text {index}: no gap to fill (no MASK, id {mask})")
            if len(tokens) > self.max_length:
                raise InputError(f"text {index}: its {len(tokens)} tokens exceed the context of {self.max_length} "
                                 "tokens")
            return Request(index, tokens, 0, len(tokens), "filled", settings, ())
        if mask in tokens:
            raise InputError(f"prompt {index}: contains MASK (id {mask}) at position {tokens.index(mask)}; use "
                             "infilling to fill gaps")
        budget = self._budget(index, len(tokens), settings)
        all_masked = settings.length == "fixed" and settings.cache != "append"
        return Request(index, tokens + [mask] * budget if all_masked else tokens, len(tokens), len(tokens) + budget,
                       "length", settings, (self.ids.eos, *settings.stop_ids))

    def _budget(self, index: int, prompt_length: int, settings: DecodeConfig) -> int:
        """Number of new tokens: max_new_tokens, or as many as fit into the context."""
        available = self.max_length - prompt_length
        budget = settings.max_new_tokens
        if available < 1:
            raise InputError(f"prompt {index}: its {prompt_length} tokens leave no room in the context of "
                             f"{self.max_length} tokens")
        if budget <= available:
            return budget
        if settings.over_budget == "error":
            raise InputError(f"prompt {index}: its {prompt_length} tokens and config.decode.max_new_tokens = {budget} "
                             f"exceed the context of {self.max_length} tokens")
        # Whole blocks, as in the published code; a shorter block only where no whole one fits.
        cut = available - available % settings.block_length or available
        logging.warning("prompt %d: max_new_tokens cut from %d to %d to fit the context of %d tokens", index, budget,
                        cut, self.max_length)
        return cut

    def _run(self, requests: list[Request], rules: Rules, row_numbers: Sequence[int], on_block: OnBlock | None,
             kept: KeptRows | None) -> Iterator[tuple[int, Decoded]]:
        """Yields (index, result) as rows finish; a finished row frees its slot for the next request."""
        if not requests:
            return
        # Repeated to a power of two: not every number of prompts compiles another program.
        seeds = np.array([request.settings.seed for request in requests], np.uint32)
        padded = (np.resize(values, 1 << (len(requests) - 1).bit_length()) for values in (seeds, row_numbers))
        keys = np.asarray(row_keys(*padded))
        most_stop_ids = max(len(request.stop_ids) for request in requests)
        pending = collections.deque(requests)
        slots: list[Request | None] = [None] * self._num_slots(len(requests))
        nobody = Request(-1, [], 0, 0, "", DecodeConfig(), ())
        rows = [new_row(nobody, keys[0], most_stop_ids, done=True)] * len(slots)
        while pending or any(slots):
            for slot, request in enumerate(slots):
                if request is None and pending:
                    slots[slot] = pending.popleft()
                    rows[slot] = new_row(slots[slot], keys[slots[slot].index], most_stop_ids)
            # The host acts after every block if a request waits for a slot or the caller has a callback.
            rows = self._call(rows, 1 if pending or on_block else UNLIMITED, rules, kept)
            for slot, request in enumerate(slots):
                if request is None:
                    continue
                cancelled = bool(on_block and on_block(request.index, self._decoded(rows[slot], request, rules)))
                if rows[slot].done_B[0] or cancelled:
                    rows[slot] = rows[slot]._replace(done_B=np.array([True]))
                    slots[slot] = None
                    if kept is not None:
                        kept.leave(slot, rows[slot])
                    yield request.index, self._decoded(rows[slot], request, rules, cancelled)

    def _num_slots(self, rows: int) -> int:
        """The smallest power of two that holds all rows, at most the batch size; a multiple of the mesh's shards."""
        shards = 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return -(-min(self.settings.batch_size, 1 << (rows - 1).bit_length()) // shards) * shards

    def _call(self, rows: list[Carry], num_blocks: int, rules: Rules, kept: KeptRows | None) -> list[Carry]:
        """Runs the compiled loop over the rows, on the smallest canvas that holds the next block of each."""
        needed = max(int(next_length(row.length_B, row.limit_B, rules.settings.block_length)[0])
                     for row in rows if not row.done_B[0])
        length = next(length for length in self.buckets if length >= needed)
        resized = [_resize(row, length, self.ids.pad) for row in rows]
        inputs = jax.tree.map(lambda *rows: np.concatenate(rows), *resized)
        shardings = None if self.mesh is None else (batch_sharding(self.mesh), replicated(self.mesh))
        with contextlib.nullcontext() if self.mesh is None else use_mesh(self.mesh):
            if kept is not None:
                num_blocks = min(num_blocks, kept.prepare(rows, length) or num_blocks)
            inputs = jax.device_put((inputs, np.int32(num_blocks)), shardings)
            carry, cache = run_blocks(self.logits_fn, *inputs, kept and kept.cache, rules=rules)
        if kept is not None:
            kept.cache = cache
        carry = fetch(carry)
        return [jax.tree.map(lambda x: x[slot : slot + 1], carry) for slot in range(len(rows))]  # noqa: B023

    def _decoded(self, row: Carry, request: Request, rules: Rules, cancelled: bool = False) -> Decoded:
        length = int(row.length_B[0])
        canvas, canvas_step, log_probs = (x_1L[0, :length].tolist()
                                          for x_1L in (row.tokens_BL, row.reveal_step_BL, row.log_prob_BL))
        ends = () if request.stopped_by == "filled" else (*request.stop_ids, self.ids.mask)
        start = request.start
        end = next((column for column in range(start, length) if canvas[column] in ends), length)
        if end < length and canvas[end] != self.ids.mask:
            stopped_by = "eos" if canvas[end] == self.ids.eos else "stop_id"
        else:
            stopped_by = "callback" if cancelled else request.stopped_by
        return Decoded(
            tokens=canvas[start:end],
            nfe=int(row.steps_B[0]) * rules.passes,
            stopped_by=stopped_by,
            reveal_step=canvas_step[start:end],
            log_probs=log_probs[start:end],
            canvas=canvas,
            canvas_step=canvas_step,
        )


def new_row(request: Request, key_2: np.ndarray, most_stop_ids: int, done: bool = False) -> Carry:
    """The initial state of one row, on a canvas of the length of its tokens; `most_stop_ids` are those of any row."""
    length = len(request.tokens)
    return Carry(
        tokens_BL=np.array([request.tokens], np.int32),
        length_B=np.int32([length]),
        prompt_B=np.int32([request.start]),
        limit_B=np.int32([request.limit]),
        done_B=np.array([done]),
        keys_B2=key_2[None],
        steps_B=np.int32([0]),
        reveal_step_BL=np.full((1, length), -1, np.int32),
        log_prob_BL=np.zeros((1, length), np.float32),
        settings=RowSettings.of(request.settings, request.stop_ids, most_stop_ids),
    )


def _resize(row: Carry, length: int, pad_id: int) -> Carry:
    """Moves a row to a canvas of another length, which it must fit unless it is done."""
    def resized(x_1L: np.ndarray, value: int) -> np.ndarray:
        x_1L = x_1L[:, :length]
        return np.pad(x_1L, ((0, 0), (0, length - x_1L.shape[1])), constant_values=value)

    return row._replace(tokens_BL=resized(row.tokens_BL, pad_id), reveal_step_BL=resized(row.reveal_step_BL, -1),
                        log_prob_BL=resized(row.log_prob_BL, 0))
