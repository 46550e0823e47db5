"""Sources of examples for fine-tuning: `chat:PATH` and `tasks:NAME:COUNT`.

`chat:PATH` reads JSON lines, a JSON array of objects (both also .gz, .zst) or Parquet from a file, a directory or a
glob. `experiments/README.md` lists the forms of a record, each with what is learnt from it. An invalid record becomes a
`RejectedExample` with its position and the reason; none is dropped silently.
"""

import functools
import json
import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from illada_jax.data.sources import synthetic
from illada_jax.data.sources.records import RejectedExample, read_records
from illada_jax.data.sources.registry import MAX_DOCUMENT_BYTES, Part
from illada_jax.data.sources.streams import find_files
from illada_jax.data.tokenizers.messages import check_messages
from illada_jax.errors import InputError

# Speakers of ShareGPT's `conversations`; others are roles already.
_ROLES = {"human": "user", **dict.fromkeys(("gpt", "chatgpt", "bing", "bard"), "assistant")}


@dataclass(frozen=True)
class Example:
    """A conversation, or a pair of prompt and response.

    Attributes:
      where: the position in the source, for messages.
      messages: the conversation, as `check_messages` returns it; empty for a pair.
      tools: definitions of tools, for the chat template.
      prompt: the prompt of a pair.
      response: the response of a pair, without an end token.
    """

    where: str
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[Any, ...] = ()
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
        return [message["content"] or "" for message in self.messages] or [self.prompt, self.response]


def parts(spec: str, max_bytes: int = MAX_DOCUMENT_BYTES) -> list[Part]:
    """The parts of a source, which read Example | RejectedExample; records longer than the limit are rejected.

    Raises:
      InputError: the source is unknown or invalid.
    """
    kind, _, argument = spec.partition(":")
    if kind == "tasks":
        return [Part.of_files(spec, functools.partial(_read_task, *synthetic.parse(argument)), ())]
    if kind == "chat":
        return [Part.of_files(str(path), functools.partial(_read_file, path, max_bytes), (path,))
                for path in find_files("chat", argument)]
    raise InputError(f"source {spec!r}: fine-tuning (config.sft.format) reads chat:PATH and tasks:NAME:COUNT")


def _read_task(name: str, count: int, seed: int) -> Iterator[Example]:
    for number, (prompt, response) in enumerate(synthetic.examples(name, count, seed), start=1):
        yield Example(f"tasks:{name}, example {number}", prompt=prompt, response=response)


def _read_file(path: pathlib.Path, max_bytes: int) -> Iterator[Example | RejectedExample]:
    for where, record in read_records(path, max_bytes):
        yield record if isinstance(record, RejectedExample) else to_example(where, record)


def to_example(where: str, record: Any) -> Example | RejectedExample:
    """The example in a record, or the reason why it is invalid."""
    if not isinstance(record, dict):
        return RejectedExample(where, "not an object")
    answer = record.get("response") if record.get("response") is not None else record.get("completion")
    messages = _messages(record, answer)
    if messages is None:
        missing = [key for key, value in (("prompt", record.get("prompt")), ("response", answer))
                   if not isinstance(value, str)]
        if missing:
            keys = ", ".join(map(str, record)) or "none"
            return RejectedExample(where, "neither messages nor prompt and response, nor another known form",
                                   f"no text in {' and '.join(map(repr, missing))}; its keys: {keys}")
        example = Example(where, prompt=record["prompt"], response=answer)
        is_empty = not answer.strip()
    else:
        try:
            messages = check_messages(messages)
        except InputError as error:
            return RejectedExample(where, "bad message", str(error))
        if messages[-1]["role"] != "assistant":
            return RejectedExample(where, "no answer", f"the last message has the role {messages[-1]['role']!r}")
        answers = [message for message in messages if message["role"] == "assistant" and message.get("train", True)]
        if not answers:
            return RejectedExample(where, "nothing to learn: every answer has weight 0 or train false")
        tools = record.get("tools") or ()
        if not isinstance(tools, (list, tuple)):
            return RejectedExample(where, "bad tools", "tools must be a list of objects")
        example = Example(where, messages=tuple(messages), tools=tuple(tools))
        is_empty = not all((answer["content"] or "").strip() or answer.get("tool_calls") for answer in answers)
    if is_empty:
        return RejectedExample(where, "empty response")
    try:
        json.dumps([example.messages, example.tools, example.prompt, example.response], ensure_ascii=False,
                   default=str).encode()
    except UnicodeEncodeError:
        return RejectedExample(where, "a lone surrogate, which is not valid Unicode")
    except RecursionError:
        return RejectedExample(where, "tools or tool calls are nested too deeply")
    return example


def _messages(record: dict[str, Any], answer: Any) -> Any:
    """The messages of a record, unchecked, in the form of `messages`; None if it has none.

    Args:
      record: the record.
      answer: its `response` or `completion`.
    """
    prompt = record.get("prompt")
    if record.get("messages") is not None:
        messages = record["messages"]
    elif record.get("conversations") is not None:
        messages = record["conversations"]
    elif isinstance(prompt, list) or isinstance(answer, list):
        # Answers within the prompt are not learnt.
        messages = [{**message, "train": False} if isinstance(message, dict) and message.get("role") == "assistant"
                    else message for message in _turn("user", prompt)] + _turn("assistant", answer)
    elif isinstance(record.get("instruction"), str):
        question, more = record["instruction"], record.get("input")
        if more:
            question = f"{question}\n\n{more}" if isinstance(more, str) else more
        messages = _turn("user", question) + _turn("assistant", record.get("output"))
    else:
        return None
    if not isinstance(messages, list):
        return messages
    messages = [_with_role(message) for message in messages]
    has_system = any(isinstance(message, Mapping) and message.get("role") in ("system", "developer")
                     for message in messages[:1])
    return messages if has_system or not record.get("system") else _turn("system", record["system"]) + messages


def _turn(role: str, content: Any) -> list[Any]:
    """Messages as they are; any other content as a single message."""
    return content if isinstance(content, list) else [{"role": role, "content": content}]


def _with_role(message: Any) -> Any:
    """A message of ShareGPT (`from`, `value`) with role and content; others as they are."""
    if not isinstance(message, dict) or "from" not in message or "role" in message:
        return message
    others = {key: value for key, value in message.items() if key not in ("from", "value")}
    speaker = message["from"]
    return {**others, "role": _ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker,
            "content": message.get("value")}
