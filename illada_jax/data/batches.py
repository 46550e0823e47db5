"""What the training loop asks for its batches: rows of a step, by random access (law 1), read ahead through Grain."""

import abc
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from illada_jax.config import Config
from illada_jax.data.batch import Batch

_BUFFERED_STEPS = 16
RANDOM_LENGTH, SPLIT = 1, 2  # purposes of random draws, part of the format of a run; see `step_draws`


class Batches(abc.ABC):
    """Rows of every step. What a row holds is a function of (config, data, step, row) alone.

    Attributes:
      fingerprint: identifies the tokens that are trained on.
    """

    fingerprint: str

    def __init__(self, config: Config):
        self._config = config
        self._data = config.data

    @abc.abstractmethod
    def rows(self, step: int, rows: Sequence[int] | np.ndarray) -> Batch:
        """The rows of a step, in the order asked for, as a Batch [len(rows), L]."""

    @abc.abstractmethod
    def epochs(self, step: int) -> dict[str, float]:
        """How often each corpus has been gone through after `step` steps, by name."""

    @abc.abstractmethod
    def heldout_windows(self, heldout, length: int, count: int) -> Batch:
        """Windows of what is held out, as a Batch [N, length].

        Args:
          heldout: what to cut.
          length: tokens of a window; the last one is padded.
          count: how many, spread evenly; 0: all of them.

        Raises:
          InputError: there is nothing.
        """

    def iterate(self, start_step: int, rows: Sequence[int] | np.ndarray) -> Iterator[Batch]:
        """`rows(step, rows)` for start_step, start_step + 1, …, read ahead by threads. Never ends."""
        rows = np.asarray(rows)
        steps = grain.MapDataset.range(start_step, np.iinfo(np.int32).max).map(lambda step: self.rows(step, rows))
        threads = grain.ReadOptions(num_threads=self._data.num_threads, prefetch_buffer_size=_BUFFERED_STEPS)
        yield from steps.to_iter_dataset(threads)

    def step_draws(self, step: int, purpose: int) -> np.ndarray:
        """Uniform numbers [B, 2] in [0, 1) for all rows of a step: a row does not depend on which are asked for."""
        generator = np.random.default_rng((self._config.seed, purpose, step))
        return generator.random((self._data.batch_size, 2))

    def length_draws(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Which rows of a step are cut short, and where: bool [B] and float [B] in [0, 1) (config.data)."""
        draws_B2 = self.step_draws(step, RANDOM_LENGTH)
        if self._data.random_length_of == "batch":
            draws_B2 = np.broadcast_to(draws_B2[0], draws_B2.shape)
        return draws_B2[:, 0] < self._data.random_length_probability, draws_B2[:, 1]

    def split(self, windows: list[np.ndarray], starts: list[np.ndarray], step: int, rows: list[int]
              ) -> list[np.ndarray]:
        """Adds a cut at 1 … T - 1, uniformly, to the windows that are drawn (iLLaDA paper: 30 % of them).

        Args:
          windows: tokens of the rows.
          starts: for each row the columns where a segment begins.
          step: the step.
          rows: their numbers in the global batch.
        """
        if not self._config.diffusion.split_probability:
            return starts
        result = []
        draws_B2 = self.step_draws(step, SPLIT)
        for window, columns, (chance, place) in zip(windows, starts, draws_B2[rows], strict=True):
            if chance < self._config.diffusion.split_probability and len(window) > 1:
                columns = np.append(columns, 1 + int(place * (len(window) - 1)))
            result.append(columns)
        return result
