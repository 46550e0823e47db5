"""One trainer for a workdir: a file that says who trains there, renewed as long as it does.

Object storage knows no locks, so this is a lease: whoever finds one that is not renewed takes it over. On the machine
that wrote it, a look at the process tells at once; elsewhere it takes as long as the lease is good for.
"""

import contextlib
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from etils import epath

from illada_jax.errors import InputError
from illada_jax.parallel import hosts

NAME = "trainer.json"
GOOD_FOR = 60.0  # seconds
EXIT_TAKEN = 2


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is a URI such as gs://…, where files cannot be appended to and locks do not exist."""
    return "://" in os.fspath(path)


class Lease:
    """The right to train in a workdir. `acquire`, then `release`; only the first process of a run does that."""

    def __init__(self, workdir: epath.Path, good_for: float = GOOD_FOR):
        self._path = workdir / NAME
        self._good_for = good_for
        self._settles = min(2.0 if is_remote(workdir) else 0.05, good_for / 4)
        self._mine = {"owner": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(),
                      "machine": _machine(), "started": _started(os.getpid()), "renewed": 0}
        self._over = threading.Event()

    def acquire(self) -> None:
        """Takes the lease, and keeps renewing it.

        Raises:
          InputError: another process trains here.
        """
        other = self._read()
        if other is not None and not self._is_dead(other):
            self._watch(other)
        self._write()
        time.sleep(self._settles)  # two that started at the same moment: the last one to write has it
        other = self._read()
        if other is None or other["owner"] != self._mine["owner"]:
            raise self._refusal(other or {})
        threading.Thread(target=self._renew, name="lease", daemon=True).start()

    def release(self) -> None:
        """Gives the lease back."""
        self._over.set()
        with contextlib.suppress(OSError):
            other = self._read()
            if other is not None and other["owner"] == self._mine["owner"]:
                self._path.unlink()

    def _watch(self, other: dict[str, Any]) -> None:
        """Waits until `other` has expired. Raises InputError as soon as it is renewed, or its process is seen alive."""
        if self._is_here(other):
            raise self._refusal(other)
        print(f"{self._path}: waiting up to {self._good_for:.0f} s to see whether process {other['pid']} on "
              f"{other['host']} still trains", file=sys.stderr, flush=True)
        deadline = time.monotonic() + self._good_for
        while time.monotonic() < deadline:
            time.sleep(self._good_for / 20)
            now = self._read()
            if now is None:
                return
            if now != other:
                raise self._refusal(now)

    def _refusal(self, other: dict[str, Any]) -> InputError:
        return InputError(f"{self._path.parent}: process {other.get('pid')} on {other.get('host')} trains in this "
                          "workdir; stop it, or use another workdir")

    def _is_here(self, other: dict[str, Any]) -> bool:
        return bool(self._mine["machine"]) and other["machine"] == self._mine["machine"]

    def _is_dead(self, other: dict[str, Any]) -> bool:
        return self._is_here(other) and _started(other["pid"]) != other["started"]

    def _read(self) -> dict[str, Any] | None:
        """What is written there; None where nothing is, or half of something."""
        try:
            content = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) and self._mine.keys() <= content.keys() else None

    def _write(self) -> None:
        self._path.write_text(json.dumps(self._mine) + "\n")

    def _renew(self) -> None:
        while not self._over.wait(self._good_for / 4):
            try:
                other = self._read()
                if other is not None and other["owner"] != self._mine["owner"]:
                    print(f"error: {self._refusal(other)}", file=sys.stderr, flush=True)
                    hosts.hard_exit(EXIT_TAKEN)
                self._mine["renewed"] += 1
                self._write()
            except OSError as error:  # the storage may come back; whoever takes over is seen then
                print(f"warning: {self._path} cannot be renewed: {error}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def only_trainer(workdir: epath.Path) -> Iterator[None]:
    """Holds the lease of the workdir. Raises InputError, on all processes, where another run has it."""
    lease = Lease(workdir)
    hosts.broadcast_from_primary(lease.acquire)
    try:
        yield
    finally:
        if hosts.is_primary():
            lease.release()


def _machine() -> str:
    """What two processes have in common that can see each other's ids; empty where that is not known."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process of this machine started, in ticks since it booted: ids are used again. Empty: there is none."""
    try:
        status = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if status[0] == "Z" else status[19]
