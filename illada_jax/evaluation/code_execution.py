"""Generated programs, run in a bubblewrap sandbox, and the tasks of lm-evaluation-harness that need them.

The sandbox (`bwrap`) has its own processes, network, IPC and mounts. It shows the system's libraries and this Python,
read-only, and an empty /tmp: no home directory, no other file, no environment variable, no process outside. A timeout,
the size of /tmp and rlimits per process bound what a program can use; if memory still runs out, the kernel kills the
program first.

A program passes if it runs to its end: exiting early or printing a verdict fails. A program that inspects the memory of
its own process to find the token that says so can forge the verdict; this is out of scope.
"""

import contextlib
import json
import math
import os
import pathlib
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from illada_jax.errors import InputError
from illada_jax.evaluation import code_runner

MODES = ("none", "sandbox", "unsafe")
_SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/alternatives", "/etc/ld.so.cache")
_TMP_BYTES = 64 << 20
_START_SECONDS = 60  # a busy machine may take long to start Python
_REPORT_BYTES = 1000
_ALTERNATIVE = "or run programs without isolation: --allow_code_execution=unsafe"


class Outcome(NamedTuple):
    """The result of a program; `reason`: `passed`, `timed out`, `ended early` (exited or was killed) or the error."""

    passed: bool
    reason: str


def check_supported() -> None:
    """Raises InputError if the sandbox does not work here."""
    if not shutil.which("bwrap"):
        raise InputError("--allow_code_execution=sandbox: bubblewrap is not installed; install it "
                         f"(apt-get install bubblewrap), {_ALTERNATIVE}")
    try:
        run("pass")
    except InputError as error:
        raise InputError(f"--allow_code_execution=sandbox: {error}; it needs bubblewrap 0.7 or later, and user "
                         "namespaces or root (in a container: docker run --privileged); provide them, "
                         f"{_ALTERNATIVE}") from error


def run(program: str, seconds: float = 5.0, megabytes: int = 1024) -> Outcome:
    """Runs a Python program in the sandbox: for `seconds` from its start, with `megabytes` per process.

    Raises InputError if the sandbox did not start, which says nothing about the program.
    """
    token = secrets.token_hex(16)
    task = {"program": program, "token": token, "seconds": math.ceil(seconds) + 1, "megabytes": megabytes}
    process = subprocess.Popen(_command(), env={}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    with process:
        try:
            with _killed_after(_START_SECONDS, process):
                with contextlib.suppress(BrokenPipeError), process.stdin:
                    process.stdin.write(json.dumps(task).encode() + b"\n")
                started = process.stdout.read(len(code_runner.STARTED)) == code_runner.STARTED
            deadline = time.monotonic() + seconds
            with _killed_after(seconds, process):
                report = process.stdout.read(_REPORT_BYTES)
            timed_out = time.monotonic() >= deadline
        finally:
            _kill(process)
        errors = process.stderr.read().decode(errors="replace").strip()
    if not started:
        raise InputError(f"the sandbox did not start ({errors.splitlines()[-1] if errors else 'no message'})")
    if report == token.encode():
        return Outcome(True, "passed")
    return Outcome(False, report.decode(errors="replace") or ("timed out" if timed_out else "ended early"))


def _kill(process: subprocess.Popen) -> None:
    """Kills all processes of a sandbox: when the first one, bwrap's child, dies, the kernel kills the others."""
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    pids = children.read_text().split() if children.exists() else []
    for pid in pids:
        os.kill(int(pid), signal.SIGKILL)
    if not pids:  # --die-with-parent has the same effect, but bwrap could not reap its child
        process.kill()


@contextlib.contextmanager
def _killed_after(seconds: float, process: subprocess.Popen) -> Iterator[None]:
    timer = threading.Timer(seconds, _kill, (process,))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _command() -> list[str]:
    """The command line of bwrap, up to and including the program's runner."""
    command = [shutil.which("bwrap") or "bwrap", "--die-with-parent", "--new-session", "--as-pid-1",
               "--cap-drop", "ALL"]
    if os.geteuid() == 0:
        # The runner switches to an unprivileged user; a user namespace would map root only.
        command += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try",
                    "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command.append("--unshare-all")
    paths = {*map(pathlib.Path, _SYSTEM), pathlib.Path(sys.prefix), pathlib.Path(sys.base_prefix),
             pathlib.Path(sys.executable).resolve().parents[1]}
    # The empty /tmp comes first: an environment within /tmp is then mounted on it, not hidden by it.
    command += ["--perms", "1777", "--size", str(_TMP_BYTES), "--tmpfs", "/tmp"]
    for parent in sorted({parent for path in paths for parent in path.parents[:-1]} - {pathlib.Path("/tmp")}):
        command += ["--perms", "755", "--dir", str(parent)]  # bwrap would make it readable by its owner only
    for path in sorted(paths):
        command += ["--ro-bind-try", str(path), str(path)]
    command += ["--proc", "/proc", "--dev", "/dev", "--chdir", "/tmp", "--remount-ro", "/", "--remount-ro", "/dev"]
    for name, value in (("HOME", "/tmp"), ("PATH", "/usr/bin:/bin"), ("OPENBLAS_NUM_THREADS", "1")):
        command += ["--setenv", name, value]
    return [*command, sys.executable, "-I", "-B", "-c", pathlib.Path(code_runner.__file__).read_text()]


class SandboxedCodeEval:
    """Replaces `evaluate.load("code_eval")`, the metric of lm-eval's code tasks: the same results, in the sandbox."""

    def compute(self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,),
                **_: Any) -> tuple[dict[str, float], dict[int, list[Outcome]]]:
        """Runs programs, each followed by its tests; ({"pass@k": mean over problems}, outcomes by problem)."""
        outcomes = [[run(f"{candidate}\n{test}") for candidate in candidates]
                    for test, candidates in zip(references, predictions, strict=True)]
        passed = [[outcome.passed for outcome in results] for results in outcomes]
        return {f"pass@{count}": sum(pass_at_k(len(each), sum(each), count) for each in passed) / len(passed)
                for count in k if all(len(each) >= count for each in passed)}, dict(enumerate(outcomes))


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The unbiased estimate of "one of k samples passes" (Chen et al., 2021): 1 - C(n - c, k) / C(n, k)."""
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def program_tasks(index: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The tasks among `names`, and in their groups and tags, that are marked as running generated programs."""
    return [name for name, config in task_configs(index, names).items() if config.get("unsafe_code")]


