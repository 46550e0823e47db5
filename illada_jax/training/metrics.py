"""Where metrics go: `metrics.jsonl` in the workdir and, by setting, TensorBoard events. One process writes."""

import json
import os
from typing import Any

import jax
from etils import epath


class MetricWriter:
    """Appends metrics to `workdir/metrics.jsonl`, one line a call. Use as a context manager."""

    def __init__(self, workdir: epath.Path, start_step: int, tensorboard: bool):
        """Opens the files; lines of an earlier life of the run that lie after `start_step` are dropped.

        Args:
          workdir: the working directory.
          start_step: the step at which this process starts.
          tensorboard: also write events.
        """
        self._file = None
        self._events = None
        if jax.process_index():
            return
        path = workdir / "metrics.jsonl"
        kept = _lines_up_to(path.read_text(), start_step) if start_step and path.exists() else []
        partial = workdir / "metrics.jsonl.partial"
        partial.write_text("".join(line + "\n" for line in kept))
        partial.replace(path)
        self._file = path.open("a")
        if tensorboard:
            # The import takes a second: only those who want it pay.
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(os.fspath(workdir), purge_step=start_step + 1)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        for sink in (self._file, self._events):
            if sink is not None:
                sink.close()

    def write(self, step: int, metrics: dict[str, float | str]) -> None:
        """Writes numbers and texts under the given step."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **metrics}, ensure_ascii=False) + "\n")
        self._file.flush()
        if self._events is None:
            return
        for name, value in metrics.items():
            if isinstance(value, str):
                self._events.add_text(name, f"```\n{value}\n```", step)
            else:
                self._events.add_scalar(name, value, step)
        self._events.flush()


def _lines_up_to(text: str, step: int) -> list[str]:
    """The lines of at most `step`. What is no line of metrics is dropped: a killed process may leave half of one."""
    kept = []
    for line in text.split("\n"):  # not splitlines: samples may hold U+2028
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, TypeError, KeyError):
            continue
    return kept
