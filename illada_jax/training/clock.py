"""The time of a run by phase (goodput), and a watchdog that ends a process that makes no progress."""

import collections
import contextlib
import faulthandler
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

from illada_jax import console
from illada_jax.errors import EXIT_RESUMABLE

PHASES = ("startup", "data", "step", "evaluation", "checkpoint", "lost")
LONG_PHASE = 10
_SECONDS = "goodput/{}_seconds"


class Clock:
    """Splits the wall-clock time of this process and of the run's earlier processes into phases.

    `startup` lasts until the first step, its compilation included. In `data` the host waits for rows (the device may
    still compute the previous step). In `checkpoint` saving blocks the loop. `lost` is the time of earlier processes
    after the checkpoint from which the run resumed. `step` is everything else.
    """

    def __init__(self, earlier: dict[str, float]):
        """Starts in `startup`. `earlier`: seconds by phase of the run's earlier processes."""
        self._seconds = collections.Counter(earlier)
        self.phase, self.step = "startup", 0
        self.entered = time.perf_counter()  # the current phase or step

    def enter(self, phase: str, step: int) -> None:
        """Ends the current phase and begins `phase` at `step`."""
        now = time.perf_counter()
        self._seconds[self.phase] += now - self.entered
        # In this order: the watchdog, which reads `phase` first, never sees an old time with a new phase.
        self.entered, self.step, self.phase = now, step, phase

    def metrics(self) -> dict[str, float]:
        """Seconds by phase so far, and the share of `step` in their sum."""
        self.enter(self.phase, self.step)
        total = sum(self._seconds.values())
        share = self._seconds["step"] / total if total else 0.0
        return {"goodput/share": share, **{_SECONDS.format(phase): self._seconds[phase] for phase in PHASES}}


def earlier_seconds(lines: list[dict[str, Any]], start: int) -> dict[str, float]:
    """Seconds by phase of the processes that wrote `lines` of metrics; time after step `start` counts as lost."""
    def of(lines: list[dict[str, Any]]) -> dict[str, float]:
        timed = [line for line in lines if _SECONDS.format("step") in line]
        return {phase: timed[-1].get(_SECONDS.format(phase), 0.0) if timed else 0.0 for phase in PHASES}

    kept, everything = of([line for line in lines if line["step"] <= start]), of(lines)
    kept["lost"] += sum(everything.values()) - sum(kept.values())
    return kept


@contextlib.contextmanager
def watchdog(clock: Clock, seconds: float) -> Iterator[None]:
    """Ends this process with EXIT_RESUMABLE when no step ends for too long within the context.

    Start-up, evaluations and checkpoints may take LONG_PHASE times as long as a step. A message and the stacks of all
    threads go to stderr first. JAX notices the end and aborts the other processes. 0 seconds disable the watchdog.
    """
    closed = threading.Event()

    def watch() -> None:
        while not closed.wait(min(seconds / 4, 10.0)):
            phase, step, waited = clock.phase, clock.step, time.perf_counter() - clock.entered
            if waited > seconds * (1 if phase in ("data", "step") else LONG_PHASE):
                print(f"error: process {jax.process_index()} on {socket.gethostname()}: no progress for {waited:.0f} s "
                      f"in phase {phase} of step {step:,} (config.train.watchdog_seconds = {seconds:g}); restart all "
                      "processes. Its stacks:", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(sys.__stderr__)
                console.hard_exit(EXIT_RESUMABLE)

    if seconds:
        threading.Thread(target=watch, name="watchdog", daemon=True).start()
    try:
        yield
    finally:
        closed.set()
