"""Signals and a second trainer: checkpoints, exit codes, refusals."""

import pathlib
import signal
import time

from illada_jax.errors import EXIT_RESUMABLE
from tests.faults import programs


def told_to_stop(directory: pathlib.Path, workdir: pathlib.Path, number: signal.Signals) -> str:
    """Sends a signal during training and resumes; describes a failure, or returns an empty text."""
    command = programs.train_command(directory, workdir)
    process = _training(command, workdir, 3)
    process.send_signal(number)
    output = "".join(process.communicate(timeout=300))
    if process.returncode != EXIT_RESUMABLE:
        return f"exit code {process.returncode}: {output[-1000:]}"
    saved = programs.saved_steps(workdir)[-1]
    if f"Stopped and saved at step {saved};" not in output:
        return f"the newest checkpoint is {saved}, but: {output[-300:]}"
    output = programs.must([*command, f"--config.train.stop_step={saved + 1}"])
    steps = [line["step"] for line in programs.lines(workdir) if "train/learning_rate" in line]
    return "" if {saved, saved + 1} <= set(steps) else f"lines of metrics at {steps[-3:]}, saved at {saved}"


def second_trainer(directory: pathlib.Path, workdir: pathlib.Path) -> str:
    """Starts a second trainer in the same workdir; describes a failure, or returns an empty text."""
    command = programs.train_command(directory, workdir)
    first = _training(command, workdir, 1)
    code, output = programs.run(command)
    error = output.strip().splitlines()[-1]
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=300)
    if code != 2 or f"process {first.pid}" not in error or "is training in this workdir" not in error:
        return f"the second: exit code {code}: {error}"
    return "" if first.returncode == EXIT_RESUMABLE else f"the first: exit code {first.returncode}"


def _training(command: list[str], workdir: pathlib.Path, count: int):
    """Starts the command and waits for `count` further lines of metrics."""
    process = programs.start(command)
    lines = len(programs.lines(workdir))
    while len(programs.lines(workdir)) < lines + count:
        if process.poll() is not None:
            raise AssertionError("".join(process.communicate()))
        time.sleep(0.01)
    return process
