"""Files as streams of bytes: found by suffix, decompressed (.gz, .zst), and read in pieces of bounded size."""

import contextlib
import glob
import gzip
import io
import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO

import zstandard

from illada_jax.errors import InputError

BOM = b"\xef\xbb\xbf"
COMPRESSED = (".gz", ".zst")
PARQUET = (".parquet", ".pq")
_JSON = (".jsonl", ".ndjson", ".json")
# Suffixes of the files that a source takes from a directory; other kinds take all files.
_SUFFIXES = {"jsonl": _JSON, "parquet": PARQUET, "chat": _JSON + PARQUET}
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json"}  # of a dataset on the Hugging Face Hub, beside its data
_SKIPPED_BYTES = 2**16


def find_files(kind: str, pattern: str) -> list[pathlib.Path]:
    """The files that a path, a directory or a glob names, sorted.

    From a directory come the files that are not hidden and whose suffix is one of the kind.

    Raises:
      InputError: there are none.
    """
    if not pattern:
        raise InputError(f"source {kind!r}: names no files; write {kind}:FILE, {kind}:DIRECTORY or {kind}:GLOB")
    path = pathlib.Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        paths = [p for p in path.rglob("*") if p.is_file() and not any(
            name.startswith(".") for name in p.relative_to(path).parts)]
        suffixes = _SUFFIXES.get(kind)
        if suffixes and paths:
            endings = tuple(suffix + compressed for suffix in suffixes for compressed in ("", *COMPRESSED))
            of_kind = [p for p in paths if p.name.endswith(endings) and p.name not in _DESCRIPTIONS]
            if not of_kind:
                raise InputError(f"source {kind}:{pattern}: no file in the directory ends in {', '.join(suffixes)} (or "
                                 f"that and {' or '.join(COMPRESSED)}); it holds {paths[0].name}, …; name files with "
                                 f"other suffixes by a glob: {kind}:{pattern}/*")
            paths = of_kind
    else:
        paths = [pathlib.Path(p) for p in glob.glob(str(path), recursive=True) if os.path.isfile(p)]
    if not paths:
        raise InputError(f"source {kind}:{pattern}: no such file, and no file matches")
    return sorted(paths)


@contextlib.contextmanager
def open_input(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Opens a file, decompressed according to its suffix.

    Raises:
      InputError: it cannot be read, or a compressed file is cut off; also while it is read.
    """
    try:
        with open(path, "rb") as file:
            if path.suffix == ".gz":
                stream = gzip.GzipFile(fileobj=file)
            elif path.suffix == ".zst":
                frames = _ZstandardFrames(file)
                stream = zstandard.ZstdDecompressor().stream_reader(frames, read_across_frames=True, closefd=False)
            else:
                stream = file
            with io.BufferedReader(stream) as buffered:
                yield buffered
    except (OSError, EOFError, zstandard.ZstdError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


class _ZstandardFrames:
    """The compressed bytes of a file, frame by frame and block by block (RFC 8878).

    The library's reader takes a file that ends within a frame for a whole one; this one raises EOFError.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._pieces = self._split()

    def read(self, _: int) -> bytes:
        """The next piece, of any size; empty at the end."""
        return next(self._pieces, b"")

    def _split(self) -> Iterator[bytes]:
        while head := self._file.read(1):
            head += self._exactly(3)
            if int.from_bytes(head, "little") & ~15 == 0x184D2A50:  # a frame without content
                left = int.from_bytes(self._exactly(4), "little")
                while left:
                    left -= len(self._exactly(min(left, _SKIPPED_BYTES)))
                continue
            head += self._exactly(1)
            has_checksum = head[4] & 4
            yield head + self._exactly(zstandard.frame_header_size(head) - len(head))
            is_last = False
            while not is_last:
                header = self._exactly(3)
                value = int.from_bytes(header, "little")
                is_last, is_repeated_byte = value & 1, value & 6 == 2
                yield header + self._exactly(1 if is_repeated_byte else value >> 3)
            if has_checksum:
                yield self._exactly(4)

    def _exactly(self, size: int) -> bytes:
        content = self._file.read(size)
        if len(content) < size:
            raise EOFError("the file ends within a compressed frame: it is cut off")
        return content


def read_lines(file: BinaryIO, max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Yields the lines that follow, without byte-order marks, and their positions in the file.

    A line of more than `max_bytes` is None: it is skipped, in bounded memory.
    """
    position = 0
    while line := file.readline(max_bytes + 1):
        start, position = position, position + len(line)
        if len(line) <= max_bytes:
            yield start, line.removeprefix(BOM)
            continue
        yield start, None
        while line and not line.endswith(b"\n"):
            line = file.readline(_SKIPPED_BYTES)
            position += len(line)
