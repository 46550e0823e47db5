"""Files that others remove during a run: noticed, written again, and the same command continues bit for bit."""

import pathlib
import shutil
import time

from tests.faults import kills, programs


def _remove(path: pathlib.Path) -> None:
    while path.exists():  # others write to it
        shutil.rmtree(path, ignore_errors=True)


def _newest(workdir: pathlib.Path) -> pathlib.Path:
    return workdir / "checkpoints" / str(programs.saved_steps(workdir)[-1])


def _unfinished(workdir: pathlib.Path) -> None:
    """Waits for a checkpoint that is being written, and removes that."""
    while True:
        for path in (workdir / "checkpoints").iterdir():
            if not path.name.isdigit():
                shutil.rmtree(path, ignore_errors=True)
                return


REMOVALS = {
    "the workdir": _remove,
    "the workdir, moved elsewhere": lambda workdir: workdir.rename(workdir.with_name(f"{workdir.name}-moved")),
    "config.json": lambda workdir: (workdir / "config.json").unlink(),
    "metrics.jsonl": lambda workdir: (workdir / "metrics.jsonl").unlink(),
    "the tokenizer": lambda workdir: _remove(workdir / "tokenizer"),
    "all checkpoints": lambda workdir: _remove(workdir / "checkpoints"),
    "the newest checkpoint": lambda workdir: _remove(_newest(workdir)),
    "a checkpoint while it is written": _unfinished,
}


def removed(directory: pathlib.Path) -> list[tuple[str, str]]:
    """(What was removed, failure or an empty text) for each of REMOVALS."""
    # Every step has its line: where a run is stopped, a mean over several steps would be another than the whole run's.
    flags = ["--config.train.steps=300", "--config.train.log_every=1"]
    whole = directory / "removed-nothing"
    programs.must(programs.train_command(directory, whole, *flags))
    found = []
    for number, (name, remove) in enumerate(REMOVALS.items()):
        workdir = directory / f"removed-{number}"
        command = programs.train_command(directory, workdir, *flags)
        process = programs.start(command)
        while len(programs.lines(workdir)) < 20 or not programs.saved_steps(workdir):
            if process.poll() is not None:
                break
            time.sleep(0.002)
        remove(workdir)
        output = "".join(process.communicate(timeout=300))
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        if process.returncode != 2 or len(errors) != 1 or "are saved; run the same command" not in errors[0]:
            found.append((name, f"exit code {process.returncode}: {output[-2000:]}"))
            continue
        programs.must(command)
        found.append((name, "; ".join(kills.differences(whole, workdir))))
    return found
