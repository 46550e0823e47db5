"""The states of a canvas, from the steps at which its columns were written.

A result of the decoder says when each column was written, and from that every state in between is known. The candidates
are computed again by the same network on these states, so that decoding itself need not keep them.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from illada_jax.decoding import SpecialIds
from illada_jax.decoding.confidence import log_probs
from illada_jax.decoding.decoder import make_rules
from illada_jax.decoding.query import LogitsFn
from illada_jax.decoding.sampling import classifier_free_guidance, mask_logits
from illada_jax.errors import InputError
from illada_jax.model import make_init_cache
from illada_jax.tracing.strategies import describe, differences


class Candidate(NamedTuple):
    """A token that the network would put into a column, with its probability."""

    piece: str
    probability: float


@dataclass(frozen=True)
class Trace:
    """How one text was written.

    Attributes:
      title: what the reader is told about it.
      pieces: the text of each column of the finished canvas.
      written_at: for each column the step that wrote it, counted from 0; -1 for what was given; `num_steps` for what is
        still masked at the end.
      block: for each column the number of its block, from 0; -1 for what was given.
      probability: for each column the probability of its token in the state in which it was written; 1 for what was
        given, 0 for what was never written.
      visible: for each step, the columns that the network sees: in variable length the canvas grows.
      candidates: for each step, the most probable tokens of the columns that are still masked in the active block, by
        column.
      agrees: for each column, whether decoding without a cache has the same token there; empty if there was no cache.
      strategy: the settings that it was written with, in words.
      nfe: network evaluations that it took.
      end: the column behind the answer, of EOS or of what was written after a stop string; None if the answer goes to
        the end of the canvas.
    """

    title: str
    pieces: list[str]
    written_at: list[int]
    block: list[int]
    probability: list[float]
    visible: list[int]
    candidates: list[dict[int, list[Candidate]]]
    agrees: list[bool] = field(default_factory=list)
    strategy: str = ""
    nfe: int = 0
    end: int | None = None

    @property
    def num_steps(self) -> int:
        """Steps that wrote something."""
        return len(self.visible)

    @property
    def agreement(self) -> float | None:
        """Share of the written tokens that decoding without a cache writes too; None if there was no cache."""
        written = [agrees for agrees, at in zip(self.agrees, self.written_at, strict=False) if 0 <= at < self.num_steps]
        return sum(written) / len(written) if written else None


def make_trace(lm: Any, generation: Any, *, title: str = "", strategy: str = "", infill: bool = False,
               num_candidates: int = 5, row: int = 0, **settings: Any) -> Trace:
    """The trace of a result, one network evaluation for each of its steps.

    A cache approximates: if one was used, the row is decoded once more without it, to say how far they agree.

    Args:
      lm: the `api.LanguageModel` that wrote it.
      generation: the `api.Generation`.
      title: see Trace.
      strategy: see Trace; by default the settings that decide the order of writing.
      infill: it was made by `lm.infill`.
      num_candidates: tokens that are kept for each masked column and step.
      row: the number that the row drew by.
      **settings: those that it was made with.

    Raises:
      InputError: nothing was written.
    """
    ids = SpecialIds.of(lm.tokenizer)
    decode = lm.decode_settings(settings)
    grows = decode.length == "variable" and not infill
    never = (ids.mask, *make_rules(decode, ids, infill, make_init_cache(lm.config.model)).suppressed_ids)
    canvas = np.asarray(generation.canvas, np.int32)
    step = np.asarray(generation.canvas_step)
    num_steps = int(step.max(initial=-1)) + 1
    if not num_steps:
        raise InputError("trace: nothing was written")
    written_at = np.where((step < 0) & (canvas == ids.mask), num_steps, step)
    block = np.full(len(canvas), -1)
    to_write = np.flatnonzero(written_at >= 0)
    block[to_write] = np.arange(len(to_write)) // decode.block_length

    probability = np.where(written_at < 0, 1.0, 0.0)
    visible, candidates = [], []
    for now in range(num_steps):
        masked = written_at >= now
        active = np.flatnonzero(masked & (block == block[masked].min()))
        end = int(np.flatnonzero(block == block[active[0]])[-1]) + 1 if grows else len(canvas)
        state = np.where(masked, ids.mask, canvas)
        want = np.resize(active, min(decode.block_length, len(to_write)))
        best_Q5, log_probs_Q5, chosen_Q = _look(
            lm.logits_fn, state[None], np.where(written_at < 0, ids.mask, state)[None],
            (np.arange(len(canvas)) < end).astype(np.int32)[None], want[None], canvas[want][None], never,
            ids.vocab_size, num_candidates, decode.cfg_scale)
        probs_Q5 = np.exp(log_probs_Q5)
        candidates.append({int(column): [Candidate(display(lm.tokenizer, int(i)), float(p))
                                         for i, p in zip(best_5, probs_5, strict=True)]
                           for column, best_5, probs_5 in zip(active, best_Q5, probs_Q5, strict=False)})
        for column, log_prob in zip(active, chosen_Q, strict=False):
            if written_at[column] == now:
                probability[column] = np.exp(log_prob)
        visible.append(end)
    agrees = [] if decode.cache == "none" else _agrees(lm, canvas, written_at, infill, row, settings)
    start = 0 if infill else int(np.argmax(written_at >= 0))
    end = start + len(generation.tokens)
    return Trace(title, [display(lm.tokenizer, int(i)) for i in canvas], written_at.tolist(), block.tolist(),
                 probability.tolist(), visible, candidates, agrees, strategy or describe(decode), generation.nfe,
                 end if end < len(canvas) else None)


def compare(lm: Any, prompt: Any, strategies: Sequence[Mapping[str, Any]], *, infill: bool = False,
            num_candidates: int = 5, row: int = 0, **settings: Any) -> list[Trace]:
    """One prompt written with several strategies, for `write_page`.

    Args:
      lm: an `api.LanguageModel`.
      prompt: text or ids.
      strategies: for each trace, the fields of DecodeConfig that differ from `settings`.
      infill: the prompt has gaps, which are filled.
      num_candidates: tokens that are kept for each masked column and step.
      row: the number that the row draws by, the same for all.
      **settings: fields of DecodeConfig that all have.

    Raises:
      InputError: the prompt or a setting is wrong; nothing was written.

    >>> import illada_jax
    >>> lm = illada_jax.load("demo")
    >>> traces = compare(lm, "The with statement", [{}, {"confidence": "random"}], max_new_tokens=8)
    >>> [trace.strategy for trace in traces]
    ['confidence=low_confidence', 'confidence=random']
    """
    all_settings = [{**settings, **strategy} for strategy in strategies]
    words = differences([lm.decode_settings(each) for each in all_settings])
    write = lm.infill if infill else lm.generate
    title = prompt if isinstance(prompt, str) else lm.tokenizer.decode(prompt)
    return [make_trace(lm, write([prompt], rows=[row], **each)[0], title=title, strategy=strategy, infill=infill,
                       num_candidates=num_candidates, row=row, **each)
            for each, strategy in zip(all_settings, words, strict=True)]


def _agrees(lm: Any, canvas: np.ndarray, written_at: np.ndarray, infill: bool, row: int,
            settings: dict[str, Any]) -> list[bool]:
    """For each column of the canvas, whether decoding without a cache ends with the same token in it."""
    exact = {**settings, "cache": "none"}
    if infill:
        masked = np.where(written_at < 0, canvas, lm.tokenizer.mask_id)
        result = lm.infill([masked.tolist()], rows=[row], **exact)[0]
    else:
        result = lm.generate([canvas[: np.argmax(written_at >= 0)].tolist()], rows=[row], **exact)[0]
    return [token == other for token, other in itertools.zip_longest(canvas.tolist(), result.canvas)][: len(canvas)]


@functools.partial(jax.jit, static_argnums=(6, 7, 8, 9))
def _look(logits_fn: LogitsFn, tokens_BT, uncond_BT, segments_BT, query_columns_BQ, chosen_BQ, never: tuple[int, ...],
          vocab_size: int, count: int, cfg_scale: float):
    """For the wanted columns: the best ids, their log-probabilities, and the log-probability of the chosen id."""
    positions_BT = jax.lax.broadcasted_iota(jnp.int32, tokens_BT.shape, 1)
    logits_BQV, _ = logits_fn(tokens_BT, positions_BT, segments_BT, query_columns_BQ, None)
    if cfg_scale:
        logits_BQV = classifier_free_guidance(logits_BQV, logits_fn(uncond_BT, positions_BT, segments_BT, query_columns_BQ, None)[0], cfg_scale)
    log_probs_BQV = log_probs(mask_logits(logits_BQV, never, vocab_size))
    best_BQn, ids_BQn = jax.lax.top_k(log_probs_BQV, count)
    chosen_BQ1 = jnp.take_along_axis(log_probs_BQV, chosen_BQ[:, :, None], axis=-1)
    return ids_BQn[0], best_BQn[0], chosen_BQ1[0, :, 0]


def display(tokenizer: Any, id_: int) -> str:
    """The text of one token: as it decodes alone, or its piece where that is no text (half a character, a special)."""
    text = tokenizer.decode([id_])
    return text if text and "\ufffd" not in text else tokenizer.id_to_piece(id_)
