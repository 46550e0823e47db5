"""Messages of conversations: their check, and the check that a chat template renders tools and null content."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from illada_jax.errors import InputError

ROLES = ("system", "user", "assistant", "tool")

Message = Mapping[str, Any]

_SYNONYMS = {"developer": "system"}
_TOOL_KEYS = {"assistant": ("tool_calls",), "tool": ("name", "tool_call_id")}


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages, reduced to what is rendered and learnt.

    Args:
      messages: objects with `role` (system or developer, user, assistant, tool) and `content` (text, or a list of parts
        with text). An answer with `tool_calls` may have no content. `weight` 0 or `train` false: seen, not learnt.

    Returns:
      For each message its role and content, what belongs to tools, and `train`: False if it is not to be learnt.

    Raises:
      InputError: a message is invalid; names the first.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise InputError("messages: must be a list of objects with role and content")
    checked: list[dict[str, Any]] = []
    for number, message in enumerate(messages, start=1):
        try:
            checked.append(_check_message(message))
        except InputError as error:
            raise InputError(f"message {number}: {error}") from error
        if number > 1 and checked[-1]["role"] == "system":
            raise InputError(f"message {number}: a system message must come first")
    if not checked:
        raise InputError("messages: must not be empty")
    return checked


def _check_message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError("must be an object with role and content")
    for key in ("role", "content"):
        if key not in message and (key == "role" or not message.get("tool_calls")):
            raise InputError(f"has no {key!r} (its keys: {', '.join(map(str, message))})")
    role = message["role"]
    role = _SYNONYMS.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise InputError(f"unknown role {role!r}; known: {', '.join([*ROLES, *_SYNONYMS])}")
    checked = {"role": role, "content": _text_of(message.get("content"))}
    for key in _TOOL_KEYS.get(role, ()):
        if message.get(key):
            checked[key] = message[key]
    if checked["content"] is None and "tool_calls" not in checked:
        raise InputError("content must be a string or a list of parts with text")
    for key in ("weight", "train"):
        value = message.get(key)
        if value is not None and value not in (0, 1):
            raise InputError(f"{key} = {value!r}: must be 0 or 1 (false or true)")
        if value is not None and not value:
            checked["train"] = False
    return checked


def _text_of(content: Any) -> str | None:
    if isinstance(content, (list, tuple)):
        texts = [part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
                 for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise InputError("a part of the content is no text; only text can be used")
        return "".join(texts)
    if content is not None and not isinstance(content, str):
        raise InputError("content must be a string or a list of parts with text")
    return content


def check_tools(messages: Sequence[Message], tools: Sequence[Any], render: Callable[..., str],
                special_tokens: re.Pattern[str]) -> None:
    """Checks that a chat template renders what only some templates do: tools, their calls and results, null content.

    Args:
      messages: checked messages.
      tools: definitions of tools.
      render: the template, a function of messages and tools.
      special_tokens: matches special tokens, which must not occur: they would not stay text.

    Raises:
      InputError: the template ignores a part, or writes None.
    """
    extras = [{key: message[key] for key in _TOOL_KEYS.get(message["role"], ()) if key in message}
              for message in messages]
    if not tools and not any(extras) and all(message["role"] != "tool" for message in messages):
        return
    if special_tokens.search(json.dumps([extras, list(tools)], ensure_ascii=False, default=str)):
        raise InputError("a tool or a tool call holds a special token of the tokenizer")
    text = render(messages, tools)
    filled = [{**message, "content": message["content"] or ""} for message in messages]
    if text.count("None") > render(filled, tools).count("None"):
        raise InputError("the chat template writes None for null content")
    without_calls = [{key: value for key, value in message.items() if key != "tool_calls"} for message in filled]
    without_results = [message for message in messages if message["role"] != "tool"]
    for what, others, definitions in (("definitions of tools", messages, ()), ("tool calls", without_calls, tools),
                                      ("messages of tools", without_results, tools)):
        if (others, definitions) != (messages, tools) and _renders_as(render, others, definitions, text):
            raise InputError(f"the chat template ignores {what}")


def _renders_as(render: Callable[..., str], messages: Sequence[Message], tools: Sequence[Any], text: str) -> bool:
    try:
        return render(messages, tools) == text
    except InputError:  # the template needs what was left out
        return False
