"""What a stream prints is the text, for tokenizers of every kind, whatever ids are written."""

import contextlib
import io
from types import SimpleNamespace

import hypothesis
import numpy as np
import pytest

from illada_jax import generate
from tests.data.toy_tokenizers import KINDS, ours
from tests.writer import writer

NUM_ANSWERS = hypothesis.settings().max_examples  # 1,000 with the profile `many`
LENGTH, PROMPT = 28, 4


def answers(tokenizer, random) -> list[list[int]]:
    """Ids of texts, of halves of characters, and random ones, some of them special."""
    texts = ("the cat", " the ", "漢字", "🙂", "\n", ".", "é\ufffd", "a  a")
    pieces = [tokenizer.encode_behind(text) for text in texts]
    ordinary = [i for i in range(tokenizer.vocab_size) if tokenizer.to_bytes([i])]
    answer = []
    while len(answer) < LENGTH:
        piece = pieces[random.integers(len(pieces))]
        kind = random.integers(8)
        answer += piece[: random.integers(len(piece) + 1)] if kind == 0 else random.choice(
            ordinary, 2).tolist() if kind == 1 else piece
    if random.random() < 0.3:
        answer[random.integers(PROMPT, LENGTH)] = tokenizer.eos_id
    return answer[:LENGTH]


@pytest.mark.parametrize("kind", KINDS if NUM_ANSWERS > 100 else ["byte-level", "Llama, Prepend"])
def test_streamed_equals_unstreamed(kind, monkeypatch):
    tokenizer, random = ours(kind), np.random.default_rng(0)
    ids = [answers(tokenizer, random) for _ in range(NUM_ANSWERS)]
    prompts = [[100 + number // 100, 100 + number % 100, *row[2:PROMPT]] for number, row in enumerate(ids)]
    lm = writer(tokenizer, np.array(ids))
    for stop in ([], ["the", "字🙂", " a", "\n."]):
        monkeypatch.setattr(generate, "STOP", SimpleNamespace(value=stop))
        blocks = [[] for _ in prompts]
        streamed = lm.generate(prompts, stop=stop, on_block=lambda i, part: blocks[i].append(part))  # noqa: B023
        plain = lm.generate(prompts, stop=stop)
        assert plain == streamed
        for parts, result, prompt in zip(blocks, streamed, prompts, strict=True):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                printer = generate.Printer()
                for part in parts:
                    printer(0, part)
                    assert result.text.startswith(out.getvalue())
                printer.finish(result.text)
            assert out.getvalue() == result.text + "\n"
            if not stop:
                assert tokenizer.decode(prompt, final=False) + result.text == tokenizer.decode(prompt + result.tokens)
