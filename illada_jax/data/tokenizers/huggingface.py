"""Hugging Face tokenizers (`tokenizer.json`)."""
# ruff: noqa: D102

import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import tokenizers

from illada_jax.data.tokenizers.tokenizer import MAX_VOCAB_SIZE, Tokenizer
from illada_jax.errors import InputError
from illada_jax.files import parse_json

HUGGING_FACE_FILE = "tokenizer.json"
# Names of special tokens without their brackets, the preferred one first.
_NAMES = {
    "mask": ("mask", "mdm_mask"),
    "eos": ("/s", "eos", "endoftext", "end_of_text", "sep"),
    "bos": ("s", "bos", "startoftext", "begin_of_text", "cls"),
    "pad": ("pad", "padding"),
}
_UNICODE_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD")
_BLANK = "\u2581"  # a blank in the pieces of tokenizers that follow SentencePiece
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
# What the library strips beside added tokens; Python's own set has four control characters more.
_WHITE_SPACE = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and c not in "\x1c\x1d\x1e\x1f")


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, run by the `tokenizers` library and made lossless where that is possible.

    Settings of a run that were saved with it (truncation, padding, dropout) and Unicode normalisation are removed. A
    blank that is put in front of a text (by Prepend, Metaspace or ByteLevel) is put there by this class, even if the
    text begins with one, and never elsewhere; `encode_parts` puts it where the library does. U+2581, which stands for a
    blank in many vocabularies, is encoded as its three bytes.

    Special ids come from `special_ids`, else from `tokenizer_config.json`, else from the names of the added tokens;
    missing ones are numbered after the vocabulary. Special tokens are never recognised in text.

    Attributes:
      named_ids: the special ids that the files declare, by name.
    """

    def __init__(self, tokenizer_json: bytes, tokenizer_config: bytes | None = None,
                 special_ids: Mapping[str, int] | None = None):
        """Loads a tokenizer from the contents of `tokenizer.json` and `tokenizer_config.json`.

        Raises:
          InputError: the file is not a tokenizer, or an id is too large.
        """
        try:
            description = parse_json(tokenizer_json, HUGGING_FACE_FILE)
            names = parse_json(tokenizer_config or b"{}", "tokenizer_config.json")
            added = description.get("added_tokens") or []
            table = tokenizers.Tokenizer.from_str(json.dumps(description))
        except Exception as error:  # the library raises a bare Exception for any malformed content
            raise InputError(f"not a tokenizer.json: {str(error).splitlines()[0]}") from error
        used = set(table.get_vocab(with_added_tokens=True).values())
        if max(used, default=0) >= MAX_VOCAB_SIZE:
            raise InputError(f"not a tokenizer.json: the id {max(used)} is not less than {MAX_VOCAB_SIZE}")
        self.named_ids = _find_special_ids(table, added, names)
        found = dict(self.named_ids)
        for name in _NAMES:
            found.setdefault(name, 1 + max(used | set(found.values())))
        found |= special_ids or {}
        super().__init__(1 + max(used | set(found.values())), found)
        self.unused_ids = tuple(sorted(set(range(self.vocab_size)) - used - set(found.values())))
        for token in added:
            # The library matches added tokens in text unless they are marked as special.
            token["special"] = token["special"] or token["id"] in found.values()
        self._added = {token["id"]: token for token in added}
        self._special_tokens = {token["content"]: token["id"] for token in added if token["special"]}
        self._special_set = frozenset(found.values()) | set(self._special_tokens.values())
        self._json = tokenizer_json
        description, self._prefix = _lossless(description)
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(description))
        self._tokenizer.encode_special_tokens = True
        decoders = {step.get("type") for step in _steps(description.get("decoder"), "decoders")}
        self.opens_with_blank = bool(self._prefix.text) or not decoders or "WordPiece" in decoders
        self._byte_fallback, self._byte_level = "ByteFallback" in decoders, "ByteLevel" in decoders
        self._blank_ids = [table.token_to_id(f"<0x{byte:02X}>") for byte in _BLANK.encode()]
        # Odd parts are U+2581 or, in front of `0x41>`, empty: text that looks like a byte piece is no byte.
        takes_literally = table.token_to_id("<0x41>") in self._tokenizer.encode("<0x41>").ids
        literal = "|(?<=<)(?=0x)" if self._byte_fallback and takes_literally else ""
        blank = _BLANK if self._byte_fallback and None not in self._blank_ids else "(?!)"
        self._cut = re.compile(f"({blank}){literal}")
        # Added tokens that are no special ones, as the library finds them in text.
        plain = [token["content"] for token in added
                 if not (token["special"] or token.get("normalized") or token.get("single_word"))]
        self._plain_added = re.compile("|".join(map(re.escape, sorted(plain, key=len, reverse=True))) or "(?!)")

    def encode(self, text: str) -> list[int]:
        return self._encode(text, self._prefix.text) if text else []

    def encode_behind(self, text: str) -> list[int]:
        return self._encode(text)

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        split = [piece for part in parts for piece in ([part] if isinstance(part, int) else self._split_added(part))]
        ids: list[int] = []
        for number, part in enumerate(split):
            if isinstance(part, int):
                ids.append(part)
                continue
            before, after = ({} if n in (-1, len(split)) else self._added.get(split[n], {})
                             for n in (number - 1, number + 1))
            part = part.lstrip(_WHITE_SPACE) if before.get("rstrip") else part
            part = part.rstrip(_WHITE_SPACE) if after.get("lstrip") else part
            ids += self._encode(part, self._prefix.of_part(part, number == 0)) if part else []
        return ids

    def _split_added(self, text: str) -> list[str | int]:
        """A text, cut at added tokens that are no special ones; those as their ids."""
        parts: list[str | int] = []
        end = 0
        for match in self._plain_added.finditer(text):
            parts += [text[end : match.start()], self._tokenizer.token_to_id(match.group())]
            end = match.end()
        return [part for part in (*parts, text[end:]) if part != ""]

    def _encode(self, text: str, prefix: str = "") -> list[int]:
        first, *others = self._cut.split(text)
        ids = self._ids(prefix + first)
        for separator, part in zip(others[::2], others[1::2], strict=True):
            ids += (self._blank_ids if separator else []) + self._ids(part)
        return ids

    def _ids(self, text: str) -> list[int]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        if self._special_set.isdisjoint(encoding.ids):
            return encoding.ids
        # A model whose ordinary vocabulary holds a special piece can still match it: cut the text inside the matches.
        matches = [(token_id, span) for token_id, span in zip(encoding.ids, encoding.offsets, strict=True)
                   if token_id in self._special_set]
        for token_id, (start, stop) in matches:
            if stop - start < 2:
                raise InputError(f"the tokenizer encodes the text {text[start:stop]!r} as the special token "
                                 f"{self.id_to_piece(token_id)!r}, so it cannot encode every text")
        cuts = [0, *(start + 1 for _, (start, _) in matches), len(text)]
        return [id_ for start, stop in itertools.pairwise(cuts) for id_ in self._ids(text[start:stop])]

    @functools.cached_property
    def _bytes_of_id(self) -> list[bytes]:
        pieces = [self._tokenizer.id_to_token(i) or "" for i in range(self.vocab_size)]
        vocab = self._tokenizer.get_vocab(with_added_tokens=False)
        if self._byte_level:
            table = [_bytes_of_byte_level(piece) for piece in pieces]
        else:
            table = [text.encode() for text in self._texts_behind_another(pieces)]
        for token_id, piece in enumerate(pieces):
            if token_id in self._special_set:
                table[token_id] = b""
            elif token_id in self._added and piece not in vocab:
                table[token_id] = piece.encode()  # found in text as it is
            elif self._byte_fallback and (byte := _BYTE_PIECE.fullmatch(piece)):
                table[token_id] = bytes.fromhex(byte[1])
        return table

    def _texts_behind_another(self, pieces: list[str]) -> list[str]:
        """The text of each id as the library decodes it behind another token."""
        decode_batch = functools.partial(self._tokenizer.decode_batch, skip_special_tokens=False)
        words = (i for i, piece in enumerate(pieces)
                 if piece.isascii() and piece.isalpha() and i not in self._special_set)
        anchor = list(itertools.islice(words, 1))
        before = decode_batch([anchor])[0]
        return [text.removeprefix(before) for text in decode_batch([[*anchor, i] for i in range(len(pieces))])]

    def id_to_piece(self, token_id: int) -> str:
        piece = self._tokenizer.id_to_token(token_id)
        return super().id_to_piece(token_id) if piece is None else piece

    @property
    def special_tokens(self) -> dict[str, int]:
        return {**super().special_tokens, **self._special_tokens}

    def vocabulary_files(self) -> dict[str, bytes]:
        return {HUGGING_FACE_FILE: self._json, **self._special_ids_file("huggingface")}


def _find_special_ids(table: tokenizers.Tokenizer, added: list[dict[str, Any]],
                      names: Mapping[str, Any]) -> dict[str, int]:
    found = {}
    id_by_name = {re.sub(r"[<>\[\]|]", "", token["content"]).lower(): token["id"] for token in reversed(added)}
    for name, candidates in _NAMES.items():
        token = names.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        token_id = table.token_to_id(token) if token and isinstance(token, str) else None
        ids = [found_id for found_id in (token_id, *map(id_by_name.get, candidates)) if found_id is not None]
        if ids:
            found[name] = ids[0]
    return found


class _Prefix(NamedTuple):
    """The blank that a tokenizer puts in front of a text.

    Attributes:
      text: a blank, or nothing.
      behind_special: the library puts it behind special tokens, too.
      doubles: the library puts it in front of a blank, too.
    """

    text: str = ""
    behind_special: bool = False
    doubles: bool = False

    def of_part(self, part: str, is_first: bool) -> str:
        """The blank that the library puts in front of a part of a text with special tokens."""
        return self.text if (is_first or self.behind_special) and (self.doubles or part[0] != " ") else ""


def _lossless(description: dict[str, Any]) -> tuple[dict[str, Any], _Prefix]:
    """A tokenizer.json without what cuts, pads, draws or changes text, and the blank that it put in front of a text."""
    prefix = _Prefix()
    normalizers, pre_tokenizers = [], _steps(description.get("pre_tokenizer"), "pretokenizers")
    for step in _steps(description.get("normalizer"), "normalizers"):
        if step.get("type") == "Prepend" and step["prepend"] in (_BLANK, " "):
            prefix = _Prefix(" ", behind_special=True, doubles=True)
        elif step.get("type") not in _UNICODE_NORMALIZERS:
            normalizers.append(step)
    if pre_tokenizers:  # only the first one sees the start of a text
        first = pre_tokenizers[0]
        has_blank = first.get("add_prefix_space", True)  # of Metaspace in older files only
        if first.get("type") == "Metaspace":
            scheme = first.get("prepend_scheme", "always" if has_blank else "never")
            prefix = prefix if scheme == "never" else _Prefix(" ", behind_special=scheme == "always")
            first = {**first, "prepend_scheme": "never", "add_prefix_space": False}
        elif first.get("type") == "ByteLevel" and has_blank:
            prefix, first = _Prefix(" ", behind_special=True), {**first, "add_prefix_space": False}
        pre_tokenizers[0] = first
    added, model = description.get("added_tokens") or [], description["model"]
    return {
        **description, "truncation": None, "padding": None,
        "added_tokens": [{**token, "lstrip": False, "rstrip": False} for token in added],
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers} if pre_tokenizers else None,
        "model": {**model, "dropout": None} if "dropout" in model else model,
    }, prefix


def _steps(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, which may be nested sequences."""
    return [] if step is None else [s for each in step[key] for s in _steps(each, key)] if key in step else [step]


@functools.cache
def _byte_level_alphabet() -> dict[str, int]:
    """The byte for which each character of a byte-level vocabulary stands, as in GPT-2."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return {chr(byte if byte in visible else next(others)): byte for byte in range(256)}


def _bytes_of_byte_level(piece: str) -> bytes:
    alphabet = _byte_level_alphabet()
    try:
        return bytes(alphabet[character] for character in piece)
    except KeyError:
        return piece.encode()
