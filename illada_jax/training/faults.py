"""Steps whose numbers are bad: not finite, or a cross-entropy beyond a limit (config.faults).

The step itself leaves their updates out (`training/step.py`); what happens then is decided here, whenever the loop
fetches what the steps report, so that no step waits for the host. A rollback leads past the first bad step with a
checkpoint that every life of the run has: a run that was interrupted goes the same way again.
"""

import io
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from illada_jax.config import Config
from illada_jax.data.batches import Batches
from illada_jax.errors import InputError
from illada_jax.parallel import hosts
from illada_jax.training.step import StepMetrics

DIRECTORY = "bad_batches"


class FaultCounts(NamedTuple):
    """What a run has been through; part of its checkpoints.

    Attributes:
      skipped: steps whose update was left out.
      rollbacks: how often it went back to a checkpoint.
      rate: the factor of the learning rate since then.
    """

    skipped: int = 0
    rollbacks: int = 0
    rate: float = 1.0

    def metrics(self) -> dict[str, float]:
        """The numbers by name."""
        return {f"faults/{name}": value for name, value in self._asdict().items()}


class RollBack(Exception):
    """The run is to go on from a checkpoint, with the step after `step`."""

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step


class FaultWatch:
    """Counts bad steps, keeps their batches, and says what to do.

    Attributes:
      counts: up to now.
    """

    def __init__(self, config: Config, workdir: epath.Path, pipeline: Batches, counts: FaultCounts):
        self._faults = config.faults
        self._rows = np.arange(config.data.batch_size)
        self._workdir = workdir
        self._pipeline = pipeline
        self.counts = counts

    def judge(self, first: int, fetched: Sequence[StepMetrics], saved: int | None) -> None:
        """Looks at what the steps from `first` on report.

        Args:
          first: number of the first of these steps.
          fetched: what they report, in order.
          saved: step of the newest checkpoint, if there is one.

        Raises:
          InputError: one is bad, and the run is to halt.
          RollBack: one is bad, and the run is to go back.
        """
        for step, metrics in enumerate(fetched, first):
            if metrics.bad:
                cross_entropy = np.sum(metrics.sums.ce_K) / np.maximum(metrics.sums.masked, 1)
                numbers = {"loss": float(metrics.sums.loss / np.maximum(metrics.sums.weight, 1e-30)),
                           "cross_entropy": float(cross_entropy), "gradient_norm": float(metrics.gradient_norm)}
                self._decide(step, f"{', '.join(f'{name} {value:.4g}' for name, value in numbers.items())}; "
                                   f"its batch is in {self._keep_batch(step, numbers)}", saved, self._faults.action)

    def judge_state(self, step: int, is_finite: bool, saved: int | None) -> None:
        """Looks at the state after step `step`. Raises like `judge`; the state cannot be mended by skipping."""
        if not is_finite:
            action = "rollback" if self._faults.action == "rollback" else "halt"
            self._decide(step, "the state after its update is not finite", saved, action)

    def _decide(self, step: int, what: str, saved: int | None, action: str) -> None:
        what = f"bad numbers at step {step}: {what}"
        newest = "nothing has been saved yet" if saved is None else f"the newest checkpoint is that of step {saved}"
        used_up = self.counts.skipped + self.counts.rollbacks >= self._faults.max_times
        if action == "halt":
            raise InputError(
                f"{what}; {newest}. Type the same command again with --config.faults.action=skip to leave out the "
                "updates of bad steps, or with --config.faults.action=rollback --config.faults.rate_scale=0.5 to go "
                "back to a checkpoint, past the bad step, with half the learning rate")
        if used_up:
            raise InputError(
                f"{what}; {newest}. {self.counts.skipped} steps skipped and {self.counts.rollbacks} rollbacks are all "
                f"that config.faults.max_times = {self._faults.max_times} allows: type the same command again with "
                "a larger one, or with --config.faults.action=rollback --config.faults.rate_scale=0.5")
        if hosts.is_primary():
            print(f"warning: {what}; {'going back' if action == 'rollback' else 'its update is left out'}",
                  file=sys.stderr, flush=True)
        if action == "rollback":
            self.counts = self.counts._replace(rollbacks=self.counts.rollbacks + 1,
                                               rate=self.counts.rate * self._faults.rate_scale)
            raise RollBack(step)
        self.counts = self.counts._replace(skipped=self.counts.skipped + 1)

    def _keep_batch(self, step: int, numbers: dict[str, float]) -> epath.Path:
        """Writes the rows of a step, which any process can read again, with their numbers in the global batch."""
        path = self._workdir / DIRECTORY / f"{step}.npz"
        if hosts.is_primary():
            content = io.BytesIO()
            np.savez_compressed(content, step=step, rows=self._rows, **numbers,
                                **self._pipeline.rows(step, self._rows)._asdict())
            try:
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content.getvalue())
            except OSError as error:
                print(f"warning: {path} cannot be written: {error.strerror or error}", file=sys.stderr, flush=True)
        return path