def task_configs(index: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The configs of the tasks among `names` and in their groups and tags, by name.

    `index` has the harness's entries by name (`TaskManager.task_index`).
    """
    pending: list[str | dict[str, Any]] = list(names)
    found: dict[str, dict[str, Any]] = {}
    while pending:
        member = pending.pop(0)
        own = member if isinstance(member, dict) else {}
        name = own.get("group", own.get("task")) if own else member
        entry = index.get(name)
        config = {**((entry.cfg or {}) if entry else {}), **own}
        if isinstance(config.get("task"), list):
            pending += config["task"]
        elif entry and entry.cfg is None:
            pending += sorted(entry.tags)
        elif not found.get(name, {}).get("unsafe_code"):
            found[name] = config
    return found


@contextlib.contextmanager
def metric_for(mode: str, manager: Any, names: Sequence[str]) -> Iterator[None]:
    """Within the block, tasks that load the metric `code_eval` get the sandboxed one (sandbox) or lm-eval's (unsafe).

    Raises InputError if one of the tasks runs programs by other means, outside the sandbox.
    """
    if mode == "unsafe":
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the metric's own consent
    if mode != "sandbox" or not names:
        yield
        return
    import evaluate as metrics  # only if needed: it imports PyTorch where that is installed

    def load(name: str, *rest: Any, **more: Any) -> Any:
        return SandboxedCodeEval() if name == "code_eval" else original(name, *rest, **more)

    original, metrics.load = metrics.load, load
    try:
        for name, task in manager.load(list(names))["tasks"].items():
            values = [value for metric in task.config.metric_list or ()
                      for value in getattr(metric["metric"], "__globals__", {}).values()]
            if not any(isinstance(value, SandboxedCodeEval) for value in values):
                raise InputError(f"task {name}: does not run its programs through the metric code_eval, so the sandbox "
                                 f"cannot isolate them; leave the task out, {_ALTERNATIVE}")
        yield
    finally:
        metrics.load = original
