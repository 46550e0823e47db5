"""What `LanguageModel` makes of the ids that are written: texts behind prompts, in gaps, up to their ends."""

import pytest

from illada_jax.data.tokenizers import tokenizer_from_files
from illada_jax.data.tokenizers.chat import encode_chat
from tests.data.toy_tokenizers import files_of, llama, ours, word_piece
from tests.writer import writer

KINDS = pytest.mark.parametrize("kind", ["Llama, Prepend", "Llama, Metaspace first", "byte-level, blank first"])
LENGTH = 24


def row(tokenizer, ids):
    return [[*ids, *[tokenizer.eos_id] * (LENGTH - len(ids))]]


@KINDS
def test_a_continuation_and_a_gap_keep_their_blanks(kind):
    tokenizer = ours(kind)
    before, text = "the cat", "the cat is a cat."
    ids = tokenizer.encode(text)
    lm = writer(tokenizer, row(tokenizer, ids))
    result, = lm.generate([before])
    assert before + result.text == text and result.stopped_by == "eos"
    start, end = len(tokenizer.encode(before)), len(tokenizer.encode("the cat is"))
    for gapped in (f"the cat[[mask:{end - start}]] a cat.", f"[[mask:{start}]] is a[[mask:{len(ids) - end}]]"):
        filled, = lm.infill([gapped])
        if gapped.startswith("[["):
            assert filled.text.startswith("the cat is a")
        else:
            assert filled.text == text and filled.tokens == ids
    assert lm.generate([before], stop=[" a"])[0].text == " is" and lm.generate([before], stop=["cat is"])[0] == result


def test_a_character_may_span_two_gaps():
    tokenizer = ours("bytes")
    lm = writer(tokenizer, row(tokenizer, tokenizer.encode("漢字.")))
    assert lm.infill(["[[mask:2]][[mask:4]]."])[0].text == "漢字."


@KINDS
def test_candidates_continue_their_context(kind):
    tokenizer = ours(kind)
    lm = writer(tokenizer, row(tokenizer, []))
    for context in ("the", tokenizer.encode("the"), "the th"):
        before, after = lm.encode_pair(context, "en.")
        assert tokenizer.decode(before) + tokenizer.decode(after, after=before) == (
            context if isinstance(context, str) else "the") + "en."
    assert lm.encode_pair("", "the") == ([], tokenizer.encode("the"))


def test_a_stop_string_that_is_a_special_token_stops():
    tokenizer = ours("Llama, Prepend")
    end = tokenizer.special_tokens["<|end|>"]
    ids = [*tokenizer.encode("the cat"), end, *tokenizer.encode_behind("a cat is the cat")]
    lm = writer(tokenizer, row(tokenizer, ids))
    result, = lm.generate(["the"], stop=["<|end|>"])
    assert result.text == " cat" and result.stopped_by == "stop_id" and result.nfe == 1
    assert result == lm.generate(["the"], stop_ids=(end,))[0]
    assert lm.generate(["the"], stop=["</s>", "<mask>", "cat is"])[0].text == " cata "  # those that end nothing here


def test_an_answer_ends_where_the_next_turn_begins():
    tokenizer = ours("bytes")  # with the default template, whose turns begin with BOS
    prompt = encode_chat(tokenizer, [{"role": "user", "content": "?"}], True)
    ids = [*prompt, *tokenizer.encode("a"), tokenizer.bos_id, *tokenizer.encode("user")]
    lm = writer(tokenizer, [[*ids, *[tokenizer.eos_id] * (48 - len(ids))]])
    answer = lm.chat([{"role": "user", "content": "?"}])
    assert answer.text == "a" and answer.stopped_by == "stop_id"


def test_ids_in_and_out_need_no_encoding(monkeypatch):
    """WordPiece has no token for every text; `</think>` is encoded for the boost alone."""
    tokenizer = tokenizer_from_files(files_of(word_piece()))
    ids = tokenizer.encode("the cats is a cat.")
    lm = writer(tokenizer, row(tokenizer, ids))
    monkeypatch.setattr(tokenizer, "encode", lambda text: pytest.fail("encodes"))
    monkeypatch.setattr(tokenizer, "encode_behind", lambda text: pytest.fail("encodes"))
    assert lm.generate([ids[:2]])[0].tokens == ids[2:]
    assert lm.infill([[*ids[:2], tokenizer.mask_id, *ids[3:]]])[0].text == "the cats is a cat."
    assert len(lm.score(ids[:2], [ids[2:4]])) == 1


def test_streamed_text_has_no_half_character():
    """A block ends within a character; a line break is a byte piece like the character's bytes."""
    tokenizer = ours("Llama, Prepend")
    ids = [*tokenizer.encode("the"), *tokenizer.encode_behind("\n🙂漢"), *tokenizer.encode_behind("🙂")[:2]]
    lm = writer(tokenizer, row(tokenizer, ids))
    texts = []
    result, = lm.generate(["the"], on_block=lambda _, so_far: texts.append(so_far.text))
    assert result.text == "\n🙂漢\ufffd" and texts == ["\n", "\n🙂漢", "\n🙂漢"]
    assert tokenizer.decode(llama().encode("the\n🙂漢").ids) == "the\n🙂漢"
