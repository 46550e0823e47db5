"""Texts with gaps, for every kind of tokenizer: given text and written tokens survive, and the text begins right."""

import pytest

from illada_jax.decoding.gaps import parse_gaps
from illada_jax.errors import InputError
from tests.data.toy_tokenizers import KINDS, ours


def filled(tokenizer, *parts):
    """The text of given pieces (str) and of gaps (lists of ids) that get these ids."""
    text = "".join(part if isinstance(part, str) else f"[[mask:{len(part)}]]" for part in parts)
    written = iter([id_ for part in parts if not isinstance(part, str) for id_ in part])
    gapped = parse_gaps(text)
    masked = gapped.tokens(tokenizer)
    return gapped.fill(tokenizer, masked, [next(written) if id_ == tokenizer.mask_id else id_ for id_ in masked])


@pytest.mark.parametrize("kind", KINDS)
def test_gaps_between_pieces(kind):
    tokenizer = ours(kind)
    start, behind = tokenizer.encode, tokenizer.encode_behind
    assert parse_gaps("the[[mask:2]] cat[[mask:1]]").tokens(tokenizer) == [
        *start("the"), *[tokenizer.mask_id] * 2, *behind(" cat"), tokenizer.mask_id]
    assert filled(tokenizer, "the ", behind("cat"), " is") == "the cat is"
    assert filled(tokenizer, "the", behind(" cat"), " is") == "the cat is"
    assert filled(tokenizer, "a", behind(" then"), behind(" cat"), "") == "a then cat"
    # A text that begins with a gap begins as the tokenizer begins a text: its own blank in front is not text.
    assert filled(tokenizer, start("the"), " cat", behind(" is")) == "the cat is"
    assert filled(tokenizer, start("the"), behind(" cat"), "") == "the cat"
    assert filled(tokenizer, [tokenizer.eos_id], start("the"), "!") == "the!"


@pytest.mark.parametrize("text", ["a[[mask:0]]", "[[mask:2]][[mask:]]", "[[mask:2]] [[mask:x]]", "[[mask:1]] [[mask"])
def test_a_malformed_gap_is_refused_beside_good_ones(text):
    with pytest.raises(InputError, match="malformed gap; write"):
        parse_gaps(text)
