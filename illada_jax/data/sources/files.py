"""Files of text (`text:PATH`) and of JSON lines (`jsonl:PATH`), also compressed (.gz, .zst)."""

import functools
import glob
import gzip
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

import zstandard

from illada_jax.data.sources.registry import Document, Part, register
from illada_jax.errors import InputError

READ_ERRORS = (OSError, EOFError, zstandard.ZstdError)

_TEXT_DOCUMENT_BYTES = 16 * 1024
_JSONL_PART_BYTES = 64 * 2**20
_COMPRESSED = (".gz", ".zst")


@register("text")
def _text(argument: str) -> list[Part]:
    """UTF-8 text files, a file, a glob or a directory (everything in it that is not hidden).

    A file longer than 16 KiB becomes several documents, cut at blank lines if it has them: so that a single book can be
    split into training and held-out text. Put together they are the file.
    """
    return [
        Part(str(path), functools.partial(_read_text, path), path.stat().st_size, (path,))
        for path in find_files("text", argument)
    ]


@register("jsonl")
def _jsonl(argument: str) -> list[Part]:
    """Files with a JSON object a line, a file, a glob or a directory; the text is in the field after `#`."""
    pattern, _, field = argument.partition("#")
    found = []
    for path in find_files("jsonl", pattern):
        size = path.stat().st_size
        # Lines of a plain file can be found from anywhere in it; a compressed one is read from its beginning.
        step = size or 1 if path.suffix in _COMPRESSED else _JSONL_PART_BYTES
        for start in range(0, max(size, 1), step):
            stop = min(start + step, size)
            read = functools.partial(_read_jsonl, path, field or "text", start, stop)
            found.append(Part(f"{path}@{start}", read, stop - start, (path,)))
    return found


def find_files(kind: str, pattern: str) -> list[pathlib.Path]:
    """The files that a file, a directory or a glob names. Raises InputError if there are none."""
    if not pattern:
        raise InputError(f"source {kind!r}: which files? Write {kind}:FILE, {kind}:DIRECTORY or {kind}:GLOB")
    path = pathlib.Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        paths = [p for p in path.rglob("*") if p.is_file() and not any(
            name.startswith(".") for name in p.relative_to(path).parts)]
    else:
        paths = [pathlib.Path(p) for p in glob.glob(str(path), recursive=True) if os.path.isfile(p)]
    if not paths:
        raise InputError(f"source {kind}:{pattern}: no such file, and no file matches")
    return sorted(paths)


def open_input(path: pathlib.Path) -> BinaryIO:
    """Opens a file for reading, decompressing by its suffix."""
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".zst":
        return zstandard.open(path, "rb")
    return path.open("rb")


def _decode(raw: bytes, path: pathlib.Path, offset: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {offset + error.start} (0x{raw[error.start]:02X})") from error


def _read_text(path: pathlib.Path) -> Iterator[Document]:
    try:
        with open_input(path) as file:
            offset, pending = 0, []
            size = 0
            for line in io.BufferedReader(file) if path.suffix == ".zst" else file:
                pending.append(line)
                size += len(line)
                # A file without blank lines is cut at a line's end, one without lines is one document.
                if (size >= _TEXT_DOCUMENT_BYTES and not line.strip()) or size >= 2 * _TEXT_DOCUMENT_BYTES:
                    yield Document(_decode(b"".join(pending), path, offset))
                    offset, pending, size = offset + size, [], 0
            if pending:
                yield Document(_decode(b"".join(pending), path, offset))
    except READ_ERRORS as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def _read_jsonl(path: pathlib.Path, field: str, start: int, stop: int) -> Iterator[Document]:
    """Lines that begin in [start, stop); of a compressed file, all lines."""
    try:
        with open_input(path) as file:
            position = 0
            if start:
                file.seek(start - 1)
                file.readline()
                position = file.tell()
            everything = path.suffix in _COMPRESSED
            for line in io.BufferedReader(file) if path.suffix == ".zst" else file:
                if position >= stop and not everything:
                    return
                if line.strip():
                    where = functools.partial(_line_number, path, position)
                    yield Document(_text_field(line, path, position, field, where))
                position += len(line)
    except READ_ERRORS as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def _text_field(line: bytes, path: pathlib.Path, position: int, field: str, where: Callable[[], int]) -> str:
    text = _decode(line, path, position)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers too long, brackets too deep
        raise InputError(f"{path}, line {where()}: not JSON: {getattr(error, 'msg', error)}") from error
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        fields = ", ".join(record) if isinstance(record, dict) else "it is no object"
        raise InputError(f"{path}, line {where()}: no text in the field {field!r} (there are: {fields})")
    try:
        record[field].encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{path}, line {where()}: the text has half a surrogate pair, which is no Unicode") from error
    return record[field]


def _line_number(path: pathlib.Path, position: int) -> int:
    """The number of the line that begins at a byte; counted only when there is an error to report."""
    with open_input(path) as file:
        return 1 + file.read(position).count(b"\n")
