"""Commands that a run suggests at its end."""

import types

import pytest

from illada_jax.config import Config
from illada_jax.data.tokenizers import ByteTokenizer
from illada_jax.training.run import _example_prompts


def corpus(*texts):
    tokenizer = ByteTokenizer()
    stream = types.SimpleNamespace(num_documents=len(texts), document=lambda index: tokenizer.encode(texts[index]))
    return types.SimpleNamespace(heldout=stream, train=stream, tokenizer=tokenizer)


@pytest.mark.parametrize(("texts", "prompt", "gapped"), [
    (["3.1. Data model\n****\n\n", "See x. The list of names is sorted before it is returned. And so on."],
     "The list of names", "The list of names[[mask:10]] before it is returned."),
    (["one two three four five six seven"], "one two three four", "one two three four[[mask:9]] seven"),
    (["short"], "short", "short[[mask:4]]"),
])
def test_suggested_prompts_are_whole_words_of_a_sentence(texts, prompt, gapped):
    assert _example_prompts(Config(), corpus(*texts)) == (prompt, gapped)
