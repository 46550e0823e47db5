"""Conversations as token ids, through the chat template of the tokenizer.

Templates are in Jinja, as Hugging Face tokenizers have them; `templates` renders them in a sandbox. Special tokens that
the template writes become their ids; those in the content of a message stay text. To that end, each one in a content is
replaced by a private-use character that occurs neither in the conversation nor in the template, and restored after
rendering.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from illada_jax.data.tokenizers.messages import Message, check_messages, check_tools
from illada_jax.data.tokenizers.templates import reason_to_refuse, render
from illada_jax.data.tokenizers.tokenizer import Tokenizer
from illada_jax.errors import InputError
from illada_jax.files import parse_json

# For tokenizers without a template. A user cannot write BOS; it separates contents from roles.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ bos_token }}{{ message.role }}{{ bos_token }}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token }}assistant{{ bos_token }}{% endif %}"
)

_PRIVATE_USE = range(0xF0000, 0xFFFFE)


class Conversation(NamedTuple):
    """A tokenised conversation to learn from.

    Attributes:
      ids: the tokens, up to the end token of the last answer.
      is_answer: for each token, True if it belongs to an answer to learn or is the end token of one.
      is_fixed: for each token, True if it belongs to a message that is seen but not learnt: it is never masked.
    """

    ids: list[int]
    is_answer: list[bool]
    is_fixed: list[bool]


class ChatFormat(NamedTuple):
    """The behaviour of a template, observed by rendering a probe.

    Attributes:
      end_id: the token that ends an answer; EOS if the template writes none.
      turn_ids: the tokens that open a turn; an answer that runs into the next turn ends there, too.
      writes_end: the template writes the end token; otherwise it is added to each answer.
      has_system: the template renders system messages; otherwise they are prepended to the first user message.
      trims: the template strips white space from answers.
    """

    end_id: int
    turn_ids: tuple[int, ...]
    writes_end: bool
    has_system: bool
    trims: bool

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        return tuple(dict.fromkeys((self.end_id, *self.turn_ids)))


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool,
                tools: Sequence[Any] = ()) -> list[int]:
    """The ids of a conversation.

    Args:
      tokenizer: its template is used, or `DEFAULT_TEMPLATE` if it has none.
      messages: mappings with `role` and `content`, see `check_messages`; a system message must come first.
      add_generation_prompt: append the header of an assistant turn, so that the model writes the answer.
      tools: definitions of tools, for the template.

    Raises:
      InputError: a message is invalid, or the template is broken, rejects the conversation or ignores its tools.
    """
    messages = check_messages(messages)
    template = tokenizer.chat_template or DEFAULT_TEMPLATE
    chat = chat_format(tokenizer)
    if messages[0]["role"] == "system" and not chat.has_system:
        messages = _merge_system(messages)
    special_tokens = tokenizer.special_tokens
    specials = _specials(tuple(special_tokens))
    contents, originals = _protect([message["content"] or "" for message in messages], specials, template)
    protected = []
    for message, content in zip(messages, contents, strict=True):
        if message["role"] == "assistant" and not chat.writes_end:
            if "tool_calls" in message:
                raise InputError("the chat template writes no end token, so an answer with tool calls has no end")
            content = (content.strip() if chat.trims else content) + tokenizer.id_to_piece(tokenizer.eos_id)
        shown = {key: value for key, value in message.items() if key != "train"}
        protected.append({**shown, "content": None if message["content"] is None else content})
    variables = _variables(tokenizer)

    def rendered(messages: Sequence[Message], tools: Sequence[Any]) -> str:
        return render(template, messages, add_generation_prompt, {**variables, "tools": tools} if tools else variables)

    check_tools(protected, tuple(tools), rendered, specials.pattern)
    pieces = filter(None, specials.pattern.split(rendered(protected, tuple(tools))))
    return tokenizer.encode_parts([special_tokens.get(piece, piece.translate(originals)) for piece in pieces])


def encode_conversation(tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Any] = ()) -> Conversation:
    """A conversation to learn from, whose last message is an answer.

    Each answer ends with one end token; anything that the template writes after the last one is dropped. Messages with
    `train` false (see `check_messages`) are seen, not learnt.

    Raises:
      InputError: a message is invalid, the last one is not the assistant's, the template rejects the conversation, or
        earlier turns render differently when more turns follow.
    """
    messages = check_messages(messages)
    if messages[-1]["role"] != "assistant":
        raise InputError(f"the last message has the role {messages[-1]['role']!r}: there is no answer to learn")
    ids = encode_chat(tokenizer, messages, False, tools)
    end_id = chat_format(tokenizer).end_id
    is_answer, is_fixed = [False] * len(ids), [False] * len(ids)
    end = 0
    for turn, message in enumerate(messages):
        is_learnt = message.get("train", True)
        if message["role"] == "assistant":
            start = max(_start(tokenizer, messages[:turn], ids, tools, (True, False)), end)
            end = ids.index(end_id, start) + 1 if end_id in ids[start:] else len(ids)
            (is_answer if is_learnt else is_fixed)[start:end] = [True] * (end - start)
        elif not is_learnt:
            start, stop = (_start(tokenizer, messages[:count], ids, tools, (False,)) for count in (turn, turn + 1))
            is_fixed[start:stop] = [True] * (stop - start)
    return Conversation(ids[:end], is_answer[:end], is_fixed[:end])


def chat_format(tokenizer: Tokenizer) -> ChatFormat:
    """The behaviour of a tokenizer's template. Raises InputError if it is broken, exceeds limits or drops answers."""
    return _probe(tokenizer.chat_template or DEFAULT_TEMPLATE, tuple(tokenizer.special_tokens.items()),
                  tuple(_variables(tokenizer).items()), tokenizer.eos_id)


