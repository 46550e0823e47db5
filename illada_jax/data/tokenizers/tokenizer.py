"""Tokenizers: lossless, with the special ids that diffusion needs, behind one small interface.

Text never becomes a special token: whatever a document says, `encode` yields ids of text only. Three kinds exist:
bytes, SentencePiece (trained by `train_sentencepiece` or somebody else's model) and Hugging Face `tokenizer.json`
(`data/tokenizers/huggingface.py`). A tokenizer is its files, so a checkpoint can embed it.
"""

import abc
import functools
import hashlib
import io
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping

import sentencepiece

from illada_jax.errors import ConfigError, InputError

SPECIAL_NAMES = ("bos", "pad", "eos", "mask")
CHAT_FILES = ("chat_template.jinja", "tokenizer_config.json")  # the first that has a template decides
MOST_IDS = 2**24  # an id beyond is a mistake, which tables of all ids must not follow
_SPECIALS_FILE = "special_ids.json"
_SENTENCEPIECE_FILE = "sentencepiece.model"
_HUGGING_FACE_FILE = "tokenizer.json"
_BLANK = "\u2581"  # how SentencePiece writes a space
_MASK_NAME = re.compile(r"[<\[|]*mask[>\]|]*", re.IGNORECASE)
# A NormalizerSpec (field 3 of ModelProto) that protobuf merges over the model's when it is appended: name "identity",
# no character map, no dummy prefix, no white-space collapse, spaces escaped. The generated protobuf classes that come
# with SentencePiece would do, but refuse to load beside the older protobuf that Apache Beam asks for.
_LOSSLESS_NORMALIZER = b"\x1a\x12" + b"\x0a\x08identity" + b"\x12\x00" + b"\x18\x00" + b"\x20\x00" + b"\x28\x01"
_MIN_TRAINED_VOCAB_SIZE = 5 + 256
_LONGEST_TRAINING_CHUNK = 2048


