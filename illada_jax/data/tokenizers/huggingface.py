"""Hugging Face tokenizers (`tokenizer.json`)."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers

from illada_jax.data.tokenizers.tokenizer import MAX_VOCAB_SIZE, Tokenizer
from illada_jax.errors import InputError

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
        """Loads a tokenizer.

        Args:
          tokenizer_json: content of `tokenizer.json`.
          tokenizer_config: content of `tokenizer_config.json`, which may name bos, eos, pad and mask.
          special_ids: ids by name, which override those of the files.

        Raises:
          InputError: the file is not a tokenizer, or an id is too large.
        """
        try:
            description = json.loads(tokenizer_json)
            names = json.loads(tokenizer_config or b"{}")
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
        if max(found.values()) >= MAX_VOCAB_SIZE:
            raise InputError(f"special ids {found}: must be less than {MAX_VOCAB_SIZE}")
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
        """See Tokenizer."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids = encoding.ids
        if self._special_set.isdisjoint(ids):
            return ids
        # A model whose ordinary vocabulary holds a special piece can still match it: cut the text inside the match.
        first = next(n for n, i in enumerate(ids) if i in self._special_set)
        start, stop = encoding.offsets[first]
        if stop - start < 2:
            raise InputError(f"the tokenizer encodes the text {text[start:stop]!r} as the special token "
                             f"{self.id_to_piece(ids[first])!r}, so it cannot encode every text")
        return self.encode(text[: start + 1]) + self.encode(text[start + 1 :])

    def decode(self, ids: Iterable[int]) -> str:
        """See Tokenizer."""
        return self._tokenizer.decode([i for i in ids if i not in self._special_set], skip_special_tokens=False)

    def id_to_piece(self, token_id: int) -> str:
        """See Tokenizer."""
        piece = self._tokenizer.id_to_token(token_id)
        if piece is None:
            names = [name for name, special_id in self.special_ids.items() if special_id == token_id]
            return f"<{names[0] if names else token_id}>"
        return piece

    @property
    def special_tokens(self) -> dict[str, int]:
        """See Tokenizer."""
        return {**super().special_tokens, **self._special_tokens}

    def vocabulary_files(self) -> dict[str, bytes]:
        """See Tokenizer."""
        return {HUGGING_FACE_FILE: self._json, **self._special_ids_file("huggingface")}


def _find_special_ids(table: tokenizers.Tokenizer, added: list[dict[str, Any]],
                      names: Mapping[str, Any]) -> dict[str, int]:
    found = {}
    id_by_name = {re.sub(r"[<>\[\]|]", "", token["content"]).lower(): token["id"] for token in reversed(added)}
    for name, candidates in _NAMES.items():
        token = names.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        token_id = table.token_to_id(token) if token and isinstance(token, str) else None
        if token_id is None:
            token_id = next((id_by_name[c] for c in candidates if c in id_by_name), None)
        if token_id is not None:
            found[name] = token_id
    return found


def _without_unicode_normalizers(normalizer: dict[str, Any] | None) -> dict[str, Any] | None:
    if normalizer is None or normalizer["type"] in _UNICODE_NORMALIZERS:
        return None
    if normalizer["type"] == "Sequence":
        others = [n for n in map(_without_unicode_normalizers, normalizer["normalizers"]) if n is not None]
        return {**normalizer, "normalizers": others} if others else None
    return normalizer
