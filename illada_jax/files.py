"""Files and directories that appear whole or not at all, and files that are read within limits.

Content is written beside its target under a temporary name, and renamed when it is complete. The name identifies what
a killed process left behind. Paths may be local or, through etils.epath, on a bucket.
"""

import contextlib
import json
import math
import os
import shutil
import socket
import stat
from collections.abc import Iterator
from typing import Any

from etils import epath

from illada_jax.errors import InputError

# Largest files that are read whole: JSON of this package, tokenizers, and the small JSON files of others.
JSON_BYTES = 2**28
TOKENIZER_BYTES = 2**27
CONFIG_BYTES = 2**24
_MAX_DEPTH = 64  # of objects and lists within each other
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


def read_file(path: epath.PathLike, max_bytes: float = math.inf) -> bytes:
    """The content of a file.

    Raises:
      InputError: the file is missing, cannot be read, or is too large; or it is a directory, a FIFO or a device, whose
        end may never come.
    """
    name = os.fspath(path)
    try:
        if is_remote(path):
            return epath.Path(path).read_bytes()
        with open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{name}: must be a regular file")
            if status.st_size > max_bytes:
                raise InputError(f"{name}: has {status.st_size:,} bytes; must have at most {max_bytes:,}")
            return file.read()
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror or error}") from error


def parse_json(content: bytes | str, name: object, kind: type = dict) -> Any:
    """The value of a JSON text, which messages call `name`.

    Raises:
      InputError: it is not JSON, not of this kind, or nested too deeply.
    """
    try:
        value = json.loads(content)
        level = [[value]]
        for _ in range(_MAX_DEPTH + 1):
            children = (item.values() if isinstance(item, dict) else item for item in level)
            level = [child for values in children for child in values if isinstance(child, dict | list)]
        if level:
            raise RecursionError
    except RecursionError as error:
        raise InputError(f"{name}: nested too deeply: JSON of more than {_MAX_DEPTH} levels") from error
    except ValueError as error:  # also for numbers of thousands of digits
        raise InputError(f"{name}: not JSON: {error}") from error
    if not isinstance(value, kind):
        raise InputError(f"{name}: must be a JSON {'object' if kind is dict else 'list'}")
    return value


def read_json(path: epath.PathLike, max_bytes: int = JSON_BYTES, kind: type = dict) -> Any:
    """The value of a JSON file. Raises InputError as `read_file` and `parse_json` do."""
    return parse_json(read_file(path, max_bytes), os.fspath(path), kind)
