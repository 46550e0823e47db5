"""Batches of examples: iLLaDA's windows of concatenated examples, and LLaDA's padded rows (papers, fine-tuning).

The order of an epoch is a permutation drawn from (seed, epoch), so the order, and with it the cumulative lengths, of
any epoch is known without going through those before it. Windows and batches run on across the boundary of epochs.
"""

import abc
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from illada_jax.config import Config
from illada_jax.data import packing
from illada_jax.data.batch import Batch
from illada_jax.data.batches import Batches
from illada_jax.data.example_store import Examples, ExampleSet, answer_spans
from illada_jax.errors import InputError

_ORDER, _TURN = 11, 12  # purposes of random draws: part of the format of a run
_CACHED_EPOCHS = 3


class Epoch(NamedTuple):
    """One pass over the examples.

    Attributes:
      order_N: int64, the examples in the order in which they are seen.
      ends_N: int64, for each in that order, the tokens up to and with it.
    """

    order_N: np.ndarray
    ends_N: np.ndarray


class _ExampleBatches(Batches):
    """What both formats share: the order of the examples, and the end of the run."""

    def __init__(self, config: Config, examples: Examples):
        super().__init__(config)
        self.fingerprint = examples.fingerprint
        self._examples = examples.train
        self._pad_id = examples.tokenizer.pad_id
        self._eos_id = examples.tokenizer.eos_id
        self.epoch = functools.lru_cache(_CACHED_EPOCHS)(self._draw_epoch)

    @property
    @abc.abstractmethod
    def units_per_epoch(self) -> int:
        """What an epoch is counted in: tokens, or examples."""

    @property
    @abc.abstractmethod
    def units_per_step(self) -> int:
        """What a step takes of them."""

    @property
    def num_steps(self) -> int:
        """The steps of config.train.epochs; of config.train.steps, if that decides."""
        if not self._config.train.epochs:
            return self._config.train.steps
        return -(-self._config.train.epochs * self.units_per_epoch // self.units_per_step)

    @property
    def _end(self) -> int | None:
        """Units after which the run ends; None where train.steps decides and the examples go round for ever."""
        return self._config.train.epochs * self.units_per_epoch or None

    def epochs(self, step: int) -> dict[str, float]:
        """See Batches."""
        units = step * self.units_per_step
        return {"examples": min(units, self._end or units) / self.units_per_epoch}

    def heldout_windows(self, heldout: ExampleSet, length: int, count: int) -> Batch:
        """See Batches. In both formats: held-out examples one after the other, all of them maskable."""
        if not heldout.num_documents:
            raise InputError("nothing is held out (config.data.heldout_fraction), so there is nothing to evaluate on")
        stream = np.concatenate([heldout.document(i) for i in range(heldout.num_documents)])
        available = packing.num_windows(len(stream), length)
        count = min(count or available, available)
        bounds = [packing.window_bounds(i * available // count, len(stream), length) for i in range(count)]
        return packing.pack([stream[start:stop] for start, stop in bounds], length, self._pad_id)

    def _draw_epoch(self, number: int) -> Epoch:
        order_N = np.random.default_rng((self._config.seed, _ORDER, number)).permutation(self._examples.num_documents)
        return Epoch(order_N, np.cumsum(self._examples.lengths_N[order_N]))


class ConcatenatedExamples(_ExampleBatches):
    """iLLaDA: windows of data.length over the examples of all epochs put end to end.

    Everything may be masked, prompts too (unless sft.mask_prompts is off: an ablation).

    Window k begins at token k · length of that stream. Only the run's last window is padded; rows beyond it are empty.
    """

    @property
    def units_per_epoch(self) -> int:
        """Tokens."""
        return self._examples.num_tokens

    @property
    def units_per_step(self) -> int:
        """Tokens."""
        return self._data.batch_size * self._data.length

    def rows(self, step: int, rows: Sequence[int] | np.ndarray) -> Batch:
        """See Batches."""
        rows = [int(row) for row in rows]
        cut = [self._window(step * self._data.batch_size + row) for row in rows]
        windows, answers, starts = (list(column) for column in zip(*cut, strict=True))
        if not self._data.isolate_documents:
            starts = [np.empty(0, np.int64)] * len(rows)
        batch = packing.pack(windows, self._data.length, self._pad_id, self.split(windows, starts, step, rows))
        if self._config.sft.mask_prompts:
            return batch
        maskable = np.zeros(batch.maskable_BL.shape, bool)
        for row, is_answer in zip(maskable, answers, strict=True):
            row[: len(is_answer)] = is_answer
        return batch._replace(maskable_BL=maskable, weights_BL=maskable.astype(np.float32))

    def _window(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The tokens of a window, which of them are answers, and the columns where an example begins."""
        position = index * self._data.length
        stop = position + self._data.length
        if self._end is not None:
            stop = min(stop, self._end)
        pieces, answers, starts, filled = [np.empty(0, np.int32)], [np.empty(0, bool)], [], 0
        while position < stop:
            number, within = divmod(position, self.units_per_epoch)
            epoch = self.epoch(number)
            place = int(np.searchsorted(epoch.ends_N, within, "right"))
            example = self._examples.document(epoch.order_N[place])
            skipped = within - (int(epoch.ends_N[place]) - len(example))
            piece = example[skipped : skipped + stop - position]
            answers.append(self._examples.is_answer(epoch.order_N[place])[skipped : skipped + len(piece)])
            if not skipped:
                starts.append(filled)
            pieces.append(piece)
            filled += len(piece)
            position += len(piece)
        return np.concatenate(pieces), np.concatenate(answers), np.asarray(starts, np.int64)


class PaddedExamples(_ExampleBatches):
    """LLaDA: an example a row; the prompt is never masked, the answer is padded with EOS, which is learnt.

    Rows are as long as the longest of the GLOBAL batch, rounded up to a multiple of sft.bucket: a function of the step
    and the order, and the one exception to the law that a row does not depend on its neighbours. A position weighs 1 /
    (length of the answer with its padding), so each row weighs 1. Of a conversation with several answers one is drawn
    each epoch; what comes before it is the prompt and what comes after it is left out (LLaDA paper, appendix).
    """

    @property
    def units_per_epoch(self) -> int:
        """Examples."""
        return self._examples.num_documents

    @property
    def units_per_step(self) -> int:
        """Examples."""
        return self._data.batch_size

    def rows(self, step: int, rows: Sequence[int] | np.ndarray) -> Batch:
        """See Batches."""
        first = step * self._data.batch_size
        spans = [self._answer(first + row) for row in range(self._data.batch_size)]
        bucket = self._config.sft.bucket
        longest = max((stop for _, _, stop in filter(None, spans)), default=1)
        length = min(-(-longest // bucket) * bucket, self._data.length)
        tokens = np.full((len(rows), length), self._pad_id, np.int32)
        maskable = np.zeros((len(rows), length), bool)
        segments = np.zeros((len(rows), length), np.int32)
        cut_B, place_B = self.length_draws(step)
        for place, row in enumerate(map(int, rows)):
            if spans[row] is None:
                continue
            example, start, stop = spans[row]
            end = start + 1 + int(place_B[row] * (length - start)) if cut_B[row] else length
            tokens[place, :end] = self._eos_id
            tokens[place, : min(stop, end)] = self._examples.document(example)[: min(stop, end)]
            maskable[place, start:end] = True
            segments[place, :end] = 1
        positions = np.where(segments, np.arange(length, dtype=np.int32), 0)
        weights = maskable / np.maximum(maskable.sum(axis=1, keepdims=True), 1)
        return Batch(tokens, maskable, segments, positions, weights.astype(np.float32))

    def _answer(self, k: int) -> tuple[int, int, int] | None:
        """The example of row k of the run, with the columns [start, stop) of the answer that is learnt."""
        if self._end is not None and k >= self._end:
            return None
        number, within = divmod(k, self._examples.num_documents)
        example = int(self.epoch(number).order_N[within])
        spans = answer_spans(self._examples.is_answer(example))
        turn = 0
        if len(spans) > 1:
            turn = np.random.default_rng((self._config.seed, _TURN, number, example)).integers(len(spans))
        return example, int(spans[turn][0]), int(spans[turn][1])


def example_batches(config: Config, examples: Examples) -> ConcatenatedExamples | PaddedExamples:
    """The batches of config.sft.format."""
    return (ConcatenatedExamples if config.sft.format == "illada" else PaddedExamples)(config, examples)