class Tokenizer(abc.ABC):
    """Text to ids and back.

    Attributes:
      vocab_size: number of ids, special ones included.
      mask_id: id of MASK; `eos_id`, `bos_id`, `pad_id` likewise.
      chat_files: those of CHAT_FILES that came with it, by name: what conversations look like, not what ids mean.
    """

    def __init__(self, vocab_size: int, special_ids: Mapping[str, int]):
        for name in SPECIAL_NAMES:
            if not 0 <= special_ids[name] < min(vocab_size, MOST_IDS):
                raise InputError(f"tokenizer: {name} id {special_ids[name]} is not among the {vocab_size} ids")
        self.vocab_size = vocab_size
        self.mask_id = special_ids["mask"]
        self.eos_id = special_ids["eos"]
        self.bos_id = special_ids["bos"]
        self.pad_id = special_ids["pad"]
        self.chat_files: dict[str, bytes] = {}

    @property
    def special_ids(self) -> dict[str, int]:
        """The special ids by name."""
        return {"bos": self.bos_id, "pad": self.pad_id, "eos": self.eos_id, "mask": self.mask_id}

    @property
    def unused_ids(self) -> tuple[int, ...]:
        """Ids below vocab_size that stand for nothing: a decoder must not write them."""
        return ()

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text. Never a special id, no BOS, no EOS."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Special ids yield nothing; bytes that are not UTF-8 become U+FFFD."""

    @abc.abstractmethod
    def id_to_piece(self, token_id: int) -> str:
        """A short name of an id, for display."""

    @abc.abstractmethod
    def vocabulary_files(self) -> dict[str, bytes]:
        """The files that decide what ids mean."""

    def files(self) -> dict[str, bytes]:
        """The files that make up the tokenizer; `tokenizer_from_files` is the inverse."""
        return {**self.vocabulary_files(), **self.chat_files}

    @property
    def special_tokens(self) -> dict[str, int]:
        """How special tokens are written in a chat template, and their ids. In text they are just text."""
        return {self.id_to_piece(special_id): special_id for special_id in self.special_ids.values()}

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of conversations, or None; see `data/tokenizers/chat.py`.

        Raises:
          InputError: `tokenizer_config.json` is no JSON object.
        """
        return _chat_template(self.chat_files)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies what ids mean: a hash of the files that decide it."""
        digest = hashlib.sha256()
        for name, content in sorted(self.vocabulary_files().items()):
            digest.update(f"{name}:{len(content)}:".encode() + content)
        return digest.hexdigest()[:16]

    def save(self, directory: pathlib.Path) -> None:
        """Writes the files into a directory (any path object that has mkdir and `/`, so also an epath)."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (directory / name).write_bytes(content)


class ByteTokenizer(Tokenizer):
    """The UTF-8 bytes themselves, after the four special ids."""

    _OFFSET = len(SPECIAL_NAMES)

    def __init__(self):
        super().__init__(self._OFFSET + 256, {name: i for i, name in enumerate(SPECIAL_NAMES)})

    def encode(self, text: str) -> list[int]:
        """See Tokenizer."""
        return [byte + self._OFFSET for byte in text.encode()]

    def decode(self, ids: Iterable[int]) -> str:
        """See Tokenizer."""
        return bytes(i - self._OFFSET for i in ids if self._OFFSET <= i < self.vocab_size).decode(errors="replace")

    def id_to_piece(self, token_id: int) -> str:
        """See Tokenizer."""
        if token_id < self._OFFSET:
            return f"<{SPECIAL_NAMES[token_id]}>"
        byte = token_id - self._OFFSET
        return chr(byte) if 0x20 <= byte < 0x7F else f"<0x{byte:02X}>"

    def vocabulary_files(self) -> dict[str, bytes]:
        """See Tokenizer."""
        return {_SPECIALS_FILE: _specials_file("bytes", self.special_ids)}


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, made lossless.

    Whatever the model says, text is not normalised, gets no dummy prefix and keeps its white space. SentencePiece
    cannot tell U+2581 from a space: that character is encoded as its three bytes. Special ids that the model does not
    have are added after its vocabulary.
    """

    def __init__(self, model: bytes, special_ids: Mapping[str, int] | None = None):
        """Loads a model.

        Args:
          model: a serialised ModelProto.
          special_ids: ids by name; those left out are looked up in the model.

        Raises:
          InputError: it is no SentencePiece model, or it has no byte fallback.
        """
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=model + _LOSSLESS_NORMALIZER)
            num_pieces = processor.get_piece_size()
            self._bytes_of_id = [_bytes_of_piece(processor, i) for i in range(num_pieces)]
            byte_ids = {processor.id_to_piece(i): i for i in range(num_pieces) if processor.is_byte(i)}
        except (RuntimeError, ValueError) as error:  # also pieces that are not UTF-8, or no bytes
            raise InputError("not a SentencePiece model") from error
        if not num_pieces:
            raise InputError("not a SentencePiece model: it has no pieces")
        self._model = model
        self._processor = processor
        if len(byte_ids) != 256:
            raise InputError("the SentencePiece model has no byte fallback, so it cannot hold every text")
        self._blank_ids = [byte_ids[f"<0x{byte:02X}>"] for byte in _BLANK.encode()]
        special_ids = dict(special_ids or _special_ids_of_model(processor))
        super().__init__(max(num_pieces, 1 + max(special_ids.values())), special_ids)
        for token_id in special_ids.values():
            if token_id < num_pieces:
                self._bytes_of_id[token_id] = b""

    @property
    def special_tokens(self) -> dict[str, int]:
        """See Tokenizer."""
        pieces = range(self._processor.get_piece_size())
        controls = {self._processor.id_to_piece(i): i for i in pieces if self._processor.is_control(i)}
        return {**controls, **super().special_tokens}

    def encode(self, text: str) -> list[int]:
        """See Tokenizer."""
        if _BLANK not in text:
            return self._processor.encode(text)
        ids = self._processor.encode(text.split(_BLANK))
        return [i for n, part in enumerate(ids) for i in (self._blank_ids + part if n else part)]

    def decode(self, ids: Iterable[int]) -> str:
        """See Tokenizer."""
        table = self._bytes_of_id
        return b"".join(table[i] for i in ids if 0 <= i < len(table)).decode(errors="replace")

    def id_to_piece(self, token_id: int) -> str:
        """See Tokenizer."""
        for name, special_id in self.special_ids.items():
            if token_id == special_id:
                return f"<{name}>"
        return self._processor.id_to_piece(token_id)

    def vocabulary_files(self) -> dict[str, bytes]:
        """See Tokenizer."""
        return {_SENTENCEPIECE_FILE: self._model, _SPECIALS_FILE: _specials_file("sentencepiece", self.special_ids)}


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """Trains a byte-pair SentencePiece model. The same texts give the same model, byte for byte.

    Args:
      texts: the training documents.
      vocab_size: ids to have, special ids and the 256 byte pieces included. A small corpus may have fewer.

    Raises:
      ConfigError: vocab_size does not leave room for special ids and bytes.
      InputError: there is no text.
    """
    if vocab_size < _MIN_TRAINED_VOCAB_SIZE:
        raise ConfigError(f"config.data.tokenizer_vocab_size = {vocab_size}: must be at least "
                          f"{_MIN_TRAINED_VOCAB_SIZE} (special ids and bytes)")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_chunks(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=0.9995,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=8 * _LONGEST_TRAINING_CHUNK,
            num_threads=2,
            bos_id=0, pad_id=1, eos_id=2, unk_id=3,
            control_symbols=["<mask>"],
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rpartition("] ")[2]  # without the place in its source
        raise InputError(f"SentencePiece could not be trained with {vocab_size} ids: {reason}") from error
    return SentencePieceTokenizer(model.getvalue(), {"bos": 0, "pad": 1, "eos": 2, "mask": 4})


def load_tokenizer(path: str | pathlib.Path) -> Tokenizer:
    """Loads what `save` wrote (a directory), a SentencePiece `.model` or a Hugging Face `tokenizer.json`.

    Raises:
      InputError: there is none, or it is broken; names the path.
    """
    path = pathlib.Path(path)
    try:
        if path.is_dir():
            return tokenizer_from_files({f.name: f.read_bytes() for f in sorted(path.iterdir()) if f.is_file()})
        files = {_SENTENCEPIECE_FILE if path.suffix == ".model" else _HUGGING_FACE_FILE: path.read_bytes()}
        beside = (path.parent / name for name in CHAT_FILES)
        files |= {file.name: file.read_bytes() for file in beside if file.is_file()}
        return tokenizer_from_files(files)
    except OSError as error:
        raise InputError(f"tokenizer {path}: {error.strerror}") from error
    except InputError as error:
        raise InputError(f"tokenizer {path}: {error}") from error


def tokenizer_from_files(files: Mapping[str, bytes]) -> Tokenizer:
    """The tokenizer that `files()` describes.

    Raises:
      InputError: the files are no tokenizer's.
    """
    chat_files = {name: files[name] for name in CHAT_FILES if name in files}
    _chat_template(chat_files)
    tokenizer = _vocabulary_from_files(files)
    tokenizer.chat_files = chat_files
    return tokenizer


def _vocabulary_from_files(files: Mapping[str, bytes]) -> Tokenizer:
    from illada_jax.data.tokenizers.huggingface import HuggingFaceTokenizer  # it subclasses Tokenizer

    special_ids = None
    if _SPECIALS_FILE in files:
        try:
            described = json.loads(files[_SPECIALS_FILE])
            special_ids = {name: int(described[name]) for name in SPECIAL_NAMES}
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise InputError(f"{_SPECIALS_FILE} does not name the ids {', '.join(SPECIAL_NAMES)}") from error
    if _SENTENCEPIECE_FILE in files:
        return SentencePieceTokenizer(files[_SENTENCEPIECE_FILE], special_ids)
    if _HUGGING_FACE_FILE in files:
        return HuggingFaceTokenizer(files[_HUGGING_FACE_FILE], files.get("tokenizer_config.json"), special_ids)
    if special_ids is not None and described.get("kind") == "bytes":
        return ByteTokenizer()
    raise InputError(f"no tokenizer among {sorted(files)}: expected {_SENTENCEPIECE_FILE}, {_HUGGING_FACE_FILE} or "
                     f"{_SPECIALS_FILE}")


def _chat_template(files: Mapping[str, bytes]) -> str | None:
    try:
        template = json.loads(files.get("tokenizer_config.json", b"{}")).get("chat_template")
        if "chat_template.jinja" in files:
            return files["chat_template.jinja"].decode()
        if isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{' or '.join(CHAT_FILES)}: no chat template can be read: {error}") from error
    if not isinstance(template, str | None):
        raise InputError("tokenizer_config.json: its chat_template is no text")
    return template


def _specials_file(kind: str, special_ids: Mapping[str, int]) -> bytes:
    return json.dumps({"kind": kind, **special_ids}, indent=1).encode()


def _bytes_of_piece(processor: sentencepiece.SentencePieceProcessor, token_id: int) -> bytes:
    piece = processor.id_to_piece(token_id)
    if processor.is_byte(token_id):
        return bytes([int(piece[3:-1], 16)])
    if processor.is_control(token_id) or processor.is_unknown(token_id):
        return b""
    return piece.replace(_BLANK, " ").encode()


def _special_ids_of_model(processor: sentencepiece.SentencePieceProcessor) -> dict[str, int]:
    """The special ids that a model declares; what it lacks is numbered after its vocabulary."""
    ids = {"bos": processor.bos_id(), "pad": processor.pad_id(), "eos": processor.eos_id(), "mask": -1}
    for i in range(processor.get_piece_size()):
        if processor.is_control(i) and _MASK_NAME.fullmatch(processor.id_to_piece(i)):
            ids["mask"] = i
    free = processor.get_piece_size()
    for name, token_id in ids.items():
        if token_id < 0:
            ids[name] = free
            free += 1
    return ids


def _training_chunks(texts: Iterable[str]) -> Iterator[str]:
    """Cuts texts after blank lines, or where a chunk gets long, since the trainer skips what is too long for it."""
    for text in texts:
        for piece in text.split(_BLANK):
            for paragraph in re.findall(r"(?s:.+?)(?:\n\n+|\Z)", piece):
                for start in range(0, len(paragraph), _LONGEST_TRAINING_CHUNK):
                    yield paragraph[start : start + _LONGEST_TRAINING_CHUNK]
