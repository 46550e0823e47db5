"""Batches of a corpus with random access: row r of step s is example order[s·B + r] (law 1), through Grain.

What a row holds is a function of (data config, seed, step, row) alone. A host asks for the rows that its devices hold,
a resumed run asks for the step at which it stopped; nothing is saved to make that work.
"""

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from illada_jax.config import Config
from illada_jax.data import packing
from illada_jax.data.batch import Batch
from illada_jax.data.corpus import Corpus
from illada_jax.data.shards import TokenStream
from illada_jax.errors import InputError

_BUFFERED_STEPS = 16


class Pipeline:
    """Windows of the corpus in a new random order every epoch.

    Attributes:
      fingerprint: identifies the tokens that are trained on.
    """

    def __init__(self, config: Config, corpus: Corpus):
        """Plans the batches; reads nothing.

        Raises:
          InputError: the corpus does not fill one batch.
        """
        self.fingerprint = corpus.fingerprint
        self._data = config.data
        self._pad_id = corpus.tokenizer.pad_id
        stream = corpus.train
        windows = packing.num_windows(stream.num_tokens, self._data.length)
        if windows < self._data.batch_size:
            raise InputError(f"the corpus has {stream.num_tokens} training tokens, {windows} windows of "
                             f"config.data.length = {self._data.length}: fewer than the config.data.batch_size = "
                             f"{self._data.batch_size} rows of one batch")
        # Grain draws a new order whenever the range starts over.
        self._order = grain.MapDataset.range(windows).shuffle(seed=config.seed).repeat()
        self._stream = stream

    def rows(self, step: int, rows: Sequence[int] | np.ndarray) -> Batch:
        """The rows of a step, in the order asked for, as a Batch [len(rows), L]."""
        first = step * self._data.batch_size
        indices = [self._order[first + int(row)] for row in rows]
        return self._windows(self._stream, indices, self._data.length)

    def iterate(self, start_step: int, rows: Sequence[int] | np.ndarray) -> Iterator[Batch]:
        """`rows(step, rows)` for start_step, start_step + 1, …, read ahead by threads. Never ends."""
        rows = np.asarray(rows)
        steps = grain.MapDataset.range(start_step, np.iinfo(np.int32).max).map(lambda step: self.rows(step, rows))
        threads = grain.ReadOptions(num_threads=self._data.num_threads, prefetch_buffer_size=_BUFFERED_STEPS)
        yield from steps.to_iter_dataset(threads)

    def heldout_windows(self, stream: TokenStream, length: int, count: int) -> Batch:
        """Windows of a held-out stream, as a Batch [N, length].

        Args:
          stream: what to cut.
          length: tokens of a window; the last one of the stream is padded.
          count: how many, spread evenly over the stream; 0: all of them.

        Raises:
          InputError: the stream is empty.
        """
        available = packing.num_windows(stream.num_tokens, length)
        if not available:
            raise InputError("nothing is held out (config.data.heldout_fraction), so there is nothing to evaluate on")
        count = min(count or available, available)
        return self._windows(stream, [i * available // count for i in range(count)], length)

    def _windows(self, stream: TokenStream, indices: Sequence[int], length: int) -> Batch:
        windows = [stream.read(*packing.window_bounds(index, stream.num_tokens, length)) for index in indices]
        starts = ()
        if self._data.isolate_documents:
            starts = [packing.document_starts(window, stream.eos_id) for window in windows]
        return packing.pack(windows, length, self._pad_id, starts)
