"""Batches of examples: iLLaDA's windows of concatenated examples and LLaDA's padded rows (papers, fine-tuning).

The order of an epoch is a permutation drawn from (seed, epoch). So the order of any epoch, and with it the cumulative
lengths, is known without replaying earlier epochs. Windows and batches cross the boundaries of epochs.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from illada_jax.config import Config
from illada_jax.data.batch import Batch
from illada_jax.data.corpus import Examples
from illada_jax.data.pipeline import Batches, pack
from illada_jax.data.shards import answer_spans

_ORDER, _TURN = 11, 12  # purposes of random draws: part of the format of a run
_CACHED_EPOCHS = 3


class Epoch(NamedTuple):
    """One pass over the examples: their indices in its order, and the cumulative tokens in that order, int64."""

    order_N: np.ndarray
    ends_N: np.ndarray


_Piece = tuple[int, int, int]  # an example, and its tokens [start, stop)


class _ExampleBatches(Batches):
    """The order of the examples and the end of the run, in either format.

    Attributes:
      units_per_epoch: tokens (windows) or examples (rows) of an epoch.
      units_per_step: likewise, of a step.
    """

    def __init__(self, config: Config, examples: Examples, units_per_epoch: int, units_per_step: int):
        super().__init__(config, examples.tokenizer.pad_id)
        self.fingerprint = examples.fingerprint
        self.units_per_epoch = units_per_epoch
        self.units_per_step = units_per_step
        self.epoch = functools.lru_cache(_CACHED_EPOCHS)(self._draw_epoch)
        self._examples = examples.train
        self._eos_id = examples.tokenizer.eos_id

    @property
    def num_steps(self) -> int:
        """Steps of config.train.epochs, or config.train.steps if epochs is 0."""
        if not self._config.train.epochs:
            return self._config.train.steps
        return -(-self._config.train.epochs * self.units_per_epoch // self.units_per_step)

    @property
    def _end(self) -> int | None:
        """Units after which the run ends; None if train.steps decides and the examples repeat without end."""
        return self._config.train.epochs * self.units_per_epoch or None

    def epochs(self, step: int) -> dict[str, float]:
        """See Batches."""
        units = step * self.units_per_step
        return {"examples": min(units, self._end or units) / self.units_per_epoch}

    def _draw_epoch(self, number: int) -> Epoch:
        order_N = np.random.default_rng((self._config.seed, _ORDER, number)).permutation(self._examples.num_documents)
        return Epoch(order_N, np.cumsum(self._examples.lengths_N[order_N]))


class ConcatenatedExamples(_ExampleBatches):
    """iLLaDA: windows of data.length over the concatenated examples of all epochs.

    Everything may be masked, prompts too (unless sft.mask_prompts is off: an ablation), but messages that are seen, not
    learnt. Window k begins at token k · length of that stream. Only the run's last window is padded; rows after it are
    empty.
    """

    def __init__(self, config: Config, examples: Examples):
        super().__init__(config, examples, examples.train.num_tokens, config.data.batch_size * config.data.length)

    def rows(self, step: int, rows: Sequence[int] | np.ndarray) -> Batch:
        """See Batches."""
        rows = [int(row) for row in rows]
        pieces = [self._pieces(step * self._data.batch_size + row) for row in rows]
        windows = [_join(self._examples.document, of_row, np.int32) for of_row in pieces]
        starts = [_example_starts(of_row) if self._data.isolate_documents else np.empty(0, np.int64)
                  for of_row in pieces]
        batch = pack(windows, self._data.length, self._pad_id, self.split(windows, starts, step, rows))
        read = self._examples.may_be_masked if self._config.sft.mask_prompts else self._examples.is_answer
        maskable_BL = pack([_join(read, of_row, np.int8) for of_row in pieces], self._data.length, 0).tokens_BL > 0
        return batch._replace(maskable_BL=maskable_BL, weights_BL=maskable_BL.astype(np.float32))

    def _pieces(self, index: int) -> list[_Piece]:
        """The examples in a window, in order."""
        position = index * self._data.length
        window_end = position + self._data.length
        if self._end is not None:
            window_end = min(window_end, self._end)
        pieces = []
        while position < window_end:
            number, within = divmod(position, self.units_per_epoch)
            epoch = self.epoch(number)
            place = int(np.searchsorted(epoch.ends_N, within, "right"))
            example = int(epoch.order_N[place])
            length = int(self._examples.lengths_N[example])
            start = within - (int(epoch.ends_N[place]) - length)
            stop = min(length, start + window_end - position)
            pieces.append((example, start, stop))
            position += stop - start
        return pieces


def _join(read: Callable[[int], np.ndarray], pieces: list[_Piece], dtype: type) -> np.ndarray:
    """Values per token of the pieces, concatenated, [T]."""
    return np.concatenate([np.empty(0, dtype), *(read(example)[start:stop] for example, start, stop in pieces)])


def _example_starts(pieces: list[_Piece]) -> np.ndarray:
    """Columns of a window where an example begins."""
    columns = itertools.accumulate((stop - start for _, start, stop in pieces), initial=0)
    return np.array([column for column, (_, start, _) in zip(columns, pieces, strict=False) if not start], np.int64)


class PaddedExamples(_ExampleBatches):
    """LLaDA: one example per row; the prompt is never masked, the answer is padded with EOS, which is learned.

    Rows are as long as the longest row of the GLOBAL batch, rounded up to a multiple of sft.bucket: a function
    of the step and the order, and the one exception to the law that a row does not depend on others. The weight of a
    position is 1 / (length of the answer with its padding), so each row weighs 1. One answer of a conversation is drawn
    in each epoch; the turns before it are the prompt, the turns after it are left out (LLaDA paper, appendix).
    """

    def __init__(self, config: Config, examples: Examples):
        super().__init__(config, examples, examples.train.num_documents, config.data.batch_size)

    def rows(self, step: int, rows: Sequence[int] | np.ndarray) -> Batch:
        """See Batches."""
        first = step * self._data.batch_size
        spans = [self._answer(first + row) for row in range(self._data.batch_size)]
        bucket = self._config.sft.bucket
        longest = max((stop for _, _, stop in filter(None, spans)), default=1)
        length = min(-(-longest // bucket) * bucket, self._data.length)
        cut_B, place_B = self.length_draws(step)
        windows, starts = [], []
        for row in map(int, rows):
            example, start, stop = spans[row] or (0, 0, 0)
            end = start + 1 + int(place_B[row] * (length - start)) if cut_B[row] else length
            window = np.full(end if spans[row] else 0, self._eos_id, np.int32)
            window[:stop] = self._examples.document(example)[: min(stop, end)]
            windows.append(window)
            starts.append(start)
        batch = pack(windows, length, self._pad_id)
        maskable_BL = batch.maskable_BL & (np.arange(length) >= np.array(starts)[:, None])
        weights_BL = maskable_BL / np.maximum(maskable_BL.sum(axis=1, keepdims=True), 1)
        return batch._replace(maskable_BL=maskable_BL, weights_BL=weights_BL.astype(np.float32))

    def _answer(self, k: int) -> tuple[int, int, int] | None:
        """The example of row k of the run and the columns [start, stop) of its answer; None after the run's end."""
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
