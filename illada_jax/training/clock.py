"""Where the time of a run goes (goodput), and a watchdog that says who holds it up."""

import collections
import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

from illada_jax.parallel import hosts

PHASES = ("startup", "data", "step", "evaluation", "checkpoint", "lost")
EXIT_HUNG = 75  # as after a preemption: the same command goes on from the newest checkpoint
_SECONDS = "goodput/{}_seconds"


class Clock:
    """Splits the wall-clock time of this process, and of the earlier lives of the run, into phases.

    `startup` is all before the first step, its compilation included; `data` the time in which the host waits for rows
    (the device may still be busy with the step before); `checkpoint` that in which saving holds up the loop; `lost`
    what earlier lives did after the checkpoint from which the run went on; `step` everything else.

    Attributes:
      phase: the present one.
      step: steps taken.
      entered: when (time.perf_counter) the phase or the step began.
    """

    def __init__(self, earlier: dict[str, float]):
        """Starts in `startup`. `earlier`: seconds by phase of the earlier lives."""
        self._seconds = collections.Counter(earlier)
        self.phase, self.step = "startup", 0
        self.entered = time.perf_counter()

    def enter(self, phase: str, step: int) -> None:
        """A phase begins, at a step; the one before ends."""
        now = time.perf_counter()
        self._seconds[self.phase] += now - self.entered
        self.phase, self.step, self.entered = phase, step, now

    def metrics(self) -> dict[str, float]:
        """Seconds by phase, and the share of the steps in all of them, up to now."""
        self.enter(self.phase, self.step)
        total = sum(self._seconds.values())
        share = self._seconds["step"] / total if total else 0.0
        return {"goodput/share": share, **{_SECONDS.format(phase): self._seconds[phase] for phase in PHASES}}


def earlier_seconds(lines: list[dict[str, Any]], start: int) -> dict[str, float]:
    """Seconds by phase of the lives that wrote `lines` of metrics; what lies after step `start` is lost."""
    def of(lines: list[dict[str, Any]]) -> dict[str, float]:
        timed = [line for line in lines if _SECONDS.format("step") in line]
        return {phase: timed[-1].get(_SECONDS.format(phase), 0.0) if timed else 0.0 for phase in PHASES}

    kept, everything = of([line for line in lines if line["step"] <= start]), of(lines)
    kept["lost"] += sum(everything.values()) - sum(kept.values())
    return kept


@contextlib.contextmanager
def watched(clock: Clock, patience: float) -> Iterator[None]:
    """While it lasts, threads tell the other processes what this one does, and look whether anything happens.

    After `patience` seconds without a new phase or step it says on stderr which process holds up the others. Where that
    is in the middle of a step, or while waiting for rows, it ends this process with EXIT_HUNG, so that whoever started
    it can start it again; evaluations, checkpoints and the start may take their time.

    Args:
      clock: of the loop.
      patience: seconds; 0: nobody watches.
    """
    over = threading.Event()

    def pulse() -> None:
        count = 0
        while not over.wait(hosts.PULSE_SECONDS):
            count += 1
            with contextlib.suppress(RuntimeError):  # the first process may be gone: `suspects` says so
                hosts.send_pulse(count, clock.phase, clock.step, time.perf_counter() - clock.entered)

    def watch() -> None:
        told = 0.0
        while not over.wait(min(patience / 4, 10.0)):
            entered, phase, step = clock.entered, clock.phase, clock.step
            if time.perf_counter() - entered < patience or told == entered:
                continue
            found = hosts.describe(hosts.stragglers()) or "no process stands out"
            if clock.entered != entered:
                continue
            told = entered
            print(f"error: nothing has happened for {time.perf_counter() - entered:.0f} s in {phase} of step {step:,} "
                  f"(config.train.watchdog_seconds = {patience:g}): {found}", file=sys.stderr, flush=True)
            if phase in ("data", "step"):
                hosts.hard_exit(EXIT_HUNG)

    def stay_with_first() -> None:
        if hosts.first_is_gone(over):
            print(f"error: process 0 of {jax.process_count()} is gone, in {clock.phase} of step {clock.step:,} here; "
                  "start the same command on all hosts to go on from the newest checkpoint", file=sys.stderr,
                  flush=True)
            hosts.hard_exit(EXIT_HUNG)

    works = [pulse, *([watch] if patience else []), *([] if hosts.is_primary() else [stay_with_first])]
    threads = [threading.Thread(target=work, name=work.__name__, daemon=True) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
