"""SIGTERM (preemption) and SIGINT (Ctrl-C) as a clean stop between two steps."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def stop_signals() -> Iterator[tuple[Callable[[int], bool], Callable[[], None]]]:
    """Turns the first SIGTERM or SIGINT into a clean stop; a second one kills as usual.

    Yields:
      A function of the step, True if the run is to stop before it: on all processes at the same step, whichever of them
      received the signal. With several processes, jax.distributed handles SIGTERM and agrees on that step.
      A function that any process may call instead of receiving a signal.
    """
    received = []
    alone = jax.process_count() == 1

    def handle(*_: Any) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        stop()

    def stop() -> None:
        received.append(True)
        if not alone:
            os.kill(os.getpid(), signal.SIGTERM)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *([signal.SIGTERM] if alone else []))}
    for number in before:
        signal.signal(number, handle)
    try:
        yield lambda step: bool(received) if alone else multihost_utils.reached_preemption_sync_point(step), stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
