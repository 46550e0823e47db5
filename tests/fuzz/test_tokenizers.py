"""Text survives tokenizers of every kind: whole, cut anywhere, behind a prompt, in chats and block by block."""

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from illada_jax.data.tokenizers import lost_text, tokenizer_from_files
from tests.data.toy_tokenizers import BLANK, HUGGING_FACE, KINDS, SPECIALS, byte_level, files_of, llama, ours, unigram

# Words of the vocabularies, white space, parts of pieces and special tokens, and any character.
SNIPPETS = st.sampled_from(["the", "then", " the", "cat", " ", "  ", "\n", "\t", ".", BLANK, "\ufffd", "\x00", "漢", "漢字",
                            "🙂", "é", "e\u0301", "<0x41>", "<0x", "41>", "<|", *SPECIALS])
TEXTS = st.lists(SNIPPETS | st.characters(exclude_categories=["Cs"]), max_size=12).map("".join)


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
        whole = tokenizer.decode(prompt, final=False)
        assert whole + tokenizer.decode(rest, after=prompt) == text  # an incomplete character belongs to the rest
        if text.startswith(before := tokenizer.decode(prompt)):
            assert before == whole or before[len(whole) :] == "\ufffd"
        assert tokenizer.to_bytes(prompt) + tokenizer.to_bytes(rest) == tokenizer.to_bytes(ids)


@pytest.mark.parametrize("kind", KINDS)
@given(before=TEXTS, text=TEXTS)
def test_fragments_are_encoded_as_they_stand(kind, before, text):
    """A fragment gets no blank: the text of all ids is the text of its pieces, one after the other."""
    tokenizer = ours(kind)
    opening = tokenizer.encode("x" + before)
    assert tokenizer.decode(opening + tokenizer.encode_behind(text)) == "x" + before + text


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_any_ids_decode_alike_in_any_portions(kind, data):
    """Streamed equals unstreamed, for ids that are no text too, such as parts of characters and special tokens."""
    tokenizer = ours(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(ids)))) | {0, len(ids)})
    texts = [tokenizer.decode(ids[:cut], final=False) for cut in cuts]
    portions = [tokenizer.decode(ids[a:b], after=ids[:a], final=False) for a, b in zip(cuts, cuts[1:], strict=False)]
    text = tokenizer.decode(ids)
    assert text == tokenizer.to_bytes(ids).decode(errors="replace").removeprefix(
        " " if tokenizer.decode([*ids[:0], *tokenizer.encode("a")]) != tokenizer.to_bytes(tokenizer.encode("a")).decode()
        else "")
    assert all(text.startswith(shorter) for shorter in texts) and "".join(portions) == texts[-1]
    assert text[len(texts[-1]) :] in ("", "\ufffd")
