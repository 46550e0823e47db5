"""Traces: the states of a canvas, rebuilt from the steps that wrote its columns, with candidates.

The network evaluates the rebuilt states again to find the candidates, so that decoding does not have to record them.

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


def make_trace(lm: Any, generation: Any, *, title: str = "", strategy: str = "", infill: bool = False,
               num_candidates: int = 5, row: int = 0, **settings: Any) -> Trace:
    """The trace of a result, for one network evaluation per step.

    A cache approximates: if one was used, the row is decoded again without it to measure their agreement.

    `title` and `strategy` (by default the settings that decide the order of writing) are those of Trace; `infill`,
    `row` and the settings are those of the call that gave the `api.Generation`. The trace holds `num_candidates` for
    each masked column of a step.

    Raises:
      InputError: nothing was written.
    """
    decode = lm.decode_settings(settings)
    ids = SpecialIds.of(lm.tokenizer, decode)
    tokens_L, step_L = np.asarray(generation.canvas, np.int32), np.asarray(generation.canvas_step)
    num_steps = int(step_L.max(initial=-1)) + 1
    if not num_steps:
        raise InputError("trace: nothing was written")
    written_at_L = np.where((step_L < 0) & (tokens_L == ids.mask), num_steps, step_L)
    given_L = written_at_L < 0
    block_L = np.where(given_L, -1, (np.cumsum(~given_L) - 1) // decode.block_length)
    columns_L = np.arange(len(tokens_L), dtype=np.int32)
    rules = make_rules(decode, ids, infill, make_init_cache(lm.config.model))
    top_candidates = functools.partial(
        _top_candidates, lm.logits_fn, mask_id=ids.mask, vocab_size=ids.vocab_size, never_ids=rules.suppressed_ids,
        cfg_scale=decode.cfg_scale, num_candidates=num_candidates)
    grows = (decode.length == "variable" or decode.cache == "append") and not infill
    query_length = min(decode.block_length, int(np.sum(~given_L)))

    probability_L = np.where(given_L, 1.0, 0.0)
    visible, candidates = [], []
    for step in range(num_steps):
        masked_L = written_at_L >= step
        in_block_L = block_L == block_L[masked_L].min()
        active = np.flatnonzero(masked_L & in_block_L)
        visible.append(int(np.flatnonzero(in_block_L)[-1]) + 1 if grows else len(masked_L))
        # The canvas before the step, as a batch of one row. A block that grows it is guided with all before it hidden.
        hidden_L = columns_L < np.argmax(in_block_L) if grows else given_L
        state = np.where(masked_L, ids.mask, tokens_L), columns_L, (columns_L < visible[-1]).astype(np.int32), hidden_L
        columns = np.resize(active, query_length)  # one shape for all steps
        found = top_candidates(CanvasSlice(*(x_L[None] for x_L in state)), columns[None], tokens_L[columns][None])
        ids_QK, log_probs_QK, chosen_log_probs_Q = (x[0, : len(active)] for x in jax.device_get(found))
        candidates.append({int(column): [Candidate(display(lm.tokenizer, int(id_)), float(prob))
                                         for id_, prob in zip(ids_K, probs_K, strict=True)]
                           for column, ids_K, probs_K in zip(active, ids_QK, np.exp(log_probs_QK), strict=True)})
        now = written_at_L[active] == step
        probability_L[active[now]] = np.exp(chosen_log_probs_Q[now])
    agrees = [] if decode.cache == "none" else _agrees(lm, tokens_L, given_L, infill, row, settings)
    end = (0 if infill else int(np.argmin(given_L))) + len(generation.tokens)
    return Trace(title, [display(lm.tokenizer, int(id_)) for id_ in tokens_L], written_at_L.tolist(), block_L.tolist(),
                 probability_L.tolist(), visible, candidates, agrees, strategy or describe(decode), generation.nfe,
                 end if end < len(tokens_L) else None)


def compare(lm: Any, prompt: Any, strategies: Sequence[Mapping[str, Any]], *, infill: bool = False,
            num_candidates: int = 5, row: int = 0, **settings: Any) -> list[Trace]:
    """Traces of one prompt decoded with several strategies, for `write_page`.

    A strategy holds the fields of DecodeConfig that differ from `settings`. All results have one row number, on which
    random draws depend. For `infill`, the prompt has gaps.

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
    title = prompt if isinstance(prompt, str) else lm.tokenizer.decode(prompt)
    results = [lm.generate([prompt], infill=infill, rows=[row], **each)[0] for each in all_settings]
    return [make_trace(lm, result, title=title, strategy=strategy, infill=infill, num_candidates=num_candidates,
                       row=row, **each)
            for result, each, strategy in zip(results, all_settings, words, strict=True)]


def _agrees(lm: Any, tokens_L: np.ndarray, given_L: np.ndarray, infill: bool, row: int,
            settings: dict[str, Any]) -> list[bool]:
    """For each column of the canvas, True if decoding without a cache writes the same token."""
    prompt_L = np.where(given_L, tokens_L, lm.tokenizer.mask_id) if infill else tokens_L[: np.argmin(given_L)]
    result = lm.generate([prompt_L.tolist()], infill=infill, rows=[row], **{**settings, "cache": "none"})[0]
    tokens = tokens_L.tolist()
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
    """The text of one token behind others, or its piece if it is not text (part of a character, a special token)."""
    text = tokenizer.to_bytes([id_]).decode(errors="replace")
    return text if text and "\ufffd" not in text else tokenizer.id_to_piece(id_)
