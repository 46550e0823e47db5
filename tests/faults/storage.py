"""Full, read-only, slow and failing disks: one line of error, no loss, and the same command then continues.

As a program, in its own mount namespace, it mounts a small file system and prints its findings as JSON. Arguments: the
directory with the text, and the number of sizes of free space to try.
"""

import contextlib
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator

from tests.faults import programs

SHORT = ("--config.train.steps=60", "--config.train.plateau_window=0")
_DISK_KILOBYTES = 1024


def in_namespace(directory: pathlib.Path, count: int) -> list[tuple[str, str]] | None:
    """(Fault, failure or an empty text) pairs, from a separate process; None if mounting is not permitted.

    `directory` holds the text, `short` (an undisturbed run with the flags SHORT) and `prepared`.
    """
    allowed = subprocess.run(["unshare", "-Urm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True)
    if allowed.returncode != 0:
        return None
    result = subprocess.run(["unshare", "-Urm", sys.executable, "-m", "tests.faults.storage", str(directory),
                             str(count)],
                            cwd=programs.ROOT, env=programs.ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True)
    return [tuple(pair) for pair in json.loads(result.stdout)]


def limited_files(directory: pathlib.Path, count: int) -> list[tuple[str, str]]:
    """Like `in_namespace`, without a separate file system: limits the size of files, also of TensorBoard's events."""
    found = []
    for number, events in itertools.product(range(count), (False, True)):
        kilobytes = 4 * (number + 1)
        workdir = directory / f"limited-{number}-{events}"
        limited = ["sh", "-c", f'ulimit -f {2 * kilobytes}; exec "$@"', "sh"]  # in units of 512 bytes
        code, output = programs.run([*limited, *programs.train_command(
            directory, workdir, *SHORT, f"--config.train.tensorboard={events}")])
        found.append((f"files larger than {kilobytes} KiB cannot be written{', with TensorBoard' * events}",
                      _refused(code, output) or _continues(directory, workdir)))
    return found


def can_trace() -> bool:
    """True if strace may inject faults here."""
    works = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "inject=rename:error=EIO", "true"]
    return bool(shutil.which("strace")) and subprocess.run(works, capture_output=True).returncode == 0


def unreliable(directory: pathlib.Path, count: int) -> list[tuple[str, str]] | None:
    """(Fault, failure or an empty text) pairs for failing and slow system calls; None if strace cannot trace.

    Checkpoints write arrays with writev, flush them with fsync and publish them with rename.
    """
    if not can_trace():
        return None
    found = []
    faults = [(f"{call}: I/O error at call {when}", f"inject={call}:error=EIO:when={when}")
              for when in [1, 40, "10+50", 150, "3+100", 90, "100+9", 250][:count]
              for call in ("writev", "fsync,fdatasync", "rename")]
    slow = ("every write 20 ms late", "inject=write,writev,fsync,fdatasync,rename:delay_enter=20000")
    for number, (fault, injection) in enumerate([*faults, slow]):
        workdir = directory / f"unreliable-{number}"
        traced = ["strace", "-f", "-qq", "--seccomp-bpf", "-o", "/dev/null", "-e", injection, "-e", "status=none"]
        code, output = programs.run([*traced, *programs.train_command(directory, workdir, *SHORT)])
        if code == 0:
            wrong = ""
        elif fault == slow[0]:
            wrong = f"exit code {code}: {output[-2000:]}"
        else:
            wrong = _refused(code, output)
        found.append((fault, wrong or _continues(directory, workdir)))
    return found


def _faults(directory: pathlib.Path, count: int) -> Iterator[tuple[str, str]]:
    disk = directory / "disk"
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK_KILOBYTES}k", "none", str(disk)], check=True)
    filler = disk / "filler"
    for number in range(count):
        free = 16 + 500 * number // count
        filler.write_bytes(bytes((_DISK_KILOBYTES - free) * 1024))
        workdir = disk / "run"
        code, output = programs.run(programs.train_command(directory, workdir, *SHORT))
        filler.unlink()
        yield f"disk full, {free} KiB free", _refused(code, output) or _continues(directory, workdir)
        subprocess.run(["rm", "-r", str(workdir)], check=True)

    filler.write_bytes(bytes((_DISK_KILOBYTES - 60) * 1024))
    code, output = programs.run(programs.prepare_command(directory, disk / "prepared"))
    filler.unlink()
    wrong = _refused(code, output)
    if not wrong:
        programs.must(programs.prepare_command(directory, disk / "prepared"))
        same = programs.tree_checksums(disk / "prepared") == programs.tree_checksums(directory / "prepared")
        wrong = "" if same else "another corpus"
    yield "disk full while preparing", wrong
    subprocess.run(["rm", "-r", str(disk / "prepared")], check=True)

    programs.must(programs.train_command(directory, disk / "run", *SHORT, "--config.train.stop_step=30"))
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for name, workdir in (("a new workdir", disk / "new"), ("a workdir to resume", disk / "run")):
        code, output = programs.run(programs.train_command(directory, workdir, *SHORT))
        yield f"read-only disk, {name}", _refused(code, output)
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    yield "read-only disk, then writable", _continues(directory, disk / "run")


def _refused(code: int, output: str) -> str:
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    if code != 2 or len(errors) != 1 or str(programs.ROOT) in errors[0] or "Traceback" in output:
        return f"exit code {code}: {output[-2000:]}"
    return ""


def _continues(directory: pathlib.Path, workdir: pathlib.Path) -> str:
    code, output = programs.run(programs.train_command(directory, workdir, *SHORT))
    if code != 0:
        return f"cannot continue, exit code {code}: {output[-2000:]}"
    same = programs.final_arrays(workdir) == programs.final_arrays(directory / "short")
    return "" if same else "continues to another result"


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        results = list(_faults(pathlib.Path(sys.argv[1]), int(sys.argv[2])))
    print(json.dumps(results))
    os._exit(0)
