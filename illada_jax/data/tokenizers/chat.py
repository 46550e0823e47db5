"""Conversations as token ids, through the chat template of the tokenizer.

A template is Jinja text as Hugging Face tokenizers carry it; it is rendered in a sandbox, with the settings and the
helpers that their library gives it (but no clock: a run must not depend on the day). Special tokens that the TEMPLATE
writes become their ids. What people wrote never does: before rendering, each special token that a content holds is
replaced by a private-use character which neither the conversation nor the template has, and put back as plain text.
"""

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from illada_jax.data.tokenizers.templates import check_limits, render
from illada_jax.data.tokenizers.tokenizer import Tokenizer
from illada_jax.errors import InputError

ROLES = ("system", "user", "assistant")

# What a tokenizer without a template of its own gets. BOS cannot be written by a user, and it keeps the tokens of a
# content apart from those of its role.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ bos_token }}{{ message.role }}{{ bos_token }}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token }}assistant{{ bos_token }}{% endif %}"
)

Message = Mapping[str, str]
_PRIVATE_USE = range(0xF0000, 0xFFFFE)
_PROBE = {"system": "PROBE-S", "user": "PROBE-U", "assistant": "PROBE-A"}


class Conversation(NamedTuple):
    """A conversation to learn from.

    Attributes:
      ids: its tokens; it ends with the end token of its last answer.
      is_answer: for each token, whether it belongs to an answer of the assistant, its end token included.
    """

    ids: list[int]
    is_answer: list[bool]


class ChatFormat(NamedTuple):
    """What a template does, found out by rendering a probe.

    Attributes:
      end_id: the token that ends an answer; EOS where the template writes none.
      writes_end: the template writes it; otherwise it is added to each answer.
      has_system: the template has a system role; otherwise the system message opens the first user turn.
      trims: the template strips white space from answers.
    """

    end_id: int
    writes_end: bool
    has_system: bool
    trims: bool


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
    """The ids of a conversation.

    Args:
      tokenizer: gives the template (`DEFAULT_TEMPLATE` if it has none) and the ids.
      messages: objects with `role` (system, user, assistant) and `content`; a system message comes first.
      add_generation_prompt: end with what precedes an answer of the assistant, so that the model writes it.

    Raises:
      InputError: a message is wrong, or the template refuses the conversation.
    """
    return _encode(tokenizer, check_messages(messages), add_generation_prompt)


def encode_conversation(tokenizer: Tokenizer, messages: Sequence[Message]) -> Conversation:
    """A conversation to learn from, which ends with an answer.

    Each answer ends with one end token; what the template writes after the last one is left out.

    Raises:
      InputError: a message is wrong, the last one is not the assistant's, or the template refuses the conversation or
        does not render the beginning of a conversation as the beginning of its rendering.
    """
    messages = check_messages(messages)
    if messages[-1]["role"] != "assistant":
        raise InputError(f"the last message is the {messages[-1]['role']}'s: there is no answer to learn")
    ids = _encode(tokenizer, messages, False)
    end_id = chat_format(tokenizer).end_id
    is_answer = [False] * len(ids)
    end = 0
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            start = max(_answer_start(tokenizer, messages[:turn], ids), end)
            end = ids.index(end_id, start) + 1 if end_id in ids[start:] else len(ids)
            is_answer[start:end] = [True] * (end - start)
    return Conversation(ids[:end], is_answer[:end])


def chat_format(tokenizer: Tokenizer) -> ChatFormat:
    """How the template of a tokenizer treats conversations.

    Raises:
      InputError: the template is broken.
    """
    template = tokenizer.chat_template or DEFAULT_TEMPLATE
    specials = _specials(tuple(tokenizer.special_tokens.items()))
    return _probe(template, specials, tuple(_variables(tokenizer).items()), tokenizer.eos_id)


