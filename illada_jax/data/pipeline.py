"""Batches of a corpus with random access: row r of step s is example order[s·B + r] (law 1), through Grain.

What a row holds is a function of (data config, seed, step, row) alone. A host asks for the rows that its devices hold,
a resumed run asks for the step at which it stopped; nothing is saved to make that work.
"""

import os
from collections.abc import Sequence

import grain
import numpy as np

from illada_jax.config import Config
from illada_jax.data import packing
from illada_jax.data.batch import Batch
from illada_jax.data.batches import Batches
from illada_jax.data.corpus import Corpus
from illada_jax.data.mixture import Mixture
from illada_jax.data.shards import TokenStream
from illada_jax.errors import InputError


class Pipeline(Batches):
    """Windows of the corpora, mixed by weight, each corpus in a new random order every time it starts over.

    Attributes:
      fingerprint: identifies the tokens that are trained on.
    """

    def __init__(self, config: Config, corpus: Corpus):
        """Plans the batches; reads nothing.

        Raises:
          InputError: a corpus does not fill one batch.
        """
        super().__init__(config)
        self.fingerprint = corpus.fingerprint
        self._pad_id = corpus.tokenizer.pad_id
        self._components = corpus.components
        self._num_windows = [packing.num_windows(c.train.num_tokens, self._data.length) for c in corpus.components]
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
        windows = [self._example(step * self._data.batch_size + row) for row in rows]
        if self._data.random_length_probability:
            windows = self._shorten(windows, step, rows)
        starts = self.split(windows, self._document_starts(windows), step, rows)
        return packing.pack(windows, self._data.length, self._pad_id, starts)

    def epochs(self, step: int) -> dict[str, float]:
        """See Batches. A name is the part of the corpus's that is its own."""
        names = [os.path.abspath(component.name) for component in self._components]
        parent = os.path.commonpath([os.path.dirname(name) for name in names])
        counts = self._mixture.counts(step * self._data.batch_size)
        return {os.path.relpath(name, parent): count / windows
                for name, count, windows in zip(names, counts, self._num_windows, strict=True)}

    def heldout_windows(self, stream: TokenStream, length: int, count: int) -> Batch:
        """See Batches."""
        available = packing.num_windows(stream.num_tokens, length)
        if not available:
            raise InputError("nothing is held out (config.data.heldout_fraction), so there is nothing to evaluate on")
        count = min(count or available, available)
        windows = [self._read(stream, i * available // count, length) for i in range(count)]
        return packing.pack(windows, length, self._pad_id, self._document_starts(windows))

    def _shuffled(self, component: int) -> grain.MapDataset:
        """Windows of a corpus, endlessly. Grain draws a new order whenever the range starts over."""
        seed = int(np.random.SeedSequence((self._config.seed, component)).generate_state(1)[0])
        return grain.MapDataset.range(self._num_windows[component]).shuffle(seed=seed).repeat()

    def _example(self, k: int) -> np.ndarray:
        """The tokens of example k."""
        component, nth = self._mixture.place(k)
        return self._read(self._components[component].train, self._orders[component][nth], self._data.length)

    def _shorten(self, windows: list[np.ndarray], step: int, rows: list[int]) -> list[np.ndarray]:
        cut_B, place_B = self.length_draws(step)
        return [window[: 1 + int(place_B[row] * self._data.length)] if cut_B[row] else window
                for window, row in zip(windows, rows, strict=True)]

    def _document_starts(self, windows: list[np.ndarray]) -> list[np.ndarray]:
        if not self._data.isolate_documents:
            return [np.empty(0, np.int64)] * len(windows)
        eos_id = self._components[0].train.eos_id
        return [packing.document_starts(window, eos_id) for window in windows]

    def _read(self, stream: TokenStream, index: int, length: int) -> np.ndarray:
        return stream.read(*packing.window_bounds(index, stream.num_tokens, length))
