"""Decay on demand: a constant rate until the run reports that the loss has stopped falling, then the decay.

    python experiments/studies/decay.py

The paper's observation at 8B, at a size that a CPU trains (`experiments/pretrain_small.py`, 0.16 M parameters). The
study runs the commands of an operator. It starts training and stops it (SIGTERM) when the plateau report fires at step
R. At N = R + 500 it forks: one branch continues with `--config.optimizer.decay_start=N --config.optimizer.decay_steps=M
--config.train.steps=N+M`, M = N / 5, the other unchanged. Both get the same batches, masks and held-out text, so that
the decay is the only difference. About ten minutes on one core; the same command continues an interrupted study.
"""

import argparse
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import study
from etils import epath

from illada_jax.errors import EXIT_RESUMABLE
from illada_jax.training.metrics import read_lines

ROOT = pathlib.Path(__file__).parent.parent.parent
WAIT = 500  # the fork is at a multiple of it, so that it does not depend on how fast the run stopped
EVERY = 250  # steps between evaluations after the fork


def lines(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics."""
    return read_lines(epath.Path(workdir))


def reported_at(workdir: pathlib.Path) -> int | None:
    """The step at which a run first reported that its loss had stopped falling; None if it has not."""
    return next((line["step"] for line in lines(workdir) if line.get("trend/stopped")), None)


def last_step(workdir: pathlib.Path) -> int:
    """The step of the newest evaluation."""
    return max((line["step"] for line in lines(workdir) if "eval/bits_per_byte" in line), default=0)


def train(config: str, workdir: pathlib.Path, changes: dict[str, int], until: Callable[[], bool] = lambda: False
          ) -> None:
    """Runs the training command; stops it with SIGTERM when `until()` is true. Exits if it fails."""
    command = [sys.executable, "-m", "illada_jax.main", f"--config={config}", f"--workdir={workdir}",
               *(f"--config.{key}={value}" for key, value in changes.items())]
    print(" ".join(command), flush=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    stopped = False
    try:
        while process.poll() is None:
            time.sleep(0.5)
            if not stopped and until():
                process.send_signal(signal.SIGTERM)
                stopped = True
    except KeyboardInterrupt:
        process.wait()  # Ctrl-C has reached it too: it is saving
    if process.returncode not in ((0, EXIT_RESUMABLE) if stopped else (0,)):
        sys.exit(f"error: training ended with exit code {process.returncode}; the same command continues the study")


def run(config: str, results: pathlib.Path) -> tuple[int, int, int]:
    """Runs the missing parts of the study. Returns the steps of the report, of the fork and of the end."""
    constant, decayed, plan = results / "constant", results / "decayed", results / "plan.json"
    if not plan.exists():
        if reported_at(constant) is None:
            train(config, constant, {}, until=lambda: reported_at(constant) is not None)
        report = reported_at(constant)
        if report is None:
            sys.exit(f"error: {constant}: training ended before the loss stopped falling; raise config.train.steps")
        fork = (lines(constant)[-1]["step"] // WAIT + 1) * WAIT
        plan.write_text(json.dumps([report, fork, fork + round(fork / 5 / EVERY) * EVERY]))
    report, fork, end = json.loads(plan.read_text())
    if last_step(constant) < fork:
        train(config, constant, {"train.stop_step": fork})
    if not decayed.exists():
        copy = results / "decayed.partial"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(constant, copy)
        copy.rename(decayed)
    if last_step(decayed) < end:
        train(config, decayed, {"optimizer.decay_start": fork, "optimizer.decay_steps": end - fork,
                                "train.steps": end, "eval.every": EVERY})
    if last_step(constant) < end:
        train(config, constant, {"train.stop_step": end, "eval.every": EVERY})
    return report, fork, end


def summary(results: pathlib.Path, report: int, fork: int, end: int) -> str:
    """Table and plot of the two branches."""
    curves = {name: {line["step"]: line for line in lines(results / name) if "eval/bits_per_byte" in line}
              for name in ("constant", "decayed")}
    rates = {line["step"]: line["train/learning_rate"] for line in lines(results / "decayed")
             if "train/learning_rate" in line}
    rows = []
    for step in sorted(curves["decayed"]):
        if step >= fork - WAIT - EVERY:
            found = [curves[name].get(step) for name in ("constant", "decayed")]
            rows.append([f"{step:,}", f"{rates[step]:.4f}"] + [f"{line['eval/bits_per_byte']:.3f}" for line in found])

    def draw(axes):
        for name, style in (("decayed", "o-"), ("constant", "o--")):
            shown = [step for step in sorted(curves[name]) if name == "constant" or step >= fork]
            axes.plot(shown, [curves[name][step]["eval/bits_per_byte"] for step in shown], style, markersize=3,
                      label=f"{name} rate")
        axes.axvline(report, color="grey", linestyle=":", label="the loss has stopped falling")
        axes.axvline(fork, color="black", linewidth=0.8, label="decay starts")
        axes.set(xlabel="steps", ylabel="bound on held-out text, bits per byte")
        best, start = (curves["decayed"][step]["eval/bits_per_byte"] for step in (end, fork))
        axes.set_ylim(best - 0.3 * (start - best), start + 3 * (start - best))
        axes.legend()

    study.plot(results / "decay.png", draw)
    (results / "decay.json").write_text(json.dumps(
        {"report": report, "fork": fork, "end": end,
         **{name: [[step, line["eval/bits_per_byte"], line["eval/bits_per_byte_stderr"]]
                   for step, line in sorted(curve.items())] for name, curve in curves.items()}}))
    table = study.write_table(results / "decay.md", ["step", "rate with decay", "constant rate", "with decay"], rows)
    return (f"The loss had stopped falling at step {report:,}; the decay starts at {fork:,} and ends at {end:,}.\n"
            f"Bound on held-out text in bits per byte:\n{table}")


def main() -> None:
    """Runs the missing parts and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path("workdirs/decay"),
                        help="directory for both branches, table and plot (default: %(default)s)")
    parser.add_argument("--config", default=str(ROOT / "experiments" / "pretrain_small.py"),
                        help="the experiment (default: %(default)s)")
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    print(summary(arguments.results, *run(arguments.config, arguments.results)))


if __name__ == "__main__":
    main()
