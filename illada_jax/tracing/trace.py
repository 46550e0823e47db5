"""Traces: the states of a canvas, rebuilt from the steps that wrote its columns, with candidates.

The network evaluates the rebuilt states again to find the candidates, so that decoding does not have to keep them.

Dimensions: B rows (one), L canvas columns, Q queried columns, K candidates, V vocabulary.
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
from illada_jax.decoding.confidence import log_softmax
from illada_jax.decoding.decoder import make_rules
from illada_jax.decoding.query import CanvasSlice, LogitsFn, guided_logits
from illada_jax.decoding.sampling import mask_logits
from illada_jax.errors import InputError
from illada_jax.model import make_init_cache
from illada_jax.tracing.strategies import describe, differences


class Candidate(NamedTuple):
    """A possible token of a column, with its probability."""

    piece: str
    probability: float


@dataclass(frozen=True)
class Trace:
    """The record of how one text was written.

    Attributes:
      title: title for the reader.
      pieces: text of each column of the finished canvas.
      written_at: step that wrote each column, from 0; -1 for given columns, `num_steps` for columns still masked at the
        end.
      block: block of each column, from 0; -1 for given columns.
      probability: probability of each column's token at the step that wrote it; 1 for given columns, 0 for columns that
        were never written.
      visible: for each step, the number of columns that the network sees; in variable length the canvas grows.
      candidates: for each step, the most probable tokens of the masked columns of the active block, by column.
      agrees: for each column, True if decoding without a cache writes the same token; empty if no cache was used.
      strategy: the settings in words.
      nfe: network evaluations of the text.
      end: end column of the answer, which holds EOS or text after a stop string; None if the answer fills the canvas.
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
        """Number of steps that wrote a token."""
        return len(self.visible)

    @property
    def agreement(self) -> float | None:
        """Share of written tokens that decoding without a cache writes, too; None if no cache was used."""
        written = [agrees for agrees, at in zip(self.agrees, self.written_at, strict=False) if 0 <= at < self.num_steps]
        return sum(written) / len(written) if written else None


class _Writing(NamedTuple):
    """A finished canvas (int32 ids) and the order in which it was written, as in Trace."""

    tokens_L: np.ndarray
    written_at_L: np.ndarray
    block_L: np.ndarray
    num_steps: int

    @classmethod
    def of(cls, generation: Any, mask_id: int, block_length: int) -> "_Writing":
        """The writing of an `api.Generation`. Raises InputError if nothing was written."""
        tokens_L, step_L = np.asarray(generation.canvas, np.int32), np.asarray(generation.canvas_step)
        num_steps = int(step_L.max(initial=-1)) + 1
        if not num_steps:
            raise InputError("trace: nothing was written")
        written_at_L = np.where((step_L < 0) & (tokens_L == mask_id), num_steps, step_L)
        columns = np.flatnonzero(written_at_L >= 0)
        block_L = np.full(len(tokens_L), -1)
        block_L[columns] = np.arange(len(columns)) // block_length
        return cls(tokens_L, written_at_L, block_L, num_steps)

    def state(self, step: int, visible: int, mask_id: int) -> CanvasSlice:
        """The canvas before a step, of which `visible` columns are no padding; a batch of one row."""
        tokens_L = np.where(self.written_at_L >= step, mask_id, self.tokens_L)
        positions_L = np.arange(len(tokens_L), dtype=np.int32)
        segments_L = (positions_L < visible).astype(np.int32)
        return CanvasSlice(*(x_L[None] for x_L in (tokens_L, positions_L, segments_L, self.written_at_L < 0)))


