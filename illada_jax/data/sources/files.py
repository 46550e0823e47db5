"""Sources that read files, also .gz and .zst: `text:PATH` and `jsonl:PATH` (a file, a directory or a glob)."""

import contextlib
import functools
import glob
import gzip
import io
import json
import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO

import zstandard

from illada_jax.data.sources.registry import Document, Part, register
from illada_jax.errors import InputError

_TEXT_DOCUMENT_BYTES = 16 * 1024
_JSONL_PART_BYTES = 64 * 2**20
_COMPRESSED = {".gz": gzip.open, ".zst": zstandard.open}


@register("text")
def _text(argument: str) -> list[Part]:
    """UTF-8 text files; for a directory, all of its files that are not hidden.

    A file longer than 16 KiB becomes several documents, cut at blank lines if it has any, so that a single book can be
    split into training and held-out text. Concatenated, the documents are the file.
    """
    return [Part.of_files(str(path), functools.partial(_read_text, path), (path,))
            for path in find_files("text", argument)]


@register("jsonl")
def _jsonl(argument: str) -> list[Part]:
    """Files with one JSON object per line, `PATH#FIELD`; the text is in FIELD, by default `text`."""
    pattern, _, field = argument.partition("#")
    parts = []
    for path in find_files("jsonl", pattern):
        size = path.stat().st_size
        # A plain file can be read from any line; a compressed one only from its beginning.
        step = size or 1 if path.suffix in _COMPRESSED else _JSONL_PART_BYTES
        for start in range(0, max(size, 1), step):
            stop = min(start + step, size)
            read = functools.partial(_read_jsonl, path, field or "text", start, stop)
            parts.append(Part(f"{path}@{start}", read, stop - start, (path,)))
    return parts


def find_files(kind: str, pattern: str) -> list[pathlib.Path]:
    """The files that a path, a directory or a glob names, sorted. Raises InputError if there are none."""
    if not pattern:
        raise InputError(f"source {kind!r}: names no files; write {kind}:FILE, {kind}:DIRECTORY or {kind}:GLOB")
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


@contextlib.contextmanager
def open_input(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Opens a file, decompressed according to its suffix. Raises InputError if it fails, also while it is read."""
    try:
        with io.BufferedReader(_COMPRESSED.get(path.suffix, open)(path, "rb")) as file:
            yield file
    except (OSError, EOFError, zstandard.ZstdError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def _read_text(path: pathlib.Path) -> Iterator[Document]:
    with open_input(path) as file:
        offset, size, lines = 0, 0, []
        for line in file:
            lines.append(line)
            size += len(line)
            # Without blank lines a file is cut at the end of a line; without line ends it is one document.
            if (size >= _TEXT_DOCUMENT_BYTES and not line.strip()) or size >= 2 * _TEXT_DOCUMENT_BYTES:
                yield Document(_decode(b"".join(lines), path, offset))
                offset, size, lines = offset + size, 0, []
        if lines:
            yield Document(_decode(b"".join(lines), path, offset))


def _read_jsonl(path: pathlib.Path, field: str, start: int, stop: int) -> Iterator[Document]:
    """Reads the lines that begin in the bytes [start, stop); of a compressed file, all lines."""
    with open_input(path) as file:
        position = 0
        if start:
            file.seek(start - 1)
            file.readline()
            position = file.tell()
        for line in file:
            if position >= stop and path.suffix not in _COMPRESSED:
                return
            if line.strip():
                yield Document(_text_field(line, path, position, field))
            position += len(line)


def _text_field(line: bytes, path: pathlib.Path, position: int, field: str) -> str:
    text = _decode(line, path, position)
    try:
        record = json.loads(text)
        record[field].encode()
        return record[field]
    except UnicodeEncodeError:
        problem = "the text has a lone surrogate, which is not valid Unicode"
    except (AttributeError, KeyError, TypeError):
        keys = f"its keys: {', '.join(record)}" if isinstance(record, dict) else "not an object"
        problem = f"no text in the field {field!r} ({keys})"
    except (ValueError, RecursionError) as error:  # ValueError also for too long numbers; RecursionError for nesting
        problem = f"not JSON: {getattr(error, 'msg', error)}"
    with open_input(path) as file:
        line_number = 1 + file.read(position).count(b"\n")
    raise InputError(f"{path}, line {line_number}: {problem}")


def _decode(raw: bytes, path: pathlib.Path, offset: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {offset + error.start} (0x{raw[error.start]:02X})") from error

