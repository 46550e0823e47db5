"""The compiled decoder equals the naive one, token for token."""

import dataclasses
import functools

import numpy as np
import pytest

from illada_jax import model
from illada_jax.config import DecodeConfig
from illada_jax.decoding import Decoder
from tests import reference
from tests.decoding.agree import assert_agree
from tests.decoding.toys import IDS, NETWORK_SIZE, TRANSFORMER, from_tables, table, transformer


def hard_to_order():
    """Equal positions, tokens that are all equal, forbidden tokens, certainty, and near-certainty."""
    rng = np.random.default_rng(2)
    rows_LV = rng.normal(size=(96, NETWORK_SIZE)) * 3
    rows_LV[3:7] = rows_LV[3]
    rows_LV[7:10] = 0.0
    rows_LV[10:13, ::2] = -np.inf
    rows_LV[13:15] = -np.inf
    rows_LV[13:15, 7] = 1.0
    rows_LV[15:18] = [30.0 * (v == 5) for v in range(NETWORK_SIZE)]
    rows_LV[:, IDS.eos] = -20.0
    by_token_VV = rng.normal(size=(NETWORK_SIZE, NETWORK_SIZE))
    by_token_VV[:6] = 0.0  # so that equal columns stay equal after these tokens
    return by_token_VV, rows_LV


# 20 new tokens in blocks of 8 leave a short last block; 5 steps leave a remainder.
SETTINGS = DecodeConfig(max_new_tokens=20, block_length=8, steps_per_block=5, batch_size=4, seed=3)
HARD = from_tables(*hard_to_order())
PROMPTS = [[4], [5, 6, 7, 4, 9], [], [8] * 70, [9, 2, 9], [10, 3]]
M = IDS.mask
GAPPED = [[4, M, M, 5], [M] * 13, [6, M, 7, M, M, M, M, M, M, M, M, 8, M, 9], [4, 5, M], [M, 4, 5]]


STRATEGIES = {"threshold": 0.3, "factor": 1.1, "entropy_bound": 0.7}
FIXED = {"length": "fixed", "max_new_tokens": 16}


@pytest.mark.parametrize("cfg_scale", [0.0, 0.8])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("confidence", list(reference.CONFIDENCES))
@pytest.mark.parametrize("reveal", list(reference.REVEALS))
def test_grid_on_tables(reveal, confidence, temperature, cfg_scale):
    settings = dataclasses.replace(SETTINGS, reveal=reveal, confidence=confidence, temperature=temperature,
                                   cfg_scale=cfg_scale, **STRATEGIES)
    for length in ({}, FIXED):
        near_ties = assert_agree(HARD, dataclasses.replace(settings, **length), [[4], [5] * 9, [7, 8, 9, 10, 4]])
        assert near_ties <= 1, length


def test_strategies_reveal_different_numbers():
    steps = {reveal: [r.nfe for r in Decoder(
        HARD[0], dataclasses.replace(SETTINGS, reveal=reveal, **STRATEGIES), IDS, 96).generate([[4], [5] * 9])]
        for reveal in reference.REVEALS}
    assert len(set(map(tuple, steps.values()))) == len(reference.REVEALS)


@pytest.mark.parametrize("changes", [
    {},
    {"temperature": 0.7, "confidence": "random"},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 1.5, "top_k": 3},
    {"temperature": 1.5, "top_k": 4, "top_p": 0.7},
    {"length": "fixed", "reveal": "threshold", "threshold": 0.3, "cfg_scale": 0.8},
    {"length": "fixed", "temperature": 0.7, "max_new_tokens": 5},
    {"suppressed_ids": (4, 9), "stop_ids": (10,)},
    {"logits_eos_inf": True, "cfg_scale": 1.5, **FIXED},
    {"confidence_eos_eot_inf": True, "eot_id": 5, **FIXED},
    {"confidence_eos_eot_inf": True, "eot_id": 5, "temperature": 0.7, **FIXED},
    {"end_of_thinking_boost": 30.0, "end_of_thinking_ids": (6, 7, 6), "end_of_thinking_power": 1.0},
], ids=lambda changes: ",".join(changes) or "plain")
def test_options(changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    buckets = None if not changes else [64]
    assert assert_agree(table(), settings, PROMPTS[:3] + PROMPTS[4:], buckets=buckets) == 0
    settings = dataclasses.replace(settings, length="variable")
    assert assert_agree(table(seed=1), settings, GAPPED, infill=True, buckets=buckets) == 0


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_guidance_of_variable_length_is_a_fixed_length_call_per_block(cache):
    """As in iLLaDA's released loop, where the prompt of a block is all that precedes it, hidden without condition."""
    logits_fn, config = transformer()[0], TRANSFORMER
    settings = dataclasses.replace(SETTINGS, cfg_scale=1.5, cache=cache, logits_eos_inf=True)
    make = functools.partial(Decoder, logits_fn, ids=IDS, max_length=96, init_cache=model.make_init_cache(config))
    whole = make(settings=settings).generate(PROMPTS[:2])
    for prompt, result in zip(PROMPTS, whole, strict=False):
        written = []
        for length in (8, 8, 4):
            block = dataclasses.replace(settings, length="fixed", max_new_tokens=length)
            written += make(settings=block).generate([[*prompt, *written]])[0].tokens
        assert result.tokens == written
    fixed = make(settings=dataclasses.replace(settings, length="fixed")).generate(PROMPTS[:2])
    assert [result.tokens for result in fixed] != [result.tokens for result in whole]


def test_certain_positions_keep_their_order():
    """The surer position comes first even if a float32 softmax is exactly 1 for all."""
    margins = 18.0 + np.random.default_rng(0).permutation(16)
    rows_LV = np.zeros((96, NETWORK_SIZE))
    rows_LV[:16, 7] = margins
    networks = from_tables(np.zeros((NETWORK_SIZE, NETWORK_SIZE)), rows_LV)
    settings = dataclasses.replace(SETTINGS, max_new_tokens=16, block_length=16, steps_per_block=16)
    result = Decoder(networks[0], settings, IDS, 96).generate([[]])[0]
    assert np.argsort(result.reveal_step).tolist() == np.argsort(-margins).tolist()


@pytest.mark.parametrize("changes", [
    {},
    {"temperature": 0.7},
    {"reveal": "threshold", "confidence": "margin"},
    {"reveal": "threshold", "temperature": 0.7, **FIXED},
    {"reveal": "factor", "confidence": "entropy"},
    {"reveal": "factor", "cfg_scale": 0.8},
    {"reveal": "entropy_bound", "confidence": "random"},
    {"reveal": "entropy_bound", "cfg_scale": 0.8, "temperature": 0.7},
    {"confidence": "margin", "cfg_scale": 0.8, **FIXED},
    {"confidence": "entropy", "temperature": 0.7},
], ids=lambda changes: ",".join(map(str, changes.values())) or "plain")
def test_transformer(changes):
    """Rows of masks alone (the third prompt, the second text) are the same at every position: nothing but near-ties."""
    networks = transformer(config=dataclasses.replace(TRANSFORMER, num_layers=1))
    settings = dataclasses.replace(SETTINGS, **STRATEGIES, **changes)
    buckets = None if not changes else [96]  # a row that moves to another canvas: once is enough
    assert assert_agree(networks, settings, PROMPTS, exact_ties=False, buckets=buckets) <= 2
    settings = dataclasses.replace(settings, length="variable")
    assert assert_agree(networks, settings, GAPPED, infill=True, exact_ties=False, buckets=buckets) <= 2
