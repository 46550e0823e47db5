"""Loading of tokenizers from their files."""

import pathlib
from collections.abc import Mapping

from illada_jax.data.tokenizers.bytes import ByteTokenizer
from illada_jax.data.tokenizers.huggingface import HUGGING_FACE_FILE, HuggingFaceTokenizer
from illada_jax.data.tokenizers.sentencepiece import SENTENCEPIECE_FILE, SentencePieceTokenizer
from illada_jax.data.tokenizers.tokenizer import (
    CHAT_FILES,
    SPECIAL_IDS_FILE,
    SPECIAL_NAMES,
    Tokenizer,
    read_chat_templates,
)
from illada_jax.errors import InputError
from illada_jax.files import TOKENIZER_BYTES, parse_json, read_file

# The first one wins. `tokenizer.model` is the name of a SentencePiece model in Hugging Face directories.
_MODEL_FILES = (SENTENCEPIECE_FILE, HUGGING_FACE_FILE, "tokenizer.model")
TOKENIZER_FILES = (*_MODEL_FILES, SPECIAL_IDS_FILE, *CHAT_FILES)


def load_tokenizer(path: str | pathlib.Path) -> Tokenizer:
    """Loads a directory written by `Tokenizer.save`, a SentencePiece `.model` or a Hugging Face `tokenizer.json`.

    Raises InputError if there is no tokenizer or it is broken.
    """
    path = pathlib.Path(path)
    try:
        if path.is_dir():
            paths = {name: path / name for name in TOKENIZER_FILES if (path / name).is_file()}
        else:
            paths = {name: path.parent / name for name in CHAT_FILES if (path.parent / name).is_file()}
            paths[SENTENCEPIECE_FILE if path.suffix == ".model" else HUGGING_FACE_FILE] = path
        return tokenizer_from_files({name: read_file(file, TOKENIZER_BYTES) for name, file in paths.items()})
    except OSError as error:
        raise InputError(f"tokenizer {path}: {error.strerror}") from error
    except InputError as error:
        raise InputError(f"tokenizer {path}: {error}") from error


def tokenizer_from_files(files: Mapping[str, bytes]) -> Tokenizer:
    """The tokenizer with these contents by file name, the inverse of `Tokenizer.files`; other files are ignored.

    Raises InputError if no tokenizer is among the files or it is broken.
    """
    chat_files = {name: files[name] for name in CHAT_FILES if name in files}
    read_chat_templates(chat_files)  # raises if it cannot be parsed
    tokenizer = _vocabulary_from_files(files)
    tokenizer.chat_files = chat_files
    return tokenizer


def _vocabulary_from_files(files: Mapping[str, bytes]) -> Tokenizer:
    special_ids = None
    if SPECIAL_IDS_FILE in files:
        try:
            described = parse_json(files[SPECIAL_IDS_FILE], SPECIAL_IDS_FILE)
            special_ids = {name: int(described[name]) for name in SPECIAL_NAMES}
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise InputError(f"{SPECIAL_IDS_FILE}: must give integer ids for {', '.join(SPECIAL_NAMES)}") from error
    found = next((name for name in _MODEL_FILES if name in files), "")
    if found == HUGGING_FACE_FILE:
        return HuggingFaceTokenizer(files[found], files.get("tokenizer_config.json"), special_ids)
    if found:
        return SentencePieceTokenizer(files[found], special_ids)
    if special_ids is not None and described.get("kind") == "bytes":
        return ByteTokenizer()
    raise InputError(f"no tokenizer among {sorted(files)}: expected {', '.join(_MODEL_FILES)} or {SPECIAL_IDS_FILE}")
