"""Tokenizers: lossless, with the special ids that diffusion needs, and chat templates.

Begin with `tokenizer`, the interface; `loading` reads any kind of tokenizer, `chat` turns conversations into tokens.
"""

from illada_jax.data.tokenizers.bytes import ByteTokenizer
from illada_jax.data.tokenizers.loading import TOKENIZER_FILES, load_tokenizer, tokenizer_from_files
from illada_jax.data.tokenizers.lossless import check_lossless, lost_text
from illada_jax.data.tokenizers.sentencepiece import train_sentencepiece
from illada_jax.data.tokenizers.tokenizer import SPECIAL_NAMES, Tokenizer

__all__ = ["SPECIAL_NAMES", "TOKENIZER_FILES", "ByteTokenizer", "Tokenizer", "check_lossless", "load_tokenizer",
           "lost_text", "tokenizer_from_files", "train_sentencepiece"]
