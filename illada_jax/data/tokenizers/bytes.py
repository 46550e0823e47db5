"""A tokenizer whose tokens are UTF-8 bytes."""
# ruff: noqa: D102

from collections.abc import Iterable

from illada_jax.data.tokenizers.tokenizer import SPECIAL_NAMES, Tokenizer


class ByteTokenizer(Tokenizer):
    """The 256 byte values, numbered after the four special ids."""

    _OFFSET = len(SPECIAL_NAMES)

    def __init__(self):
        super().__init__(self._OFFSET + 256, {name: i for i, name in enumerate(SPECIAL_NAMES)})

    def encode(self, text: str) -> list[int]:
        return [byte + self._OFFSET for byte in text.encode()]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i - self._OFFSET for i in ids if self._OFFSET <= i < self.vocab_size).decode(errors="replace")

    def id_to_piece(self, token_id: int) -> str:
        if token_id < self._OFFSET:
            return super().id_to_piece(token_id)
        byte = token_id - self._OFFSET
        return chr(byte) if 0x20 <= byte < 0x7F else f"<0x{byte:02X}>"

    def vocabulary_files(self) -> dict[str, bytes]:
        return self._special_ids_file("bytes")
