"""A tokenizer whose tokens are UTF-8 bytes."""
# ruff: noqa: D102

from illada_jax.data.tokenizers.tokenizer import SPECIAL_NAMES, Tokenizer


class ByteTokenizer(Tokenizer):
    """The 256 byte values, numbered after the four special ids."""

    _OFFSET = len(SPECIAL_NAMES)
    _bytes_of_id = (*[b""] * _OFFSET, *(bytes([byte]) for byte in range(256)))

    def __init__(self):
        super().__init__(self._OFFSET + 256, {name: i for i, name in enumerate(SPECIAL_NAMES)})

    def encode(self, text: str) -> list[int]:
        return [byte + self._OFFSET for byte in text.encode()]

    def id_to_piece(self, token_id: int) -> str:
        if token_id < self._OFFSET:
            return super().id_to_piece(token_id)
        byte = token_id - self._OFFSET
        return chr(byte) if 0x20 <= byte < 0x7F else f"<0x{byte:02X}>"

    def vocabulary_files(self) -> dict[str, bytes]:
        return self._special_ids_file("bytes")