def make_trace(lm: Any, generation: Any, *, title: str = "", strategy: str = "", infill: bool = False,
               num_candidates: int = 5, row: int = 0, **settings: Any) -> Trace:
    """The trace of a result, for one network evaluation per step.

    A cache approximates: if one was used, the row is decoded again without it to measure their agreement.

    Args:
      lm: the `api.LanguageModel` that wrote it.
      generation: the `api.Generation`.
      title: see Trace.
      strategy: see Trace; by default the settings that decide the order of writing.
      infill: the result is of `lm.infill`.
      num_candidates: candidates per masked column and step.
      row: the row number of the result.
      **settings: the settings of the result.

    Raises:
      InputError: nothing was written.
    """
    ids, decode = SpecialIds.of(lm.tokenizer), lm.decode_settings(settings)
    rules = make_rules(decode, ids, infill, make_init_cache(lm.config.model))
    writing = _Writing.of(generation, ids.mask, decode.block_length)
    grows = decode.length == "variable" and not infill
    query_length = min(decode.block_length, int(np.sum(writing.written_at_L >= 0)))

    probability_L = np.where(writing.written_at_L < 0, 1.0, 0.0)
    visible, candidates = [], []
    for step in range(writing.num_steps):
        masked_L = writing.written_at_L >= step
        in_block_L = writing.block_L == writing.block_L[masked_L].min()
        active = np.flatnonzero(masked_L & in_block_L)
        visible.append(int(np.flatnonzero(in_block_L)[-1]) + 1 if grows else len(masked_L))
        columns = np.resize(active, query_length)  # one shape for all steps
        found = _top_candidates(lm.logits_fn, writing.state(step, visible[-1], ids.mask), columns[None],
                                writing.tokens_L[columns][None], mask_id=ids.mask, vocab_size=ids.vocab_size,
                                never_ids=(ids.mask, *rules.suppressed_ids), cfg_scale=decode.cfg_scale,
                                num_candidates=num_candidates)
        ids_QK, log_probs_QK, chosen_log_probs_Q = (x[0, : len(active)] for x in jax.device_get(found))
        candidates.append({int(column): [Candidate(display(lm.tokenizer, int(id_)), float(prob))
                                         for id_, prob in zip(ids_K, probs_K, strict=True)]
                           for column, ids_K, probs_K in zip(active, ids_QK, np.exp(log_probs_QK), strict=True)})
        now = writing.written_at_L[active] == step
        probability_L[active[now]] = np.exp(chosen_log_probs_Q[now])
    agrees = [] if decode.cache == "none" else _agrees(lm, writing, infill, row, settings)
    start = 0 if infill else int(np.argmax(writing.written_at_L >= 0))
    end = start + len(generation.tokens)
    return Trace(title, [display(lm.tokenizer, int(id_)) for id_ in writing.tokens_L], writing.written_at_L.tolist(),
                 writing.block_L.tolist(), probability_L.tolist(), visible, candidates, agrees,
                 strategy or describe(decode), generation.nfe, end if end < len(writing.tokens_L) else None)


def compare(lm: Any, prompt: Any, strategies: Sequence[Mapping[str, Any]], *, infill: bool = False,
            num_candidates: int = 5, row: int = 0, **settings: Any) -> list[Trace]:
    """Traces of one prompt decoded with several strategies, for `write_page`.

    Args:
      lm: an `api.LanguageModel`.
      prompt: text or ids.
      strategies: for each trace, the fields of DecodeConfig that differ from `settings`.
      infill: fill the gaps of the prompt.
      num_candidates: candidates per masked column and step.
      row: row number of all results, which random draws depend on.
      **settings: fields of DecodeConfig for all strategies.

    Raises:
      InputError: the prompt or a setting is invalid, or nothing was written.

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


def _agrees(lm: Any, writing: _Writing, infill: bool, row: int, settings: dict[str, Any]) -> list[bool]:
    """For each column of the canvas, True if decoding without a cache writes the same token."""
    exact = {**settings, "cache": "none"}
    given_L = writing.written_at_L < 0
    if infill:
        masked_L = np.where(given_L, writing.tokens_L, lm.tokenizer.mask_id)
        result = lm.infill([masked_L.tolist()], rows=[row], **exact)[0]
    else:
        result = lm.generate([writing.tokens_L[: np.argmin(given_L)].tolist()], rows=[row], **exact)[0]
    tokens = writing.tokens_L.tolist()
    return [token == other for token, other in itertools.zip_longest(tokens, result.canvas)][: len(tokens)]


@functools.partial(jax.jit, static_argnames=("mask_id", "vocab_size", "never_ids", "cfg_scale", "num_candidates"))
def _top_candidates(logits_fn: LogitsFn, canvas: CanvasSlice, columns_BQ: jax.Array, chosen_BQ: jax.Array, *,
                    mask_id: int, vocab_size: int, never_ids: tuple[int, ...], cfg_scale: float, num_candidates: int,
                    ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(Most probable ids [B, Q, K], their log-probabilities [B, Q, K], those of the chosen ids [B, Q])."""
    logits_BQV, _ = guided_logits(logits_fn, canvas, columns_BQ, cfg_scale=cfg_scale, mask_id=mask_id)
    log_probs_BQV = log_softmax(mask_logits(logits_BQV, never_ids, vocab_size))
    log_probs_BQK, ids_BQK = jax.lax.top_k(log_probs_BQV, num_candidates)
    chosen_BQ1 = jnp.take_along_axis(log_probs_BQV, chosen_BQ[:, :, None], axis=-1)
    return ids_BQK, log_probs_BQK, chosen_BQ1[:, :, 0]


def display(tokenizer: Any, id_: int) -> str:
    """The text of one token: decoded alone, or its piece if that is not text (part of a character, a special token)."""
    text = tokenizer.decode([id_])
    return text if text and "\ufffd" not in text else tokenizer.id_to_piece(id_)
