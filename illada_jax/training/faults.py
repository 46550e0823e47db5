"""Bad steps: their numbers are not finite, or their cross-entropy exceeds a limit (config.faults).

The step itself skips the update (`training/step.py`). The reaction is decided here when the loop fetches the metrics of
several steps, so that no step waits for the host. A rollback restores a scheduled checkpoint, which a run has
whether it was interrupted or not: so an interrupted run takes the same path.
"""

import dataclasses
import io
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from illada_jax.config import Config
from illada_jax.data.pipeline import Batches
from illada_jax.errors import InputError
from illada_jax.files import write_atomically
from illada_jax.parallel import hosts
from illada_jax.training.step import StepMetrics

DIRECTORY = "bad_batches"


class FaultCounts(NamedTuple):
    """Faults of a run so far; part of its checkpoints."""

    skipped: int = 0  # steps without an update
    rollbacks: int = 0  # restorations of a checkpoint
    rate: float = 1.0  # current factor of the learning rate

    def metrics(self) -> dict[str, float]:
        """The counts by name."""
        return {f"faults/{name}": value for name, value in self._asdict().items()}


@dataclasses.dataclass(eq=False)  # an exception must be hashable
class RollBack(Exception):
    """Request to restore a checkpoint and to continue with the step after `step`."""

    step: int


class FaultWatch:
    """Counts bad steps in `counts`, writes their batches to disk and decides on the reaction."""

    def __init__(self, config: Config, workdir: epath.Path, pipeline: Batches, counts: FaultCounts):
        self._faults = config.faults
        self._rows = np.arange(config.data.batch_size)
        self._workdir = workdir
        self._pipeline = pipeline
        self.counts = counts

    def judge(self, first: int, fetched: Sequence[StepMetrics], saved: int | None) -> None:
        """Checks the metrics of consecutive steps from `first`. `saved` is the step of the newest checkpoint, if any.

        Raises:
          InputError: a step is bad, and the run must halt.
          RollBack: a step is bad, and the run must roll back.
        """
        for step, metrics in enumerate(fetched, first):
            if metrics.bad:
                cross_entropy = np.sum(metrics.sums.ce_K) / np.maximum(metrics.sums.masked, 1)
                numbers = {"loss": float(metrics.sums.loss / np.maximum(metrics.sums.weight, 1e-30)),
                           "cross_entropy": float(cross_entropy), "gradient_norm": float(metrics.gradient_norm)}
                self._decide(step, f"{', '.join(f'{name} {value:.4g}' for name, value in numbers.items())}; "
                                   f"its batch is in {self._keep_batch(step, numbers)}", saved, self._faults.action)

    def judge_state(self, step: int, is_finite: bool, saved: int | None) -> None:
        """Checks the state after step `step`. Raises like `judge`; it halts where `judge` would skip."""
        if not is_finite:
            action = "rollback" if self._faults.action == "rollback" else "halt"
            self._decide(step, "the state after its update is not finite", saved, action)

    def _decide(self, step: int, what: str, saved: int | None, action: str) -> None:
        what = f"bad numbers at step {step}: {what}"
        newest = "nothing has been saved yet" if saved is None else f"the newest checkpoint is from step {saved}"
        if action == "halt":
            raise InputError(
                f"{what}; {newest}. Run the same command with --config.faults.action=skip to skip the updates of bad "
                "steps, or with --config.faults.action=rollback --config.faults.rate_scale=0.5 to continue from a "
                "checkpoint, past the bad step, with half the learning rate")
        if self.counts.skipped + self.counts.rollbacks >= self._faults.max_times:
            raise InputError(
                f"{what}; {newest}. {self.counts.skipped} skipped steps and {self.counts.rollbacks} rollbacks reach "
                f"config.faults.max_times = {self._faults.max_times}: run the same command with a larger limit, or "
                "with --config.faults.action=rollback --config.faults.rate_scale=0.5")
        if hosts.is_primary():
            print(f"warning: {what}; {'rolling back' if action == 'rollback' else 'its update is skipped'}",
                  file=sys.stderr, flush=True)
        if action == "rollback":
            self.counts = self.counts._replace(rollbacks=self.counts.rollbacks + 1,
                                               rate=self.counts.rate * self._faults.rate_scale)
            raise RollBack(step)
        self.counts = self.counts._replace(skipped=self.counts.skipped + 1)

    def _keep_batch(self, step: int, numbers: dict[str, float]) -> epath.Path:
        """Writes the batch of a step with its numbers; returns the path. The primary process reads all rows again."""
        path = self._workdir / DIRECTORY / f"{step}.npz"
        if hosts.is_primary():
            content = io.BytesIO()
            np.savez_compressed(content, step=step, rows=self._rows, **numbers,
                                **self._pipeline.rows(step, self._rows)._asdict())
            try:
                path.parent.mkdir(exist_ok=True)
                write_atomically(path, content.getvalue())
            except OSError as error:
                print(f"warning: cannot write {path}: {error.strerror or error}", file=sys.stderr, flush=True)
        return path
