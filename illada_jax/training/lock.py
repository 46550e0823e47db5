"""One trainer per workdir: a lock file that the operating system releases when its owner exits."""

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Iterator

import filelock
from etils import epath

from illada_jax.errors import InputError, StorageError
from illada_jax.files import is_remote, read_file
from illada_jax.parallel import hosts

NAME = "trainer.lock"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def only_trainer(workdir: epath.Path) -> Iterator[None]:
    """Holds the lock of `workdir`, in the primary process, while the context is open.

    A killed owner releases the lock, a stopped one (SIGSTOP) does not. On buckets, which have no locks, the scheduler
    must start only one trainer per workdir. On file systems without locks a warning says so.

    Raises:
      InputError: on all processes; another trainer holds the lock, or the lock file cannot be written.
    """
    lock = None if is_remote(workdir) else filelock.FileLock(workdir / NAME, timeout=0, fallback_to_soft=False)
    if lock is not None:
        hosts.broadcast_from_primary(lambda: _acquire(lock, workdir))
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _acquire(lock: filelock.FileLock, workdir: epath.Path) -> None:
    path = workdir / NAME
    try:
        lock.acquire()
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    except filelock.Timeout:
        owner = read_file(path).decode(errors="replace").strip() or "another process"
        raise InputError(f"{workdir}: {owner} is training in this workdir; stop it, or use another workdir") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise StorageError(f"{path}: the file cannot be written: {error.strerror or error}") from error
        print(f"warning: {path}: this file system has no locks ({error.strerror}); make sure that no other process "
              "trains in this workdir", file=sys.stderr, flush=True)
