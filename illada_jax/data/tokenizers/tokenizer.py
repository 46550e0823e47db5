"""The interface of tokenizers: lossless, with the special ids that diffusion needs.

Text never becomes a special token: `encode` yields ids of text only, whatever the text says. A token stands for the
same UTF-8 bytes wherever it occurs; only the blank that some tokenizers put in front of a text is dropped again. So the
text of ids behind others is exact: decode(prompt) + decode(ids, after=prompt) == decode(prompt + ids). A tokenizer is
defined by its files, so a checkpoint can embed it.
"""

import abc
import codecs
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence

from illada_jax.errors import InputError
from illada_jax.files import parse_json

SPECIAL_NAMES = ("bos", "pad", "eos", "mask")
# The first one with a template wins.
CHAT_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
SPECIAL_IDS_FILE = "special_ids.json"
MAX_VOCAB_SIZE = 2**24  # a larger id is a mistake in a file; tables of all ids would exhaust memory


class Tokenizer(abc.ABC):
    """Maps text to ids and back.

    Attributes:
      vocab_size: number of ids, special ids included.
      special_ids: the special ids by name, in the order of SPECIAL_NAMES.
      mask_id, eos_id, bos_id, pad_id: each of them.
      unused_ids: ids below vocab_size without a token; a decoder must not write them.
      opens_with_blank: decoding drops the blank that opens a text, because encoding puts one there.
      chat_files: contents of its CHAT_FILES by name. They define how conversations look, not what ids mean.
    """

    # The UTF-8 bytes of each id; none for special and unused ids, which may lie beyond the end. Subclasses define it.
    _bytes_of_id: Sequence[bytes]

    def __init__(self, vocab_size: int, special_ids: Mapping[str, int]):
        for name in SPECIAL_NAMES:
            if not 0 <= special_ids[name] < min(vocab_size, MAX_VOCAB_SIZE):
                raise InputError(f"tokenizer: {name} id {special_ids[name]} is outside the vocabulary of "
                                 f"{min(vocab_size, MAX_VOCAB_SIZE)}")
        self.vocab_size = vocab_size
        self.special_ids = {name: special_ids[name] for name in SPECIAL_NAMES}
        self.bos_id, self.pad_id, self.eos_id, self.mask_id = self.special_ids.values()
        self.unused_ids: tuple[int, ...] = ()
        self.chat_files: dict[str, bytes] = {}
        self.opens_with_blank = False

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text: never a special id, no BOS, no EOS."""

    def encode_behind(self, text: str) -> list[int]:
        """The ids of a text that continues another one: without the blank that may open a text."""
        return self.encode(text)

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """The ids of a text with special tokens, which are given by id, between its pieces.

        The ids of a Hugging Face tokenizer are those of the `tokenizers` library for the whole text.
        """
        return [id_ for n, part in enumerate(parts) for id_ in (
            [part] if isinstance(part, int) else self.encode_behind(part) if n else self.encode(part))]

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes of ids, wherever they occur: the blank that opens a text is kept."""
        table = self._bytes_of_id
        return b"".join(table[i] for i in ids if 0 <= i < len(table))

    def decode(self, ids: Iterable[int], after: Sequence[int] = (), final: bool = True) -> str:
        """The text of ids. Special ids yield no text; bytes that are not UTF-8 become U+FFFD.

        Args:
          ids: the ids.
          after: ids before them. A character that begins in `after` belongs to the result.
          final: False leaves out an incomplete character at the end, which further ids may complete.
        """
        before = b""
        for id_ in reversed(after):
            before = self.to_bytes([id_]) + before
            if len(before) > 3:  # the longest incomplete character has three bytes
                break
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        utf8.decode(before)  # keeps an incomplete character
        content = self.to_bytes(ids)
        return utf8.decode(content.removeprefix(b" ") if self.opens_with_blank and not before else content, final)

    def id_to_piece(self, token_id: int) -> str:
        """The name of a token, for display; here of a special or unused id."""
        return next((f"<{name}>" for name, special_id in self.special_ids.items() if special_id == token_id),
                    f"<{token_id}>")

    @abc.abstractmethod
    def vocabulary_files(self) -> dict[str, bytes]:
        """The files that define what ids mean."""

    def files(self) -> dict[str, bytes]:
        """All files of the tokenizer; `tokenizer_from_files` is the inverse."""
        return {**self.vocabulary_files(), **self.chat_files}

    @property
    def special_tokens(self) -> dict[str, int]:
        """Special tokens as chat templates write them, with their ids. In text they are ordinary text."""
        return {self.id_to_piece(special_id): special_id for special_id in self.special_ids.values()}

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of conversations, or None. Raises InputError if it must be chosen from several."""
        templates = read_chat_templates(self.chat_files)
        if templates and "default" not in templates:
            raise InputError(f"there are several chat templates: {', '.join(templates)}; choose one by its name with "
                             "--chat_template (in training: config.sft.chat_template)")
        return templates.get("default")

    def choose_chat_template(self, name: str) -> None:
        """Selects one of several named templates; saved files hold it alone. Raises InputError if it is unknown."""
        templates = read_chat_templates(self.chat_files)
        if name not in templates:
            raise InputError(f"chat_template = {name!r}: unknown; the tokenizer has {', '.join(templates) or 'none'}")
        self.chat_files = {**self.chat_files, "chat_template.jinja": templates[name].encode()}

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the files that define what ids mean."""
        digest = hashlib.sha256()
        for name, content in sorted(self.vocabulary_files().items()):
            digest.update(f"{name}:{len(content)}:".encode() + content)
        return digest.hexdigest()[:16]

    def save(self, directory: pathlib.Path) -> None:
        """Writes the files to a directory; accepts any path type with mkdir and `/`, such as epath."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (directory / name).write_bytes(content)

    def _special_ids_file(self, kind: str) -> dict[str, bytes]:
        return {SPECIAL_IDS_FILE: json.dumps({"kind": kind, **self.special_ids}, indent=1).encode()}


def read_chat_templates(files: Mapping[str, bytes]) -> dict[str, str]:
    """The chat templates in the files of a tokenizer, by name; a single one is the `default`.

    Raises InputError if one of CHAT_FILES is malformed.
    """
    try:
        found = [parse_json(files[name], name).get("chat_template") for name in CHAT_FILES[1:] if name in files]
        if "chat_template.jinja" in files:
            found.insert(0, files["chat_template.jinja"].decode())
        found = next((template for template in found if template), {})
        if isinstance(found, list):  # several named templates
            found = {entry["name"]: entry["template"] for entry in found}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{' or '.join(CHAT_FILES)}: no chat template can be read: {error}") from error
    templates = {"default": found} if isinstance(found, str) else found
    if not isinstance(templates, dict) or not all(isinstance(t, str) for named in templates.items() for t in named):
        raise InputError(f"{' or '.join(CHAT_FILES[1:])}: chat_template must be a string or a list of named ones")
    return {"default": next(iter(templates.values()))} if len(templates) == 1 else templates
