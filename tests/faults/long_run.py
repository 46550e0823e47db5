"""Trains a tiny model for many steps, with evaluations and checkpoints, and reports leaks.

Example:
  python -m tests.faults.long_run --steps=20000

Memory, open files, threads and unfinished checkpoints of the training process are sampled twice a second; step times
come from its metrics. Slopes are least-squares fits over all but the first fifth of the steps.
"""

import argparse
import os
import pathlib
import tempfile
import time

import numpy as np

from illada_jax.training.plateau import slope_and_stderr
from tests.faults import programs


def sample(pid: int, workdir: pathlib.Path) -> dict[str, float]:
    """Current resources of a process."""
    status = dict(line.split(":", 1) for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines())
    lines = programs.lines(workdir)
    checkpoints = workdir / "checkpoints"
    unfinished = [path for path in checkpoints.iterdir() if "tmp" in path.name] if checkpoints.is_dir() else []
    return {"step": lines[-1]["step"] if lines else 0, "memory, MiB": int(status["VmRSS"].split()[0]) / 1024,
            "open files": len(os.listdir(f"/proc/{pid}/fd")), "threads": int(status["Threads"]),
            "unfinished checkpoints": len(unfinished)}


def watch(directory: pathlib.Path, steps: int) -> tuple[list[dict[str, float]], list[dict]]:
    """Trains for `steps` steps; returns (samples, lines of metrics)."""
    programs.write_text(directory / "text")
    workdir = directory / "run"
    command = programs.train_command(
        directory, workdir, f"--config.train.steps={steps}", "--config.train.log_every=50", "--config.eval.every=500",
        "--config.checkpoint.every=200", "--config.train.plateau_window=2000", "--config.train.tensorboard=True")
    process = programs.start(command)
    samples = []
    while process.poll() is None:
        try:
            samples.append(sample(process.pid, workdir))
        except (OSError, KeyError):  # the process just ended
            break
        time.sleep(0.5)
    output = "".join(process.communicate())
    if process.returncode != 0:
        raise AssertionError(output)
    return samples, [line for line in programs.lines(workdir) if "train/tokens_per_second" in line]


def report(samples: list[dict[str, float]], lines: list[dict], steps: int, tokens: int) -> None:
    """Prints mean, maximum and slope of each quantity."""
    series = {name: [(s["step"], s[name]) for s in samples if s["step"] > steps / 5]
              for name in samples[0] if name != "step"}
    series["step, ms"] = [(line["step"], 1e3 * tokens / line["train/tokens_per_second"]) for line in lines
                          if line["step"] > steps / 5]
    print("| | mean | largest | slope per 10,000 steps |\n|---|---|---|---|")
    for name, points in series.items():
        x, y = np.array(points, float).T
        slope, error = slope_and_stderr(x, y)
        print(f"| {name} | {y.mean():.4g} | {y.max():.4g} | {1e4 * slope:+.3g} ± {1e4 * error:.2g} |")


def main() -> None:
    """Runs and reports."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.long_run", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20_000)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as directory:
        samples, lines = watch(pathlib.Path(directory), steps)
    report(samples, lines, steps, 8 * 32)


if __name__ == "__main__":
    main()
