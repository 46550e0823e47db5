"""Files and directories that appear whole or not at all.

Content is written beside its target under a temporary name, and renamed when it is complete. The name identifies what
a killed process left behind. Paths may be local or, through etils.epath, on a bucket.
"""

import contextlib
import os
import shutil
import socket
from collections.abc import Iterator

from etils import epath

_MARK = ".tmp-"


def cache_directory() -> str:
    """The directory of what can be made again, such as small corpora and compiled programs."""
    return os.path.expanduser(os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "illada_jax"))


def is_remote(path: epath.PathLike) -> bool:
    """True for URIs such as gs://…: such files cannot be appended to or locked."""
    return "://" in os.fspath(path)


def temporary_path(path: epath.Path) -> epath.Path:
    """The temporary name of a file or directory; no other process, on any host, writes to it."""
    return path.with_name(f"{path.name}{_MARK}{socket.gethostname()}-{os.getpid()}")


def write_atomically(path: epath.Path, content: str | bytes) -> None:
    """Writes a file; text as UTF-8. A reader finds the old content or the new, never a part of it."""
    temporary = temporary_path(path)
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)


@contextlib.contextmanager
def new_directory(target: epath.Path, keep_existing: bool = False) -> Iterator[epath.Path]:
    """Yields an empty directory that becomes `target` when the block ends, and is removed when it fails.

    Args:
      target: must not exist when the block ends, or be empty.
      keep_existing: if another process finished first, keep its result and raise no error.
    """
    temporary = temporary_path(target)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        try:
            temporary.rename(target)
        except OSError:
            if not (keep_existing and target.exists()):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(target: epath.Path) -> None:
    """Removes unfinished writes of `target` by killed processes; for targets that one process writes at a time."""
    for leftover in target.parent.glob(f"{target.name}{_MARK}*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
