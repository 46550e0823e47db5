"""A test of tokenizers for text that they cannot hold."""

import itertools

from illada_jax.data.tokenizers.tokenizer import Tokenizer
from illada_jax.errors import InputError

_ODD = ("A b\n\n  c\t\td \r\n é e\u0301 ﬁ 漢字 🙂\u200d \x00\x7f ½ ...  ' n't <s> </s> <mask> [MASK] <|endoftext|> "
        "<0x41> \u2581 \u2581\u2581x \ufffd \ufeff \u0085\u2028 \n")
_EDGES = ("a", " ", "  ", "\n", "\t", " a", "a ", "  a  ", "\na\n", "\u2581", "\u2581a ")
_MANY_BLOCKS = "".join(chr(code) for code in range(1, 0x110000, 977) if not 0xD800 <= code < 0xE000)
# A word, white space and a text that are longer than what tokenizers are found to cut off at.
_LONG = ("aB3" * 300, " \n" * 300, "The quick brown fox jumps over the lazy dog. " * 300)


def lost_text(tokenizer: Tokenizer) -> str:
    """The loss of a text through the tokenizer, in words for messages; empty if everything survives.

    Odd and long texts are tried, and the names of special tokens as text, as a whole and as the continuation of a text.
    """
    names = " ".join(f"{name}  x{name}y" for name in tokenizer.special_tokens)
    for text in (*_EDGES, _ODD, names, _MANY_BLOCKS, *_LONG):
        try:
            backs = (tokenizer.decode(tokenizer.encode(text)),
                     tokenizer.decode(tokenizer.encode_behind(text), after=tokenizer.encode("a")))
        except InputError as error:
            return str(error)
        for back in backs:
            if back != text:
                at = next(i for i, (a, b) in enumerate(itertools.zip_longest(text, back)) if a != b)
                return f"{text[at : at + 8]!r} comes back as {back[at : at + 8]!r}"
    return ""


def check_lossless(tokenizer: Tokenizer, name: str) -> None:
    """Raises InputError if the tokenizer cannot hold every text, so that nothing can be prepared or trained with it."""
    lost = lost_text(tokenizer)
    if lost:
        raise InputError(f"{name}: not lossless: {lost}; use a byte-level tokenizer, or one with byte fallback")
