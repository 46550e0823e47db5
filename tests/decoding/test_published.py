"""Greedy results equal those of the published loops, run in PyTorch by tests/fixtures/make_published_loop.py."""

import json
import pathlib

import numpy as np
import pytest

from illada_jax.config import DecodeConfig, ModelConfig
from illada_jax.decoding import Decoder, SpecialIds
from illada_jax.model import make_logits_fn

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures"
FIXTURE = json.loads((FIXTURES / "published_loop.json").read_text())
MODEL = ModelConfig(**FIXTURE["model"])
IDS = SpecialIds(vocab_size=MODEL.vocab_size, **FIXTURE["ids"])


def load_params():
    params = {}
    with np.load(FIXTURES / "published_loop.npz") as weights:
        for path, value in weights.items():
            *parents, name = path.split("/")
            node = params
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = value
    return params


@pytest.mark.parametrize("name", FIXTURE["cases"])
def test_tokens_are_those_of_the_published_loop(name):
    case = FIXTURE["cases"][name]
    settings = DecodeConfig(length=case["length"], eot_id=FIXTURE["eot"], batch_size=8, **case["options"])
    decoder = Decoder(make_logits_fn(MODEL, load_params()), settings, IDS, MODEL.max_length)
    results = decoder.generate(FIXTURE["prompts"])
    for result, published in zip(results, case["tokens"], strict=True):
        answer = published[: published.index(IDS.eos)] if IDS.eos in published else published
        assert result.tokens == answer
        assert (result.stopped_by == "eos") == (IDS.eos in published)


def test_the_cases_cover_both_endings():
    stopped = {name: sum(IDS.eos in tokens for tokens in case["tokens"]) for name, case in FIXTURE["cases"].items()}
    assert 0 < stopped["variable"] < len(FIXTURE["prompts"])
    assert stopped["fixed, EOS never"] == 0 < stopped["fixed, EOS and EoT last"]
