"""Kill -9 at random moments: every restart resumes, and the result is that of an unkilled run, bit for bit."""

import functools
import os
import pathlib
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence

from tests.faults import programs, tiny

MOMENTS = ("start-up", "step", "save", "evaluation")
# While a checkpoint is being written, on a disk so slow that the next one is due.
TWO_SAVES = "two saves"
_SLOW_DISK = ["strace", "-f", "-qq", "--seccomp-bpf", "-o", "/dev/null", "-e", "status=none", "-e",
              "inject=write,writev,fsync,fdatasync,rename:delay_enter=20000"]
_POLL_SECONDS = 0.002


def kill(process: subprocess.Popen) -> None:
    """Kills a process and its children with SIGKILL."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def killed_training(whole: pathlib.Path, workdir: pathlib.Path, count: int, directory: pathlib.Path,
                    flags: Sequence[str], moments: Sequence[str] = MOMENTS, seed: int = 0
                    ) -> tuple[dict[str, int], list[str]]:
    """Trains `tiny` to its end in `workdir` and kills it `count` times meanwhile.

    Args:
      whole: workdir of the unkilled run.
      workdir: workdir of the killed run.
      count: number of kills.
      directory: directory with the text.
      flags: flags of both runs.
      moments: kinds of moments, which take turns: MOMENTS, or TWO_SAVES.
      seed: seed of the moments.

    Returns:
      Kills by kind of moment, and descriptions of all failures.
    """
    draw = random.Random(seed)
    config = tiny.get_config()
    command = programs.train_command(directory, workdir, *flags)
    killed = dict.fromkeys(moments, 0)
    wrong = []
    startup = 2.0
    for number in range(count):
        moment = moments[number % len(moments)]
        before = programs.saved_steps(workdir)
        began = time.monotonic()
        process = programs.start([*(_SLOW_DISK if moment == TWO_SAVES else []), *command])
        if moment == "start-up":
            time.sleep(draw.uniform(0, startup))
            reached = True
        else:
            reached = _wait(process, functools.partial(_has_started, workdir, began))
            startup = max(startup, time.monotonic() - began)
            seen = {"step": _after_lines(workdir, draw.randint(1, 8)), "save": lambda: _is_saving(workdir),
                    "evaluation": lambda: _is_evaluating(workdir, config.eval.every),
                    TWO_SAVES: lambda: _is_saving_late(workdir, config.checkpoint.every)}[moment]
            reached = reached and _wait(process, seen)
            time.sleep(draw.uniform(0, 0.02))
        if process.poll() is not None:
            output = "".join(process.communicate())
            if process.returncode != 0 or not reached:
                wrong.append(f"kill {number + 1} ({moment}): ended by itself with {process.returncode}: {output[-500:]}"
                             )
            break
        kill(process)
        killed[moment] += 1
        after = programs.saved_steps(workdir)
        if before and (not after or after[-1] < before[-1]):
            wrong.append(f"kill {number + 1} ({moment}): the checkpoint of step {before[-1]} is gone, left: {after}")
    programs.must(command)
    return killed, wrong + differences(whole, workdir)


def differences(whole: pathlib.Path, workdir: pathlib.Path) -> list[str]:
    """Differences between two finished runs: metrics (except times) and the arrays of the last checkpoint."""
    found = []
    if programs.timeless(whole) != programs.timeless(workdir):
        found.append(f"{workdir}: other metrics than {whole}")
    arrays, expected = programs.final_arrays(workdir), programs.final_arrays(whole)
    found += [f"{workdir}: {name} differs" for name in expected if arrays.get(name) != expected[name]]
    if (workdir / "corrupt").exists():
        found.append(f"{workdir}: a corrupt checkpoint was found")
    return found


def killed_preparation(directory: pathlib.Path, count: int, seed: int = 0) -> tuple[int, list[str]]:
    """Prepares the text of `directory` and kills that `count` times; returns (number of kills, failures)."""
    draw = random.Random(seed)
    expected, target = directory / "prepared", directory / "prepared-killed"
    began = time.monotonic()
    if not expected.exists():
        programs.must(programs.prepare_command(directory, expected))
    takes = time.monotonic() - began
    killed = 0
    for number in range(count):
        process = programs.start(programs.prepare_command(directory, target))
        if number % 2:  # in the middle of the shards
            _wait(process, lambda: any(target.rglob("*.tmp-*")))
            time.sleep(draw.uniform(0, 0.05))
        else:
            time.sleep(draw.uniform(0, takes))
        if process.poll() is None:
            kill(process)
            killed += 1
        else:
            process.communicate()
        if (target / "manifest.json").exists():
            if programs.tree_checksums(target) != programs.tree_checksums(expected):
                return killed, [f"{target}: finished after kill {killed}, with another corpus than an unkilled one"]
            shutil.rmtree(target)
    programs.must(programs.prepare_command(directory, target))
    same = programs.tree_checksums(target) == programs.tree_checksums(expected)
    return killed, [] if same else [f"{target}: another corpus than an unkilled preparation"]


def _wait(process: subprocess.Popen, seen: Callable[[], bool]) -> bool:
    """Waits until `seen()`; False if the process ends before."""
    while not seen():
        if process.poll() is not None:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _has_started(workdir: pathlib.Path, began: float) -> bool:
    """True if the process that started at `began` has written metrics: it rewrites the earlier ones first."""
    path = workdir / "metrics.jsonl"
    return path.exists() and path.stat().st_size > 0 and time.time() - path.stat().st_mtime < time.monotonic() - began


def _after_lines(workdir: pathlib.Path, count: int) -> Callable[[], bool]:
    end = len(programs.lines(workdir)) + count
    return lambda: len(programs.lines(workdir)) >= end


def _is_saving(workdir: pathlib.Path) -> bool:
    directory = workdir / "checkpoints"
    return directory.is_dir() and any(not path.name.isdigit() for path in directory.iterdir())


def _is_saving_late(workdir: pathlib.Path, every: int) -> bool:
    """True if a checkpoint is unfinished although the next one is due."""
    directory = workdir / "checkpoints"
    names = [path.name for path in directory.iterdir() if not path.name.isdigit()] if directory.is_dir() else []
    return any(programs.lines(workdir)[-1]["step"] >= int(name.partition(".")[0]) + every for name in names)


def _is_evaluating(workdir: pathlib.Path, every: int) -> bool:
    last = programs.lines(workdir)[-1]
    return last["step"] % every == 0 and "train/learning_rate" in last
