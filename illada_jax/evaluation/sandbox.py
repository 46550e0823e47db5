"""Runs programs that a model wrote where they can neither hang nor fill nor reach anything.

A program runs in a process of its own, with limits on time, memory and file size; a seccomp filter refuses new
processes and threads, sockets, signals to others and every change of a file. It is for Linux on x86-64 and arm64.
"""

import json
import math
import os
import pathlib
import platform
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from illada_jax.errors import InputError
from illada_jax.evaluation import sandboxed


class Outcome(NamedTuple):
    """What became of a program.

    Attributes:
      passed: it ran to its end without an error.
      reason: `passed`, `timed out`, `killed` (memory, or the kernel), or the error that it raised.
    """

    passed: bool
    reason: str


def check_supported() -> None:
    """Raises InputError where programs cannot be confined."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in sandboxed.SYSTEM_CALLS:
        raise InputError(f"code execution: needs Linux on {' or '.join(sandboxed.SYSTEM_CALLS)}, "
                         f"this is {sys.platform} on {machine}")
    if not run("pass").passed:
        raise InputError("code execution: this system does not allow the sandbox (seccomp)")


def run(program: str, seconds: float = 5.0, megabytes: int = 1024) -> Outcome:
    """Runs a Python program.

    Args:
      program: its source.
      seconds: time that it may take, by the clock.
      megabytes: address space that it may take.
    """
    token = secrets.token_hex(16)
    task = {"token": token, "program": program, "seconds": math.ceil(seconds) + 1, "megabytes": megabytes}
    read_end, write_end = os.pipe()
    with tempfile.TemporaryDirectory() as directory:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(pathlib.Path(sandboxed.__file__)), str(write_end)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=directory,
            env={"PATH": os.environ.get("PATH", "")}, start_new_session=True, pass_fds=(write_end,))
        os.close(write_end)
        try:
            process.stdin.write(json.dumps(task).encode() + b"\n")
            process.stdin.close()
            started, report = _read(read_end, seconds)
        except BrokenPipeError:
            started, report = False, b""
        finally:
            os.close(read_end)
            timed_out = process.poll() is None and not _ends(process)
            if timed_out:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if not started:
        return Outcome(False, "the sandbox did not start")
    if report == token.encode():
        return Outcome(True, "passed")
    if timed_out:
        return Outcome(False, "timed out")
    return Outcome(False, report.decode(errors="replace") or "killed")


def _read(pipe: int, seconds: float) -> tuple[bool, bytes]:
    """(The program was started, what was reported) until the pipe closes or the time is over.

    The program's time counts from its start: on a busy machine the interpreter may take long to come up.
    """
    report, deadline = b"", time.monotonic() + 60
    started = False
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([pipe], [], [], left)[0]:
            break
        part = os.read(pipe, 4096)
        if not part:
            break
        report += part
        if not started and report.startswith(b"started\n"):
            started, report = True, report[len(b"started\n") :]
            deadline = time.monotonic() + seconds
        if len(report) > 4096:  # a program may find the pipe
            break
    return started, report


def _ends(process: subprocess.Popen) -> bool:
    """Whether a process that has closed its pipe ends by itself at once."""
    try:
        process.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        return False
    return True


class SandboxedCodeEval:
    """Stands in for `evaluate.load("code_eval")`, which lm-eval's code tasks call: the same answers, confined."""

    def compute(self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,),
                **_: Any) -> tuple[dict[str, float], dict[int, list[Outcome]]]:
        """({"pass@k": mean over problems}, outcomes by problem) of programs, each followed by its tests."""
        outcomes = {index: [run(f"{candidate}\n{test}") for candidate in candidates]
                    for index, (test, candidates) in enumerate(zip(references, predictions, strict=True))}
        passed = {index: [outcome.passed for outcome in results] for index, results in outcomes.items()}
        return {f"pass@{count}": sum(pass_at_k(len(results), sum(results), count) for results in passed.values())
                / len(passed) for count in k if all(len(results) >= count for results in passed.values())}, outcomes


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The unbiased estimate of "one of k samples passes" (Chen et al., 2021): 1 - C(n - c, k) / C(n, k)."""
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)
