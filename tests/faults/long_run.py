"""Trains a tiny model for many steps, with evaluations and checkpoints, and reports leaks.

Example:
  python -m tests.faults.long_run --steps=30000 --save_every=1000

Memory, open files, threads and unfinished checkpoints of the training process are sampled twice a second; step times
come from its metrics. Slopes are least-squares fits over all but the first tenth of the steps.
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
    # Without pages of files, which the system drops and reads again.
    return {"step": lines[-1]["step"] if lines else 0, "memory, MiB": int(status["RssAnon"].split()[0]) / 1024,
            "open files": len(os.listdir(f"/proc/{pid}/fd")), "threads": int(status["Threads"]),
            "unfinished checkpoints": len(unfinished)}


def watch(directory: pathlib.Path, steps: int, save_every: int) -> tuple[list[dict[str, float]], list[dict]]:
    """Trains for `steps` steps on the text in `directory`; returns (samples, lines of metrics)."""
    workdir = directory / f"long-{save_every}"
    command = programs.train_command(
        directory, workdir, f"--config.train.steps={steps}", "--config.train.log_every=100", "--config.eval.every=1000",
        f"--config.checkpoint.every={save_every}", "--config.train.plateau_window=2000",
        "--config.train.tensorboard=True")
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


def report(samples: list[dict[str, float]], lines: list[dict], steps: int, tokens: int) -> str:
    """Mean, maximum and slope of each quantity, as a Markdown table."""
    series = {name: [(s["step"], s[name]) for s in samples if s["step"] > steps / 10]
              for name in samples[0] if name != "step"}
    series["step, ms"] = [(line["step"], 1e3 * tokens / line["train/tokens_per_second"]) for line in lines
                          if line["step"] > steps / 10]
    rows = ["| | mean | largest | slope per 10,000 steps |", "|---|---|---|---|"]
    for name, points in series.items():
        x, y = np.array(points, float).T
        slope, error = slope_and_stderr(x, y)
        rows.append(f"| {name} | {y.mean():.4g} | {y.max():.4g} | {1e4 * slope:+.3g} ± {1e4 * error:.2g} |")
    return "\n".join(rows)


def growth(samples: list[dict[str, float]], steps: int) -> tuple[float, float]:
    """Growth of the memory in MiB per 10,000 steps after the first tenth of the steps, and its standard error.

    Of the least in each thirtieth of the steps: a save under way, and a step that waits for a processor, hold memory
    for a while.
    """
    least: dict[float, float] = {}
    for s in samples:
        if s["step"] > steps / 10:
            window = 30 * s["step"] // steps * steps / 30
            least[window] = min(least.get(window, s["memory, MiB"]), s["memory, MiB"])
    x, y = np.array(sorted(least.items()), float).T
    slope, error = slope_and_stderr(x, y)
    return 1e4 * slope, 1e4 * error


def main() -> None:
    """Runs and reports."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.long_run", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--save_every", type=int, default=1000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        programs.write_text(pathlib.Path(directory) / "text")
        samples, lines = watch(pathlib.Path(directory), arguments.steps, arguments.save_every)
    print(report(samples, lines, arguments.steps, 8 * 32))
    slope, error = growth(samples, arguments.steps)
    print(f"least memory of each thirtieth of the steps: {slope:+.2f} ± {error:.2f} MiB per 10,000 steps")


if __name__ == "__main__":
    main()
