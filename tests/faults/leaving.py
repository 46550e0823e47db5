"""After a fatal error every process is gone: alone within 15 s, among several within 60 s."""

import os
import pathlib
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from tests.faults import programs, storage

LIMITS = {1: 15.0, 2: 60.0}  # seconds from the first line of an error to the end of the last process, by processes
_NOBODY = 65534


def causes(directory: pathlib.Path) -> Iterator[tuple[str, int, str, str]]:
    """(Cause, processes, failure or an empty text, outcome) of each fatal error."""
    as_nobody = _as_nobody(directory)

    def unwritable(workdir: pathlib.Path) -> None:
        _half_way(directory, workdir)
        subprocess.run(["chmod", "-R", "a+rwX", str(workdir)], check=True)
        (workdir / "checkpoints").chmod(0o555)

    def corrupt(workdir: pathlib.Path) -> None:
        _half_way(directory, workdir)
        for path in workdir.rglob("manifest.ocdbt"):
            path.write_bytes(b"")

    nothing = lambda workdir: None  # noqa: E731
    small_files = ["sh", "-c", 'ulimit -f 8; exec "$@"', "sh"]
    numbers = ("--config.optimizer.learning_rate=1e38", "--config.optimizer.warmup_steps=0",
               "--config.optimizer.clip_norm=1e38")
    # Name, what is done to the workdir, prefixes of the processes, flags of all, flags of the last, expected exit code.
    cases = [
        ("checkpoints/ cannot be written", unwritable, [as_nobody], (), (), 2),
        ("a full disk", nothing, [small_files], (), (), 2),
        ("all checkpoints are corrupt", corrupt, [[]], (), (), 2),
        ("bad numbers", nothing, [[]], numbers, (), 2),
        ("an invalid setting", nothing, [[]], ("--config.data.batch_size=0",), (), 2),
        ("one of two has no permission to write", nothing, [[], as_nobody], (), (), 2),
        ("the first of two has no permission to write", unwritable, [as_nobody, []], (), (), 2),
        ("the disk of one of two is full", nothing, [[], small_files], (), (), 2),
        ("bad numbers of two", nothing, [[], []], numbers, (), 2),
        ("all checkpoints of two are corrupt", corrupt, [[], []], (), (), 2),
        ("one of two has another config", nothing, [[], []], (), ("--config.seed=7",), 2),
    ]
    for number, (cause, prepare, prefixes, flags, last, expected) in enumerate(cases):
        if None in prefixes:
            yield cause, len(prefixes), "", "not permitted here"
            continue
        workdir = directory / f"leaving-{number}"
        prepare(workdir)
        yield cause, len(prefixes), *_timed(directory, workdir, prefixes, flags, last, expected)


def _half_way(directory: pathlib.Path, workdir: pathlib.Path) -> None:
    programs.must(programs.train_command(directory, workdir, *storage.SHORT, "--config.train.stop_step=30"))


def _as_nobody(directory: pathlib.Path) -> list[str] | None:
    """A prefix that runs a command as another user, who may use the directory but not what root creates there later."""
    command = ["setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups"]
    if os.getuid() or not shutil.which("setpriv"):
        return None
    subprocess.run(["chmod", "-R", "a+rwX", str(directory)], check=True)
    readable = subprocess.run([*command, *programs.train_command(directory, directory / "none", "--help")],
                              cwd=programs.ROOT, env=programs.ENVIRONMENT, capture_output=True)
    return command if readable.returncode == 0 else None


def _timed(directory: pathlib.Path, workdir: pathlib.Path, prefixes: Sequence[list[str]], flags: Sequence[str],
           last: Sequence[str], expected: int) -> tuple[str, str]:
    """(Failure or an empty text, outcome) of a run that must fail."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    count, processes = len(prefixes), []
    for number, prefix in enumerate(prefixes):
        several = [f"--processes=localhost:{port},{count},{number}"] if count > 1 else []
        own = last if number == count - 1 else ()
        command = programs.train_command(directory, workdir, *storage.SHORT, *flags, *several, *own)
        processes.append(programs.start([*prefix, *command]))
    first_error: list[float] = []
    outputs: list[list[str]] = [[] for _ in processes]
    readers = [threading.Thread(target=_read, args=(process.stderr, lines, first_error))
               for process, lines in zip(processes, outputs, strict=True)]
    drains = [threading.Thread(target=process.stdout.read) for process in processes]
    for thread in (*readers, *drains):
        thread.start()
    ended = _end(processes, lambda: first_error[0] + 2 * LIMITS[count] if first_error else float("inf"))
    for process in processes:
        process.kill()
    for thread in (*readers, *drains):
        thread.join()
    codes = [process.wait() for process in processes]
    errors = [line for lines in outputs for line in lines if line.startswith("error: ")]
    seconds = (ended or float("inf")) - (first_error[0] if first_error else 0)
    outcome = f"exit codes {', '.join(map(str, codes))}, {seconds:.1f} s after the error"
    if not errors or expected not in codes or 0 in codes or seconds > LIMITS[count] or "Traceback" in "".join(
            line for lines, code in zip(outputs, codes, strict=True) if code == expected for line in lines):
        return f"{outcome}: {errors} {''.join(map(''.join, outputs))[-3000:]}", outcome
    return "", outcome


def _read(stream, lines: list[str], first_error: list[float]) -> None:
    for line in stream:
        lines.append(line)
        if line.startswith("error: ") and not first_error:
            first_error.append(time.monotonic())


def _end(processes: Sequence[subprocess.Popen], deadline: Callable[[], float]) -> float | None:
    """The time at which the last process ended; None after the deadline."""
    began = time.monotonic()
    while any(process.poll() is None for process in processes):
        if time.monotonic() > min(deadline(), began + 600):
            return None
        time.sleep(0.02)
    return time.monotonic()