def check_messages(messages: Any) -> list[dict[str, str]]:
    """The messages with role and content alone. Raises InputError saying which one is wrong."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise InputError("messages: a list of objects with role and content is wanted")
    checked = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise InputError(f"message {number}: must be an object with role and content")
        for key in ("role", "content"):
            if key not in message:
                raise InputError(f"message {number}: has no {key!r} (there are: {', '.join(map(str, message))})")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise InputError(f"message {number}: unknown role {role!r}; known: {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise InputError(f"message {number}: its content is no text")
        if role == "system" and checked:
            raise InputError(f"message {number}: a system message must come first")
        checked.append({"role": role, "content": content})
    if not checked:
        raise InputError("messages: there are none")
    return checked


def _encode(tokenizer: Tokenizer, messages: list[dict[str, str]], add_generation_prompt: bool) -> list[int]:
    template = tokenizer.chat_template or DEFAULT_TEMPLATE
    found = chat_format(tokenizer)
    if messages[0]["role"] == "system" and not found.has_system:
        messages = _merge_system(messages)
    specials = _specials(tuple(tokenizer.special_tokens.items()))
    protection = _Protection(specials, template, messages)
    shown = []
    for message in messages:
        content = protection.protect(message["content"])
        if message["role"] == "assistant" and not found.writes_end:
            content = (content.strip() if found.trims else content) + tokenizer.id_to_piece(tokenizer.eos_id)
        shown.append({"role": message["role"], "content": content})
    text = render(template, shown, add_generation_prompt, _variables(tokenizer))
    ids: list[int] = []
    for piece, special_id in specials.cut(text):
        ids += tokenizer.encode(protection.restore(piece)) if special_id is None else [special_id]
    return ids


def _merge_system(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    if len(messages) < 2 or messages[1]["role"] != "user":
        raise InputError("message 1: the chat template has no system role, and no user message follows to hold it")
    merged = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [merged, *messages[2:]]


def _answer_start(tokenizer: Tokenizer, before: list[dict[str, str]], ids: list[int]) -> int:
    """Where the answer to `before` begins in the ids of the whole conversation."""
    # A generation prompt may open a thought that a finished turn does not show: then the turn's header is learnt too.
    for add_generation_prompt in (True, False):
        prefix = _encode(tokenizer, before, add_generation_prompt) if before else []
        if ids[: len(prefix)] == prefix:
            return len(prefix)
    raise InputError("the chat template writes the beginning of this conversation differently when more follows, so "
                     "answers cannot be told from prompts")


class _Specials:
    """The special tokens of a tokenizer as they are written."""

    def __init__(self, ids: Mapping[str, int]):
        texts = sorted(ids, key=len, reverse=True)
        self.pattern = re.compile("(" + "|".join(map(re.escape, texts)) + ")")
        self._ids = ids
        self._longest = len(texts[0])
        self._beginnings = {text[:n] for text in texts for n in range(1, len(text))}
        self._endings = {text[n:] for text in texts for n in range(1, len(text))}

    def cut(self, text: str) -> Iterator[tuple[str, int | None]]:
        """The pieces of a text with, for those that are special tokens, their ids."""
        for piece in self.pattern.split(text):
            if piece:
                yield piece, self._ids.get(piece)

    def begins_at_end(self, text: str) -> bool:
        """Whether the text ends with the beginning of a special token."""
        return any(text[-n:] in self._beginnings for n in range(1, self._longest))

    def ends_at_begin(self, text: str) -> bool:
        """Whether the text begins with the end of a special token."""
        return any(text[:n] in self._endings for n in range(1, self._longest))


@functools.lru_cache(maxsize=16)
def _specials(ids: tuple[tuple[str, int], ...]) -> _Specials:
    return _Specials(dict(ids))


class _Protection:
    """Private-use characters in the place of special tokens that contents hold."""

    def __init__(self, specials: _Specials, template: str, messages: list[dict[str, str]]):
        contents = [message["content"] for message in messages]
        used = set(template).union(*contents)
        free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
        held = {token for content in contents for token in specials.pattern.findall(content)}
        self._specials = specials
        self._edge = next(free)
        self._stand_in = {token: next(free) for token in sorted(held)}
        self._held = {character: token for token, character in self._stand_in.items()}

    def protect(self, content: str) -> str:
        content = self._specials.pattern.sub(lambda match: self._stand_in[match.group()], content)
        # Half a token at an edge must not be made whole by what the template writes beside it.
        bare = content.strip()
        before = self._edge if self._specials.ends_at_begin(bare) else ""
        behind = self._edge if self._specials.begins_at_end(bare) else ""
        return content.replace(bare, before + bare + behind) if before or behind else content

    def restore(self, text: str) -> str:
        return "".join(self._held.get(character, character) for character in text).replace(self._edge, "")


@functools.lru_cache(maxsize=16)
def _probe(template: str, specials: _Specials, variables: tuple[tuple[str, str], ...], eos_id: int) -> ChatFormat:
    if template != DEFAULT_TEMPLATE:
        check_limits(template, dict(variables))
    turns = [{"role": role, "content": _PROBE[role]} for role in ("user", "assistant")]
    rendered = render(template, turns, False, dict(variables))
    _, found, after = rendered.partition(_PROBE["assistant"])
    if not found:
        raise InputError("the chat template does not write what the assistant says")
    ends = [special_id for _, special_id in specials.cut(after) if special_id is not None]
    system = [{"role": "system", "content": _PROBE["system"]}, *turns]
    try:
        has_system = _PROBE["system"] in render(template, system, False, dict(variables))
    except InputError:
        has_system = False
    padded = [turns[0], {"role": "assistant", "content": _PROBE["assistant"] + "\t"}]
    trims = _PROBE["assistant"] + "\t" not in render(template, padded, False, dict(variables))
    return ChatFormat(ends[0] if ends else eos_id, bool(ends), has_system, trims)


def _variables(tokenizer: Tokenizer) -> dict[str, str]:
    """The names of special tokens for a template: those that the tokenizer's config gives, else those that we have."""
    named = json.loads(tokenizer.chat_files.get("tokenizer_config.json", b"{}"))
    ours = {f"{name}_token": tokenizer.id_to_piece(special_id) for name, special_id in tokenizer.special_ids.items()}
    if not named:
        return ours
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()
             if key.endswith("_token")}
    return {key: text for key, text in texts.items() if isinstance(text, str)}
