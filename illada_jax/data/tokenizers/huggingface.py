"""Hugging Face tokenizers (`tokenizer.json`)."""
# ruff: noqa: D102

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

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


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, run by the `tokenizers` library.

    Unicode normalisation is removed, so that text survives unchanged. Special ids come from `special_ids`, else from
    `tokenizer_config.json`, else from the names of the added tokens; missing ones are numbered after the vocabulary.
    Special tokens are never recognised in text.

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
        description["normalizer"] = _without_unicode_normalizers(description.get("normalizer"))
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(description))
        self._tokenizer.encode_special_tokens = True
        self._special_tokens = {token["content"]: token["id"] for token in added if token["special"]}
        self._special_set = frozenset(found.values()) | set(self._special_tokens.values())
        self._json = tokenizer_json

    def encode(self, text: str) -> list[int]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids = encoding.ids
        if self._special_set.isdisjoint(ids):
            return ids
        # A model whose ordinary vocabulary holds a special piece can still match it: cut the text inside the match.
        token_id, (start, stop) = next(pair for pair in zip(ids, encoding.offsets, strict=True)
                                       if pair[0] in self._special_set)
        if stop - start < 2:
            raise InputError(f"the tokenizer encodes the text {text[start:stop]!r} as the special token "
                             f"{self.id_to_piece(token_id)!r}, so it cannot encode every text")
        return self.encode(text[: start + 1]) + self.encode(text[start + 1 :])

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([i for i in ids if i not in self._special_set], skip_special_tokens=False)

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


def _without_unicode_normalizers(normalizer: dict[str, Any] | None) -> dict[str, Any] | None:
    if normalizer is None or normalizer["type"] in _UNICODE_NORMALIZERS:
        return None
    if normalizer["type"] == "Sequence":
        others = [n for n in map(_without_unicode_normalizers, normalizer["normalizers"]) if n is not None]
        return {**normalizer, "normalizers": others} if others else None
    return normalizer
