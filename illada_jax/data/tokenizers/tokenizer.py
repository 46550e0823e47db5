"""The interface of tokenizers: lossless, with the special ids that diffusion needs.

Text never becomes a special token: `encode` yields ids of text only, whatever the text says. A tokenizer is defined by
its files, so a checkpoint can embed it.
"""

import abc
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping

from illada_jax.errors import InputError
from illada_jax.files import parse_json

SPECIAL_NAMES = ("bos", "pad", "eos", "mask")
CHAT_FILES = ("chat_template.jinja", "tokenizer_config.json")  # the first one with a template wins
SPECIAL_IDS_FILE = "special_ids.json"
MAX_VOCAB_SIZE = 2**24  # a larger id is a mistake in a file; tables of all ids would exhaust memory


class Tokenizer(abc.ABC):
    """Maps text to ids and back.

    Attributes:
      vocab_size: number of ids, special ids included.
      special_ids: the special ids by name, in the order of SPECIAL_NAMES.
      mask_id, eos_id, bos_id, pad_id: each of them.
      unused_ids: ids below vocab_size without a token; a decoder must not write them.
      chat_files: contents of its CHAT_FILES by name. They define how conversations look, not what ids mean.
    """

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

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text: never a special id, no BOS, no EOS."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Special ids yield no text; bytes that are not UTF-8 become U+FFFD."""

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
        """The Jinja template of conversations, or None; see `read_chat_template`."""
        return read_chat_template(self.chat_files)

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


def read_chat_template(files: Mapping[str, bytes]) -> str | None:
    """The chat template in the files of a tokenizer, or None. Raises InputError if one of CHAT_FILES is malformed."""
    try:
        template = parse_json(files.get("tokenizer_config.json", b"{}"), "tokenizer_config.json").get("chat_template")
        if "chat_template.jinja" in files:
            return files["chat_template.jinja"].decode()
        if isinstance(template, list):  # several named templates
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{' or '.join(CHAT_FILES)}: no chat template can be read: {error}") from error
    if not isinstance(template, str | None):
        raise InputError("tokenizer_config.json: chat_template must be a string")
    return template
