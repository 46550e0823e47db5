"""`lm.score` and `lm.choose`: texts and ids, settings, lengths, messages."""

import numpy as np
import pytest

from illada_jax import api
from illada_jax.config import Config, DataConfig, ModelConfig
from illada_jax.data.tokenizers import ByteTokenizer, train_sentencepiece
from illada_jax.decoding import SpecialIds
from illada_jax.errors import InputError
from tests import reference_scoring as reference
from tests.decoding.toys import network_of
from tests.util import random_params

TOKENIZER = ByteTokenizer()
MODEL = ModelConfig(vocab_size=TOKENIZER.vocab_size, d_model=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
                    d_ff=32, max_length=24)
CONFIG = Config(model=MODEL, data=DataConfig(length=24))


@pytest.fixture(scope="module")
def lm():
    return api.LanguageModel(CONFIG, random_params(MODEL, scale=3.0), TOKENIZER)


def test_texts_and_ids_give_the_same(lm):
    texts = lm.score("a b", [" cd", " ef"])
    assert texts == lm.score(TOKENIZER.encode("a b"), [TOKENIZER.encode(" cd"), np.array(TOKENIZER.encode(" ef"))])
    network, ids = network_of(MODEL, lm.params), SpecialIds.of(TOKENIZER)
    for text, score in zip((" cd", " ef"), texts, strict=True):
        value, _, _ = reference.confidence(network, TOKENIZER.encode("a b"), TOKENIZER.encode(text), ids)
        assert abs(score.value - value) < 1e-5 and score.length == 3


def test_settings(lm):
    with_eos = lm.score("a", ["b"], eos=True, bos=True)[0]
    network, ids = network_of(MODEL, lm.params), SpecialIds.of(TOKENIZER)
    value, _, _ = reference.confidence(network, TOKENIZER.encode("a"), TOKENIZER.encode("b"), ids, bos=True, eos=True)
    assert abs(with_eos.value - value) < 1e-5 and with_eos.value != lm.score("a", ["b"])[0].value
    drawn = lm.score("", ["bcd"], method="monte_carlo", mc_num=16)[0]
    assert drawn.stderr > 0 and drawn != lm.score("", ["bcd"], method="monte_carlo", mc_num=16, seed=1)[0]


def test_choice_by_every_length(lm):
    candidates = ["é", "bcde", "fghijklm"]
    values = np.array([score.value for score in lm.score("a", candidates)])
    lengths = {"none": [1, 1, 1], "tokens": [2, 4, 8], "characters": [1, 4, 8], "bytes": [2, 4, 8]}
    assert len({int(np.argmax(values / divisors)) for divisors in lengths.values()}) > 1
    for normalise, divisors in lengths.items():
        assert lm.choose("a", candidates, normalise=normalise) == np.argmax(values / divisors)


def test_a_pair_is_tokenised_as_one_text_unless_a_token_straddles_it():
    tokenizer = train_sentencepiece(["the cat sat on the mat and the hat"] * 50, 300)
    lm = api.LanguageModel(CONFIG, None, tokenizer)
    for context, candidate in [("the cat", " sat on"), ("", "the mat"), ("the c", "at sat")]:
        before, after = lm.encode_pair(context, candidate)
        assert tokenizer.decode(before + after) == context + candidate and after
        assert tokenizer.decode(before) == context
    joined = lm.encode_pair("the cat", " sat on")
    assert joined[0] + joined[1] == tokenizer.encode("the cat sat on")
    straddling = lm.encode_pair("the c", "at sat")
    assert straddling == (tokenizer.encode("the c"), tokenizer.encode("at sat"))
    assert tokenizer.encode("the cat sat")[: len(straddling[0])] != straddling[0]


@pytest.mark.parametrize("call, message", [
    (lambda lm: lm.score("a", "b"), "must be a list of candidates"),
    (lambda lm: lm.score("a", ["b", ""]), "pair 1: the candidate is empty"),
    (lambda lm: lm.score("a" * 20, ["b" * 9]), "exceed the context of 24 tokens"),
    (lambda lm: lm.score("a", ["b"], method="likelihood"), "config.score.method = 'likelihood': must be one of"),
    (lambda lm: lm.score("a", ["b"], draws=3), "config.score.draws: unknown key; known here: method, mc_num"),
    (lambda lm: lm.choose("a", []), "has no candidates"),
    (lambda lm: lm.choose("a", ["b"], normalise="words"), "normalise = 'words': must be one of 'none'"),
])
def test_bad_input(lm, call, message):
    with pytest.raises(InputError) as caught:
        call(lm)
    assert message in str(caught.value) and "\n" not in str(caught.value)