def _merge_system(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    if len(messages) < 2 or messages[1]["role"] != "user":
        raise InputError("message 1: the chat template has no system role; a user message must follow it")
    merged = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [merged, *messages[2:]]


def _start(tokenizer: Tokenizer, before: list[dict[str, Any]], ids: list[int], tools: Sequence[Any],
           generation_prompts: tuple[bool, ...]) -> int:
    """The index, in the ids of the whole conversation, at which what follows `before` begins."""
    # A generation prompt may open a thought that finished turns do not show; then the turn's header is learned too.
    for add_generation_prompt in generation_prompts:
        prefix = encode_chat(tokenizer, before, add_generation_prompt, tools) if before else []
        if ids[: len(prefix)] == prefix:
            return len(prefix)
    raise InputError("the chat template renders earlier turns differently when more turns follow, so answers cannot be "
                     "separated from prompts")


class _Specials(NamedTuple):
    """The special tokens of a tokenizer, to be found in texts.

    Attributes:
      pattern: matches each of them, as a group.
      beginnings, endings: all parts of tokens that leave at least one character to complete them.
    """

    pattern: re.Pattern[str]
    beginnings: tuple[str, ...]
    endings: tuple[str, ...]


@functools.lru_cache(maxsize=16)
def _specials(tokens: tuple[str, ...]) -> _Specials:
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    cuts = [(token, n) for token in longest_first for n in range(1, len(token))]
    return _Specials(re.compile(f"({'|'.join(map(re.escape, longest_first))})"),
                     tuple({token[:n] for token, n in cuts}), tuple({token[n:] for token, n in cuts}))


def _protect(contents: list[str], specials: _Specials, template: str) -> tuple[list[str], dict[int, str]]:
    """The contents with placeholders for special tokens, and the table by which `str.translate` restores them."""
    used = set(template).union(*contents)
    free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
    edge = next(free)
    tokens = {token for content in contents for token in specials.pattern.findall(content)}
    placeholders = {token: next(free) for token in sorted(tokens)}
    protected = []
    for content in contents:
        content = specials.pattern.sub(lambda match: placeholders[match.group()], content)
        # Half a token at the edge of a content must not be completed by the template's adjacent text.
        bare = content.strip()
        before = edge if bare.startswith(specials.endings) else ""
        after = edge if bare.endswith(specials.beginnings) else ""
        protected.append(content.replace(bare, before + bare + after))
    return protected, str.maketrans({edge: "", **{c: token for token, c in placeholders.items()}})


@functools.lru_cache(maxsize=16)
def _probe(template: str, special_tokens: tuple[tuple[str, int], ...], variables: tuple[tuple[str, str], ...],
           eos_id: int) -> ChatFormat:
    reason = "" if template == DEFAULT_TEMPLATE else reason_to_refuse(template, variables)
    if reason:
        raise InputError(f"the chat template {reason}")
    ids = dict(special_tokens)

    def rendered(*contents: tuple[str, str]) -> str:
        messages = [{"role": role, "content": content} for role, content in contents]
        return render(template, messages, False, dict(variables))

    user, assistant = ("user", "PROBE-U"), ("assistant", "PROBE-A")
    _, found, after = rendered(user, assistant).partition("PROBE-A")
    if not found:
        raise InputError("the chat template does not render the content of assistant messages")
    find = _specials(tuple(ids)).pattern.findall
    ends = [ids[token] for token in find(after)]
    end_id = ends[0] if ends else eos_id
    try:
        turns = rendered(user, assistant, ("user", "PROBE-V"))
    except InputError:
        turns = ""
    turn_ids = []
    for before, behind in (("PROBE-U", "PROBE-A"), ("PROBE-A", "PROBE-V")):
        between = [ids[token] for token in find(turns.partition(before)[2].partition(behind)[0])]
        turn_ids += [id_ for id_ in between if id_ != end_id][:1]
    try:
        has_system = "PROBE-S" in rendered(("system", "PROBE-S"), user, assistant)
    except InputError:
        has_system = False
    trims = "PROBE-A\t" not in rendered(user, ("assistant", "PROBE-A\t"))
    return ChatFormat(end_id, tuple(dict.fromkeys(turn_ids)), bool(ends), has_system, trims)


def _variables(tokenizer: Tokenizer) -> dict[str, str]:
    """The variables that name special tokens: those of `tokenizer_config.json`, else those of the tokenizer."""
    named = parse_json(tokenizer.chat_files.get("tokenizer_config.json", b"{}"), "tokenizer_config.json")
    if not named:
        return {f"{name}_token": tokenizer.id_to_piece(id_) for name, id_ in tokenizer.special_ids.items()}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    return {key: text for key, text in texts.items() if key.endswith("_token") and isinstance(text, str)}
