"""Sources of examples for fine-tuning: `chat:PATH` and `tasks:NAME:COUNT`.

`chat:PATH` reads JSON lines (also .gz, .zst) or Parquet from a file, a directory or a glob. A record has `messages`, a
list of objects with `role` and `content`, or `prompt` and `response`, two texts that are used without a template. An
invalid record becomes a `RejectedExample` with its position and the reason; none is dropped silently.
"""

import functools
import json
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from illada_jax.data.sources import synthetic
from illada_jax.data.sources.files import find_files, open_input
from illada_jax.data.sources.registry import Part
from illada_jax.data.tokenizers.chat import check_messages
from illada_jax.errors import InputError

_PARQUET = (".parquet", ".pq")


@dataclass(frozen=True)
class Example:
    """A conversation, or a pair of prompt and response.

    Attributes:
      where: the position in the source, for messages.
      messages: the conversation; empty for a pair.
      prompt: the prompt of a pair.
      response: the response of a pair, without an end token.
    """

    where: str
    messages: tuple[dict[str, str], ...] = ()
    prompt: str = ""
    response: str = ""

    @property
    def group(self) -> str:
        """The key of the held-out split: examples with the same question fall on the same side."""
        questions = [message["content"] for message in self.messages if message["role"] != "assistant"]
        return "\n".join(questions[:2]) if self.messages else self.prompt

    @property
    def texts(self) -> list[str]:
        """The contents of all messages, or prompt and response."""
        return [message["content"] for message in self.messages] or [self.prompt, self.response]


@dataclass(frozen=True)
class RejectedExample:
    """A record that is not a valid example.

    Attributes:
      where: the position in the source.
      reason: the reason, in words that are the same for all such records, so that they can be counted.
      detail: details of this record, for messages.
    """

    where: str
    reason: str
    detail: str = ""


def parts(spec: str) -> list[Part]:
    """The parts of a source, which read Example | RejectedExample. Raises InputError if it is unknown or invalid."""
    kind, _, argument = spec.partition(":")
    if kind == "tasks":
        return [Part.of_files(spec, functools.partial(_read_task, *synthetic.parse(argument)), ())]
    if kind == "chat":
        return [Part.of_files(str(path), functools.partial(_read_file, path), (path,))
                for path in find_files("chat", argument)]
    raise InputError(f"source {spec!r}: fine-tuning (config.sft.format) reads chat:PATH and tasks:NAME:COUNT")


def _read_task(name: str, count: int, seed: int) -> Iterator[Example]:
    for number, (prompt, response) in enumerate(synthetic.examples(name, count, seed), start=1):
        yield Example(f"tasks:{name}, example {number}", prompt=prompt, response=response)


def _read_file(path: pathlib.Path) -> Iterator[Example | RejectedExample]:
    for where, record in (_parquet_records if path.suffix in _PARQUET else _json_records)(path):
        yield record if isinstance(record, RejectedExample) else to_example(where, record)


def to_example(where: str, record: Any) -> Example | RejectedExample:
    """The example in a record, or the reason why it is invalid."""
    if not isinstance(record, dict):
        return RejectedExample(where, "not an object")
    if record.get("messages") is not None:
        try:
            messages = check_messages(record["messages"])
        except InputError as error:
            return RejectedExample(where, "bad message", str(error))
        if messages[-1]["role"] != "assistant":
            return RejectedExample(where, "no answer", f"the last message has the role {messages[-1]['role']!r}")
        example = Example(where, messages=tuple(messages))
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
    else:
        missing = [key for key in ("prompt", "response") if not isinstance(record.get(key), str)]
        if missing:
            keys = ", ".join(map(str, record)) or "none"
            return RejectedExample(where, "neither messages nor prompt and response",
                                   f"no text in {' and '.join(map(repr, missing))}; its keys: {keys}")
        example = Example(where, prompt=record["prompt"], response=record["response"])
        answers = [example.response]
    if not all(answer.strip() for answer in answers):
        return RejectedExample(where, "empty response")
    try:
        "".join(example.texts).encode()
    except UnicodeEncodeError:
        return RejectedExample(where, "a lone surrogate, which is not valid Unicode")
    return example


def _json_records(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    with open_input(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                try:
                    yield where, json.loads(line)
                except UnicodeDecodeError as error:
                    yield where, RejectedExample(where, "not UTF-8", f"byte {error.start}")
                except (ValueError, RecursionError) as error:  # ValueError also for too long numbers
                    yield where, RejectedExample(where, "not JSON", getattr(error, "msg", str(error)))


def _parquet_records(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{path}: Parquet needs pyarrow: pip install 'illada_jax[parquet]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            records = (record for batch in file.iter_batches(batch_size=1024) for record in batch.to_pylist())
            for number, record in enumerate(records, start=1):
                yield f"{path}, row {number}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read as Parquet: {' '.join(str(error).split())}") from error
