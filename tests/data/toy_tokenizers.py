"""Small tokenizers of the kinds that public checkpoints carry, as the `tokenizers` library has them."""

import functools
import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from illada_jax.data.tokenizers import ByteTokenizer, Tokenizer, tokenizer_from_files, train_sentencepiece

SPECIALS = ("<unk>", "<s>", "</s>", "<mask>", "<|turn|>", "<|end|>")
BLANK = "\u2581"
_WORDS = ("the", "then", "cat", "is", "a", "user", "assistant")


def llama(scheme: str = "", added: tuple[str, ...] = (), **flags) -> tokenizers.Tokenizer:
    """BPE with byte fallback; the blank in front of a text comes from Prepend or, with a scheme, from Metaspace."""
    pieces = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += sorted({BLANK, *"<>|.", *"".join(_WORDS)})
    merges = []
    for word in (*_WORDS, *(BLANK + word for word in _WORDS), BLANK * 2):
        for end in range(2, len(word) + 1):
            pair = word[: end - 1], word[end - 1]
            if pair not in merges:
                merges.append(pair)
    pieces += dict.fromkeys(map("".join, merges))
    tokenizer = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, merges,
                                                unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in added])
    return _with_blank(tokenizer, scheme, flags)


def unigram(scheme: str = "first", **flags) -> tokenizers.Tokenizer:
    """Unigram with byte fallback, as converted SentencePiece models."""
    pieces = [(piece, 0.0) for piece in SPECIALS] + [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    pieces += [(piece, -5.0) for piece in sorted({BLANK, *"<>|0x41.", *"".join(_WORDS)})]
    pieces += [(start + word, -6.0) for word in _WORDS for start in ("", BLANK) if len(start + word) > 1]
    return _with_blank(tokenizers.Tokenizer(models.Unigram(pieces, 0, byte_fallback=True)), scheme, flags)


def _with_blank(tokenizer, scheme, flags):
    if scheme:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(BLANK, scheme, split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)])
    tokenizer.decoder = decoders.Sequence([decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    return _with_specials(tokenizer, flags)


def _with_specials(tokenizer, flags):
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True, **flags)
                                  for token in SPECIALS])
    return tokenizer


def byte_level(add_prefix_space: bool = False, **flags) -> tokenizers.Tokenizer:
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("æ", "¼"), ("Ġ", "Ġ")]
    vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(merges)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_specials(tokenizer, flags)


def _added(tokenizer, *tokens):
    tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False, lstrip=True) for token in tokens])
    return tokenizer


def word_piece() -> tokenizers.Tokenizer:
    pieces = ["[UNK]", "[MASK]", "[SEP]", *_WORDS, "##s", "."]
    tokenizer = tokenizers.Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]", "[MASK]", "[SEP]"])
    return tokenizer


HUGGING_FACE = {
    "byte-level": byte_level, "byte-level, blank first": functools.partial(byte_level, add_prefix_space=True),
    "Llama, Prepend": llama, **{f"Llama, Metaspace {scheme}": functools.partial(llama, scheme)
                                for scheme in ("first", "always", "never")},
    "Llama, added blanks": functools.partial(llama, "never", (BLANK * 2, "<think>", "漢 x")),
    "byte-level, added": lambda: _added(byte_level(), "é x", "<think>"), "Unigram": unigram,
}
KINDS = ("bytes", "SentencePiece", *HUGGING_FACE)


def files_of(tokenizer: tokenizers.Tokenizer, **changes) -> dict[str, bytes]:
    """The files of a tokenizer; `changes` are of its description."""
    return {"tokenizer.json": json.dumps({**json.loads(tokenizer.to_str()), **changes}).encode()}


@functools.cache
def ours(kind: str) -> Tokenizer:
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "SentencePiece":
        return train_sentencepiece(["the cat is a cat", "漢字 user assistant", "  then  the"] * 3, 320)
    return tokenizer_from_files(files_of(HUGGING_FACE[kind]()))
