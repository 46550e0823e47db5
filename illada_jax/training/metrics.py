"""Metrics of a run: `metrics.jsonl` in the workdir and optionally TensorBoard events, written by one process.

Object storage cannot append: for a workdir such as gs://… metrics are written to a local directory and copied once a
minute, before every checkpoint and at the end.
"""

import contextlib
import functools
import json
import os
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from illada_jax.diffusion.objective import NUM_BUCKETS, LossSums
from illada_jax.errors import InputError, StorageError
from illada_jax.files import is_remote, parse_json, read_file, remove_leftovers, write_atomically

NAME = "metrics.jsonl"
_PUBLISH_SECONDS = 60.0


class MetricWriter:
    """Appends metrics to `workdir/metrics.jsonl`, one line per call. Use as a context manager.

    Its methods raise StorageError if the files cannot be written.
    """

    def __init__(self, workdir: epath.Path, start_step: int, tensorboard: bool, wandb: bool = False):
        """Opens the files and drops lines after `start_step`, where this process starts: it writes them again.

        `wandb` copies the TensorBoard events to Weights & Biases. Raises InputError if its package is not installed.
        """
        self._file = None
        self._events = None
        self._workdir, self._local = workdir, workdir
        if jax.process_index():
            return
        kept = [_encode(line) for line in read_lines(workdir) if line["step"] <= start_step] if start_step else []
        with self._writing():
            remove_leftovers(workdir / NAME)
            write_atomically(workdir / NAME, "".join(kept))
            if is_remote(workdir):
                self._local = epath.Path(tempfile.mkdtemp())
                (workdir / NAME).copy(self._local / NAME)
            self._published = time.monotonic()
            self._file = open(self._local / NAME, "a+", encoding="utf-8")  # noqa: SIM115
            if wandb:
                start_wandb(self._local)
            if tensorboard:
                self._events = _EventWriter(self._local, start_step + 1)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"{self._workdir / NAME}: cannot be written: {error.strerror or error}. Fix the cause, "
                               "then run the same command again") from error

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        # A failure to write that ends the run has already been reported.
        unless_reported = functools.partial(contextlib.suppress, *([] if kind is None else [StorageError]))
        for sink in (self._file, self._events):
            with unless_reported(), self._writing():
                if sink is not None:
                    sink.close()
        if self._local != self._workdir:
            with unless_reported():
                self.publish()
            self._local.rmtree()

    def write(self, step: int, metrics: dict[str, float | str]) -> None:
        """Writes numbers and texts of a step."""
        if self._file is None:
            return
        with self._writing():
            self._file.write(_encode({"step": step, **metrics}))
            self._file.flush()
            if self._events is not None:
                self._events.write(step, metrics)
        if time.monotonic() - self._published > _PUBLISH_SECONDS:
            self.publish()

    def restore_missing(self) -> list[str]:
        """Writes `metrics.jsonl` again if it was removed or replaced; returns its name, or nothing."""
        path = self._workdir / NAME
        if self._file is None or is_remote(path) or (path.exists() and os.fstat(self._file.fileno()).st_nlink):
            return []
        with self._writing():
            self._file.seek(0)  # a removed file can be read as long as it is open
            write_atomically(path, self._file.read())
            self._file.close()
            self._file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
        return [NAME]

    def publish(self) -> None:
        """Copies the metrics to a remote workdir; unpublished metrics are lost if the process dies."""
        if self._file is None or self._local == self._workdir:
            return
        with self._writing():
            for path in self._local.iterdir():
                path.copy(self._workdir / path.name, overwrite=True)
        self._published = time.monotonic()


def start_wandb(directory: epath.Path) -> None:
    """Starts Weights & Biases, which copies the TensorBoard events of a directory and ends with the process."""
    try:
        import wandb
    except ImportError as error:
        raise InputError("config.train.wandb = True: needs wandb: pip install 'illada_jax[wandb]'") from error
    wandb.init(sync_tensorboard=True)
    from tensorboardX import writer

    writer.EventFileWriter(os.fspath(directory)).close()  # it watches the directories of such writers


class _EventWriter:
    """TensorBoard events, written at once: the thread of SummaryWriter could not report a full disk."""

    def __init__(self, directory: epath.Path, first_step: int):
        """Opens a new file of events; TensorBoard ignores those of earlier files from `first_step` on."""
        # Imported here because it takes a second.
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2

        self._pb, self._summary = event_pb2, summary
        self._writer = event_file_writer.EventsWriter(os.fspath(directory / "events"))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=first_step, session_log=start))

    def write(self, step: int, metrics: dict[str, float | str]) -> None:
        """Writes numbers and texts of a step."""
        for name, value in metrics.items():
            summary = (self._summary.text(name, f"```\n{value}\n```") if isinstance(value, str)
                       else self._summary.scalar(name, value))
            self._writer.write_event(self._pb.Event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


def _encode(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def read_lines(workdir: epath.Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, in order; empty if there is no file.

    Invalid lines are dropped: a killed process may leave half of one. Raises InputError if the file cannot be read.
    """
    path, lines = workdir / NAME, []
    for text in read_file(path).split(b"\n") if path.exists() else ():  # bytes, as half a character is no text
        try:
            line = parse_json(text, NAME)
            if type(line["step"]) is int:  # true is no step
                lines.append(line)
        except (InputError, KeyError):
            continue
    return lines


def curve_over_p(sums: LossSums) -> dict[str, float]:
    """Cross-entropy (nats) and accuracy on masked tokens, and their number, by bucket of masking probability.

    A metric's name holds the middle of its bucket; buckets without masked tokens have no metrics.
    """
    curve = {}
    for k in np.flatnonzero(sums.masked_K):
        curve[f"train_by_p/masked_tokens/{_middle(k)}"] = float(sums.masked_K[k])
        curve[f"train_by_p/cross_entropy/{_middle(k)}"] = float(sums.ce_K[k] / sums.masked_K[k])
        curve[f"train_by_p/accuracy/{_middle(k)}"] = float(sums.correct_K[k] / sums.masked_K[k])
    return curve


def curves_over_p(metrics: dict[str, Any]) -> dict[float, tuple[float, float, float]]:
    """Inverse of `curve_over_p`: (masked tokens, cross-entropy, accuracy) by masking probability."""
    names = {middle: [f"train_by_p/{name}/{middle}" for name in ("masked_tokens", "cross_entropy", "accuracy")]
             for middle in map(_middle, range(NUM_BUCKETS))}
    return {float(middle): tuple(metrics[key] for key in keys) for middle, keys in names.items()
            if all(key in metrics for key in keys)}


def sums_of_curve(metrics: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(masked_K, ce_K) of LossSums from the metrics of `curve_over_p`; zeros for buckets without metrics."""
    curves = curves_over_p(metrics)
    rows = [curves.get(float(_middle(k)), (0.0, 0.0, 0.0)) for k in range(NUM_BUCKETS)]
    masked_K, mean_K, _ = np.array(rows).T
    return masked_K, masked_K * mean_K


def _middle(k: int) -> str:
    return f"{(k + 0.5) / NUM_BUCKETS:.2f}"
