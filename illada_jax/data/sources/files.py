"""Sources of text in files: `text:PATH`, `jsonl:PATH[#FIELD]` and `parquet:PATH[:COLUMN]`.

A path is that of a file, a directory or a glob. Files are streamed: the memory needed does not depend on their size. A
record without text (null) is an empty document, which is counted and left out; a record longer than
config.data.max_document_megabytes is an error.
"""

import functools
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from illada_jax.data.sources.records import RejectedExample, holds_array, parse_json, read_records, too_long
from illada_jax.data.sources.registry import Document, Part, register
from illada_jax.data.sources.streams import COMPRESSED, PARQUET, find_files, open_input, read_lines
from illada_jax.errors import InputError

_DOCUMENT_BYTES = 16 * 1024  # of a text file that is cut into documents
_PIECE_BYTES = 2 * _DOCUMENT_BYTES
_JSONL_PART_BYTES = 64 * 2**20


@register("text")
def _text(argument: str) -> list[Part]:
    """UTF-8 text files; for a directory, all of its files that are not hidden.

    A file longer than 16 KiB becomes several documents, cut at blank lines if it has any, so that a single book can be
    split into training and held-out text. Concatenated, the documents are the file.
    """
    return [Part.of_files(str(path), functools.partial(_read_text, path), (path,))
            for path in find_files("text", argument)]


@register("jsonl", takes_limit=True)
def _jsonl(argument: str, max_bytes: int) -> list[Part]:
    """Records with the text in FIELD, by default `text`: JSON lines, a JSON array, or Parquet by its suffix."""
    pattern, _, field = argument.partition("#")
    parts = []
    for path in find_files("jsonl", pattern):
        # A plain file of lines can be read from any line; others only from their beginning.
        if path.suffix in (*COMPRESSED, *PARQUET) or holds_array(path, max_bytes):
            parts.append(_records_part(path, field or "text", max_bytes))
            continue
        size = path.stat().st_size
        for start in range(0, max(size, 1), _JSONL_PART_BYTES):
            stop = min(start + _JSONL_PART_BYTES, size)
            read = functools.partial(_read_jsonl, path, field or "text", start, stop, max_bytes)
            parts.append(Part(f"{path}@{start}", read, stop - start, (path,)))
    return parts


@register("parquet", takes_limit=True)
def _parquet(argument: str, max_bytes: int) -> list[Part]:
    """Parquet files with the text in COLUMN, by default `text`."""
    pattern, _, column = argument.rpartition(":")
    if not pattern or "/" in column or os.path.exists(argument):  # the colon, if any, belongs to the path
        pattern, column = argument, ""
    return [_records_part(path, column or "text", max_bytes) for path in find_files("parquet", pattern)]


def _records_part(path: pathlib.Path, field: str, max_bytes: int) -> Part:
    return Part.of_files(str(path), functools.partial(_read_records, path, field, max_bytes), (path,))


def _read_text(path: pathlib.Path) -> Iterator[Document]:
    with open_input(path) as file:
        offset, size, pieces = 0, 0, []
        for piece in _pieces(file):
            pieces.append(piece)
            size += len(piece)
            # Without blank lines a file is cut at the end of a line; within a line only if it is long.
            if ((size >= _DOCUMENT_BYTES and not piece.strip()) or size >= 2 * _DOCUMENT_BYTES
                    or not piece.endswith(b"\n")):
                yield Document(_decode(b"".join(pieces), path, offset))
                offset, size, pieces = offset + size, 0, []
        if pieces:
            yield Document(_decode(b"".join(pieces), path, offset))


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; long ones in pieces that end with a space, or else with a whole character."""
    rest = b""
    while piece := rest + file.readline(_PIECE_BYTES - len(rest)):
        rest = b""
        if len(piece) == _PIECE_BYTES and not piece.endswith(b"\n"):
            cut = piece.rfind(b" ", _DOCUMENT_BYTES) + 1
            if not cut:  # before the last byte that begins a character
                cut = max((i for i in range(len(piece) - 4, len(piece)) if piece[i] & 0xC0 != 0x80), default=len(piece))
            piece, rest = piece[:cut], piece[cut:]
        yield piece


def _read_jsonl(path: pathlib.Path, field: str, start: int, stop: int, max_bytes: int) -> Iterator[Document]:
    """Reads the lines that begin in the bytes [start, stop)."""
    with open_input(path) as file:
        before = max(start - 1, 0)
        file.seek(before)
        lines = read_lines(file, max_bytes)
        if start:
            next(lines, None)  # the end of a line of the part before
        for position, line in lines:
            position += before
            if position >= stop:
                return
            where = functools.partial(_line_at, path, position)
            if line is None:
                yield _document(too_long("", max_bytes), field, where, max_bytes)
            elif line.strip():
                yield _document(parse_json("", _decode(line, path, position)), field, where, max_bytes)


def _read_records(path: pathlib.Path, field: str, max_bytes: int) -> Iterator[Document]:
    for where, record in read_records(path, max_bytes, field):
        yield _document(record, field, where.__str__, max_bytes)


def _document(record: Any, field: str, where: Callable[[], str], max_bytes: int) -> Document:
    """The text of a record, which is empty if it is null. Raises InputError if there is none."""
    if isinstance(record, RejectedExample):
        raise InputError(f"{where()}: {': '.join(filter(None, [record.reason, record.detail]))}")
    try:
        text = record[field]
        if text is None:
            return Document("")
        text.encode()
    except UnicodeEncodeError:
        problem = "the text has a lone surrogate, which is not valid Unicode"
    except (AttributeError, KeyError, TypeError):
        keys = f"its keys: {', '.join(record)}" if isinstance(record, dict) else "not an object"
        problem = f"no text in the field {field!r} ({keys})"
    else:
        if len(text) <= max_bytes:
            return Document(text)
        problem = too_long("", max_bytes).reason
    raise InputError(f"{where()}: {problem}")


def _line_at(path: pathlib.Path, position: int) -> str:
    """The file and the number of the line at a position, for messages."""
    number, left = 1, position
    with open_input(path) as file:
        while left and (content := file.read(min(left, _PIECE_BYTES))):
            number, left = number + content.count(b"\n"), left - len(content)
    return f"{path}, line {number}"


def _decode(raw: bytes, path: pathlib.Path, offset: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {offset + error.start} (0x{raw[error.start]:02X})") from error
