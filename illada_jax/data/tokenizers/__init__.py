"""Tokenizers: lossless, with the special ids that diffusion needs, and chat templates.

Begin with `tokenizer`, the interface; `loading` reads any kind of tokenizer, `chat` turns conversations into tokens.
"""

from illada_jax.data.tokenizers.bytes import ByteTokenizer
from illada_jax.data.tokenizers.loading import load_tokenizer, tokenizer_from_files
from illada_jax.data.tokenizers.sentencepiece import train_sentencepiece
from illada_jax.data.tokenizers.tokenizer import CHAT_FILES, SPECIAL_NAMES, Tokenizer

__all__ = ["CHAT_FILES", "SPECIAL_NAMES", "ByteTokenizer", "Tokenizer", "load_tokenizer", "tokenizer_from_files",
           "train_sentencepiece"]
