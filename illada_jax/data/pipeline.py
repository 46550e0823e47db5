"""Batches of a training run with random access, read ahead through Grain.

The content of a row is a function of (config, data, step, row) alone (law 1): row r of step s is example
order[s·B + r]. A host asks for the rows that its devices hold; a resumed run asks for the step at which it stopped,
without any saved state.
"""

import abc
import os
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from illada_jax.config import Config
from illada_jax.data.batch import Batch
from illada_jax.data.corpus import Corpus
from illada_jax.data.shards import TokenStream
from illada_jax.errors import InputError

_BUFFERED_STEPS = 16
_RANDOM_LENGTH, _SPLIT = 1, 2  # purposes of random draws, part of the format of a run; see `Batches.step_draws`
_WEIGHT_UNITS = 2**40  # weights of a mixture as integers, so that nothing is rounded, however long the run


class Batches(abc.ABC):
    """The rows of every step.

    Attributes:
      fingerprint: identifies the training tokens.
    """

    fingerprint: str

    def __init__(self, config: Config, pad_id: int):
        self._config = config
        self._data = config.data
        self._pad_id = pad_id

    @abc.abstractmethod
    def rows(self, step: int, rows: Sequence[int] | np.ndarray) -> Batch:
        """The rows of a step, in the order asked for, as a Batch [len(rows), L]."""

    @abc.abstractmethod
    def epochs(self, step: int) -> dict[str, float]:
        """Epochs of each corpus after `step` steps, by its name."""

    def iterate(self, start_step: int, rows: Sequence[int] | np.ndarray) -> Iterator[Batch]:
        """Yields `rows(step, rows)` for start_step, start_step + 1, …, read ahead by threads. Never ends."""
        rows = np.asarray(rows)
        steps = grain.MapDataset.range(start_step, np.iinfo(np.int32).max).map(lambda step: self.rows(step, rows))
        threads = grain.ReadOptions(num_threads=self._data.num_threads, prefetch_buffer_size=_BUFFERED_STEPS)
        yield from steps.to_iter_dataset(threads)

    def heldout_windows(self, heldout: TokenStream, length: int, count: int) -> Batch:
        """Windows of the held-out tokens, all of them maskable, as a Batch [N, length].

        Args:
          heldout: the stream to cut.
          length: tokens of a window; the last window is padded.
          count: N, the number of windows, spread evenly; 0: all of them.

        Raises:
          InputError: nothing is held out.
        """
        available = num_windows(heldout.num_tokens, length)
        if not available:
            raise InputError("nothing is held out (config.data.heldout_fraction), so there is nothing to evaluate on")
        count = min(count or available, available)
        windows = [read_window(heldout, i * available // count, length) for i in range(count)]
        return pack(windows, length, self._pad_id, self._document_starts(windows))

    def step_draws(self, step: int, purpose: int) -> np.ndarray:
        """Uniform numbers [B, 2] in [0, 1) for all rows of a step, whichever rows are asked for."""
        generator = np.random.default_rng((self._config.seed, purpose, step))
        return generator.random((self._data.batch_size, 2))

    def length_draws(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a step to cut short, bool [B], and the positions of the cuts, float [B] in [0, 1) (config.data)."""
        draws_B2 = self.step_draws(step, _RANDOM_LENGTH)
        if self._data.random_length_of == "batch":
            draws_B2 = np.broadcast_to(draws_B2[0], draws_B2.shape)
        return draws_B2[:, 0] < self._data.random_length_probability, draws_B2[:, 1]

    def split(self, windows: list[np.ndarray], starts: list[np.ndarray], step: int, rows: list[int]
              ) -> list[np.ndarray]:
        """Segment starts of each row (see `pack`), with a uniform column 1 … T - 1 added to a random share of the rows.

        diffusion.split_probability is that share (iLLaDA paper: 30 %); `rows` are indices in the global batch.
        """
        if not self._config.diffusion.split_probability:
            return starts
        result = []
        draws_B2 = self.step_draws(step, _SPLIT)
        for window, columns, (chance, place) in zip(windows, starts, draws_B2[rows], strict=True):
            if chance < self._config.diffusion.split_probability and len(window) > 1:
                columns = np.append(columns, 1 + int(place * (len(window) - 1)))
            result.append(columns)
        return result

    def _document_starts(self, windows: list[np.ndarray]) -> list[np.ndarray]:
        """For each window the columns, besides 0, at which a document begins that is its own segment."""
        return [np.empty(0, np.int64)] * len(windows)


class Pipeline(Batches):
    """Windows of the corpora, mixed by weight, each corpus in a new random order in every epoch."""

    def __init__(self, config: Config, corpus: Corpus):
        """Plans the batches; reads nothing.

        Raises:
          InputError: a corpus does not fill one batch.
        """
        super().__init__(config, corpus.tokenizer.pad_id)
        self.fingerprint = corpus.fingerprint
        self._components = corpus.components
        self._num_windows = [num_windows(c.train.num_tokens, self._data.length) for c in corpus.components]
        for component, windows in zip(corpus.components, self._num_windows, strict=True):
            if windows < self._data.batch_size:
                raise InputError(f"corpus {component.name}: {component.train.num_tokens} training tokens are {windows} "
                                 f"windows of config.data.length = {self._data.length}: fewer than the rows of one "
                                 f"batch (config.data.batch_size = {self._data.batch_size})")
        self._mixture = Mixture([component.weight for component in corpus.components])
        self._orders = [self._shuffled(component) for component in range(len(corpus.components))]

    def rows(self, step: int, rows: Sequence[int] | np.ndarray) -> Batch:
        """See Batches."""
        rows = [int(row) for row in rows]
        windows = [self._window(step * self._data.batch_size + row) for row in rows]
        if self._data.random_length_probability:
            cut_B, place_B = self.length_draws(step)
            windows = [window[: 1 + int(place_B[row] * self._data.length)] if cut_B[row] else window
                       for window, row in zip(windows, rows, strict=True)]
        starts = self.split(windows, self._document_starts(windows), step, rows)
        return pack(windows, self._data.length, self._pad_id, starts)

    def epochs(self, step: int) -> dict[str, float]:
        """See Batches. Names are shortened by the directory that all corpora share."""
        names = [os.path.abspath(component.name) for component in self._components]
        parent = os.path.commonpath([os.path.dirname(name) for name in names])
        counts = self._mixture.counts(step * self._data.batch_size)
        return {os.path.relpath(name, parent): count / windows
                for name, count, windows in zip(names, counts, self._num_windows, strict=True)}

    def _shuffled(self, component: int) -> grain.MapDataset:
        """Indices of the windows of a corpus, without end. Grain draws a new order for every epoch."""
        seed = int(np.random.SeedSequence((self._config.seed, component)).generate_state(1)[0])
        return grain.MapDataset.range(self._num_windows[component]).shuffle(seed=seed).repeat()

    def _window(self, k: int) -> np.ndarray:
        """The tokens of example k of the run."""
        component, nth = self._mixture.place(k)
        return read_window(self._components[component].train, self._orders[component][nth], self._data.length)

    def _document_starts(self, windows: list[np.ndarray]) -> list[np.ndarray]:
        if not self._data.isolate_documents:
            return super()._document_starts(windows)
        # After every EOS, except one in the last column.
        return [np.flatnonzero(window[:-1] == self._components[0].train.eos_id) + 1 for window in windows]


class Mixture:
    """An infinite interleaving of corpora by weight with random access, exact to one example at any point."""

    def __init__(self, weights: Sequence[float]):
        self._shares = [max(1, round(weight / sum(weights) * _WEIGHT_UNITS)) for weight in weights]

    def place(self, k: int) -> tuple[int, int]:
        """The component of example k, and the number of earlier examples from that component."""
        before, after = self.counts(k), self.counts(k + 1)
        component = next(i for i, count in enumerate(before) if count != after[i])
        return component, before[component]

    def counts(self, k: int) -> list[int]:
        """The number of examples from each component among the first k."""
        counts, left = [], sum(self._shares)
        for share in self._shares:
            passed = k * (left - share) // left  # of k examples that reach this component, on to later ones
            counts.append(k - passed)
            k, left = passed, left - share
        return counts


def num_windows(num_tokens: int, length: int) -> int:
    """The number of windows of `length` that cover a stream. The last may be shorter; no token is left out."""
    return -(-num_tokens // length)


def read_window(stream: TokenStream, index: int, length: int) -> np.ndarray:
    """The tokens of window `index`, int32."""
    return stream.read(index * length, min((index + 1) * length, stream.num_tokens))


def pack(windows: Sequence[np.ndarray], length: int, pad_id: int, starts: Sequence[Sequence[int]] = ()) -> Batch:
    """Windows as rows.

    Args:
      windows: B arrays of int32 ids, each of at most `length`.
      length: L; shorter windows are padded: segment 0, not maskable, weight 0.
      pad_id: id of the padding.
      starts: for each row the columns, besides 0, where a segment begins; empty: rows are single segments.

    Returns:
      A Batch [B, L]: segments are numbered from 1, positions restart in each, weights are 1.
    """
    shape = len(windows), length
    tokens_BL = np.full(shape, pad_id, np.int32)
    used_B = np.array([len(window) for window in windows])
    for row, window in enumerate(windows):
        tokens_BL[row, : len(window)] = window
    column_L = np.arange(length, dtype=np.int32)
    real_BL = column_L < used_B[:, None]
    segments_BL = real_BL.astype(np.int32)
    positions_BL = np.where(real_BL, column_L, 0)
    if any(len(columns) for columns in starts):
        begins_BL = np.zeros(shape, bool)
        for row, columns in enumerate(starts):
            begins_BL[row, columns] = True
        begins_BL[:, 0] = True
        segments_BL *= np.cumsum(begins_BL, axis=1, dtype=np.int32)
        first_BL = np.maximum.accumulate(np.where(begins_BL, column_L, 0), axis=1)
        positions_BL = np.where(real_BL, column_L - first_BL, 0)
    return Batch(tokens_BL, real_BL, segments_BL, positions_BL, real_BL.astype(np.float32))
