"""Text survives tokenizers of every kind: whole, cut anywhere, behind other text, in chats, in any portions."""

import functools
import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from illada_jax.data.tokenizers import tokenizer_from_files
from tests.data.toy_tokenizers import BLANK, HUGGING_FACE, KINDS, SPECIALS, byte_level, files_of, llama, ours, unigram

# Words of the vocabularies, white space, parts of pieces and special tokens, and any character.
SNIPPETS = st.sampled_from(["the", "then", " the", "cat", " ", "  ", "\n", "\t", ".", BLANK, "\ufffd", "\x00", "漢",
                            "漢字", "🙂", "é", "e\u0301", "<0x41>", "<0x", "41>", "<|", "<think>", "漢 x", "é x",
                            *SPECIALS])
TEXTS = st.lists(SNIPPETS | st.characters(exclude_categories=["Cs"]), max_size=12).map("".join)
PLAIN = st.lists(st.sampled_from(["the", "then", "cat", " ", "  ", "\n", "\xa0", "\x1c", ".", "漢", "🙂", "a"]),
                 min_size=1, max_size=6).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
def test_text_survives_whole_and_cut_anywhere(kind, text):
    """The law of continuations: decode(prompt) + continuation == decode(all), or else the bytes agree."""
    tokenizer = ours(kind)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert set(ids).isdisjoint(tokenizer.special_tokens.values())
    for cut in range(len(ids) + 1):
        prompt, rest = ids[:cut], ids[cut:]
        whole_characters = tokenizer.decode(prompt, final=False)
        # A character that the cut divides belongs to the continuation.
        assert whole_characters + tokenizer.decode(rest, after=prompt) == text
        assert tokenizer.decode(prompt).removeprefix(whole_characters) in ("", "\ufffd")
        assert tokenizer.to_bytes(prompt) + tokenizer.to_bytes(rest) == tokenizer.to_bytes(ids)


@pytest.mark.parametrize("kind", KINDS)
@given(before=TEXTS, text=TEXTS)
def test_a_continuation_is_encoded_as_it_stands(kind, before, text):
    tokenizer = ours(kind)
    opening = tokenizer.encode("x" + before)
    assert tokenizer.decode(opening + tokenizer.encode_behind(text)) == "x" + before + text


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_any_ids_decode_alike_in_any_portions(kind, data):
    """Also ids that are no text, such as parts of characters and special tokens."""
    tokenizer = ours(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(ids)))) | {0, len(ids)})
    text = tokenizer.decode(ids)
    so_far = [tokenizer.decode(ids[:cut], final=False) for cut in cuts]
    portions = [tokenizer.decode(ids[a:b], after=ids[:a], final=False) for a, b in itertools.pairwise(cuts)]
    assert "".join(portions) == so_far[-1] and all(text.startswith(shorter) for shorter in so_far)
    assert not text[len(so_far[-1]) :].strip("\ufffd")


@pytest.mark.parametrize("kind", HUGGING_FACE)
@given(text=TEXTS)
def test_ids_and_texts_are_those_of_the_library(kind, text):
    """Where the library is lossless; there `Strip` drops the blank of a text, and U+2581 becomes a blank."""
    library = HUGGING_FACE[kind]()
    library.encode_special_tokens = True
    theirs = library.encode(text, add_special_tokens=False).ids
    assume(library.decode(theirs).removeprefix(" ") == text and not text.startswith(" "))
    assert ours(kind).encode(text) == theirs and ours(kind).decode(theirs) == text


CHATS = {
    **HUGGING_FACE,
    **{f"Llama, {scheme or 'Prepend'}, {flag}": functools.partial(llama, scheme, **{flag: True})
       for scheme in ("", "first", "always") for flag in ("lstrip", "rstrip")},
    **{f"Llama, {scheme or 'Prepend'}, added": functools.partial(llama, scheme, ("<think>",))
       for scheme in ("", "first", "always")},
    "byte-level, lstrip, rstrip": functools.partial(byte_level, lstrip=True, rstrip=True),
    "Unigram, always": functools.partial(unigram, "always"),
}


@pytest.mark.parametrize("kind", CHATS)
@given(parts=st.lists(PLAIN | st.sampled_from([*SPECIALS, "<think>"]), max_size=8))
def test_special_tokens_between_texts_as_in_the_library(kind, parts):
    library, tokenizer = chat_pair(kind)
    special = tokenizer.special_tokens
    merged = [text for is_special, group in itertools.groupby(parts, special.__contains__)
              for text in (group if is_special else ["".join(group)])]
    want = library.encode("".join(parts), add_special_tokens=False).ids
    assert tokenizer.encode_parts([special.get(part, part) for part in merged]) == want


@functools.cache
def chat_pair(kind):
    library = CHATS[kind]()
    return library, tokenizer_from_files(files_of(library))
