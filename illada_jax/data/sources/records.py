"""Records of files: JSON lines, a JSON array of objects (both also compressed), or Parquet; read in bounded memory."""

import io
import json
import pathlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from illada_jax.data.sources.streams import BOM, PARQUET, open_input, read_lines
from illada_jax.errors import InputError

_PIECE = 2**16  # characters or bytes read at once
_BATCH_ROWS = 16  # of Parquet, decoded at once
_BETWEEN_RECORDS = re.compile(r"[\s,]*")


@dataclass(frozen=True)
class RejectedExample:
    """A record that cannot be read, or is not a valid example.

    Attributes:
      where: the position in the source.
      reason: the reason, in words that are the same for all such records, so that they can be counted.
      detail: details of this record, for messages.
    """

    where: str
    reason: str
    detail: str = ""


def read_records(path: pathlib.Path, max_bytes: int, column: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the position and the value of each record, or a RejectedExample in place of a value that is no JSON.

    Args:
      path: Parquet by its suffix, else JSON.
      max_bytes: the longest record of JSON.
      column: the only column of Parquet to read; empty: all.

    Raises:
      InputError: the file cannot be read, a JSON array is malformed, or the column is missing; names the file.
    """
    if path.suffix in PARQUET:
        return _parquet_records(path, column)
    return _array_records(path, max_bytes) if holds_array(path, max_bytes) else _line_records(path, max_bytes)


def parse_json(where: str, text: str | bytes) -> Any:
    """The value of a JSON text, or a RejectedExample."""
    try:
        return json.loads(text)
    except UnicodeDecodeError as error:
        return RejectedExample(where, "not UTF-8", f"byte {error.start}")
    except (ValueError, RecursionError) as error:  # ValueError also for too long numbers
        return RejectedExample(where, "not JSON", getattr(error, "msg", str(error)))


def too_long(where: str, max_bytes: int) -> RejectedExample:
    """The rejection of a record that is longer than the limit."""
    return RejectedExample(where, f"longer than max_document_megabytes = {max_bytes / 2**20:g}")


def holds_array(path: pathlib.Path, max_bytes: int) -> bool:
    """True if a file is a JSON array of objects, on one line or several, rather than lines of JSON."""
    with open_input(path) as file:
        lines = (line for line in iter(lambda: file.readline(max_bytes + 1), b"") if line.strip(BOM + b" \t\r\n"))
        first = next(lines, b"").removeprefix(BOM)
        if not re.match(rb"\s*\[\s*(\{|$)", first):
            return False
        if len(first) >= max_bytes:
            return True
        second = next(lines, b"")
    if first.strip() == b"[":
        return second.lstrip().startswith(b"{")
    # A line that is a whole array, followed by others, is a record among lines.
    return not second or isinstance(parse_json("", first), RejectedExample)


def _line_records(path: pathlib.Path, max_bytes: int) -> Iterator[tuple[str, Any]]:
    with open_input(path) as file:
        for number, (_, line) in enumerate(read_lines(file, max_bytes), start=1):
            where = f"{path}, line {number}"
            if line is None:
                yield where, too_long(where, max_bytes)
            elif line.strip():
                yield where, parse_json(where, line)


def _array_records(path: pathlib.Path, max_bytes: int) -> Iterator[tuple[str, Any]]:
    decoder = json.JSONDecoder()
    with open_input(path) as file:
        text = io.TextIOWrapper(file, "utf-8-sig")
        number = 1
        try:
            while not (buffer := text.read(_PIECE).lstrip()):
                pass
            start = 1  # after the bracket
            while True:
                start = _BETWEEN_RECORDS.match(buffer, start).end()
                if buffer.startswith("]", start):
                    break
                where = f"{path}, record {number}"
                try:
                    record, end = decoder.raw_decode(buffer, start)
                    problem = "the array has no end"
                except (ValueError, RecursionError) as error:
                    end, problem = len(buffer), getattr(error, "msg", str(error))
                if end < len(buffer):  # else it may be incomplete
                    yield where, record
                    start, number = end, number + 1
                    continue
                if end - start > max_bytes:
                    raise InputError(f"{where}: {too_long(where, max_bytes).reason}, or not JSON ({problem})")
                more = text.read(max(_PIECE, end - start))
                if not more:
                    raise InputError(f"{where}: the JSON array breaks off: {problem}")
                buffer, start = buffer[start:] + more, 0
            rest = buffer[start + 1 :]
            while not rest.strip():
                rest = text.read(_PIECE)
                if not rest:
                    return
            raise InputError(f"{path}: text follows the JSON array; write one array of records, or one record a line")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 (record {number} or after it)") from error


def _parquet_records(path: pathlib.Path, column: str) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{path}: Parquet needs pyarrow: pip install 'illada_jax[parquet]'") from error
    try:
        # A page, not a whole column, is decompressed at once. A few rows of a dictionary can be large.
        with pyarrow.parquet.ParquetFile(path, buffer_size=_PIECE, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if column and column not in names:
                raise InputError(f"{path}: no column {column!r}; its columns: {', '.join(names)}")
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[column] if column else None):
                for values in zip(*batch.columns, strict=True):
                    number += 1
                    yield f"{path}, row {number}", {
                        name: value.as_py() for name, value in zip(batch.schema.names, values, strict=True)}
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read as Parquet: {' '.join(str(error).split())}") from error
