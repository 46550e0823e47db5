"""The compiled decoder equals the naive one, token for token."""

import dataclasses

import numpy as np
import pytest

from illada_jax.config import DecodeConfig
from illada_jax.decoding import Decoder
from tests.decoding.agree import assert_agree
from tests.decoding.toys import IDS, NETWORK_SIZE, from_tables, table, transformer

# 20 new tokens in blocks of 8 leave a short last block; 5 steps leave a remainder.
SETTINGS = DecodeConfig(max_new_tokens=20, block_length=8, steps_per_block=5, batch_size=4, seed=3)
PROMPTS = [[4], [5, 6, 7, 4, 9], [], [8] * 70, [9, 2, 9], [10, 3]]
M = IDS.mask
GAPPED = [[4, M, M, 5], [M] * 13, [6, M, 7, M, M, M, M, M, M, M, M, 8, M, 9], [4, 5, M], [M, 4, 5]]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("confidence", ["low_confidence", "random"])
def test_tables(confidence, temperature):
    settings = dataclasses.replace(SETTINGS, confidence=confidence, temperature=temperature)
    assert assert_agree(table(), settings, PROMPTS) == 0
    assert assert_agree(table(seed=1), settings, GAPPED, infill=True) == 0


def test_tables_that_are_hard_to_order():
    """Equal positions, equal tokens, forbidden tokens, certainty, and positions that nothing tells apart."""
    rows_LV = np.random.default_rng(2).normal(size=(96, NETWORK_SIZE)) * 3
    rows_LV[10:30] = rows_LV[10]
    rows_LV[30:40] = 0.0
    rows_LV[40:50, ::2] = -np.inf
    rows_LV[50:55] = -np.inf
    rows_LV[50:55, 7] = 1.0
    rows_LV[55:60] = [30.0 * (v == 5) for v in range(NETWORK_SIZE)]
    rows_LV[:, IDS.eos] = -20.0
    networks = from_tables(np.zeros((NETWORK_SIZE, NETWORK_SIZE)), rows_LV)
    settings = dataclasses.replace(SETTINGS, max_new_tokens=80)
    assert assert_agree(networks, settings, [[4], [5] * 9]) == 0


def test_certain_positions_keep_their_order():
    """Where a float32 softmax is exactly 1 for all, the surer position still comes first."""
    margins = 18.0 + np.random.default_rng(0).permutation(16)
    rows_LV = np.zeros((96, NETWORK_SIZE))
    rows_LV[:16, 7] = margins
    networks = from_tables(np.zeros((NETWORK_SIZE, NETWORK_SIZE)), rows_LV)
    settings = dataclasses.replace(SETTINGS, max_new_tokens=16, block_length=16, steps_per_block=16)
    result = Decoder(networks[0], settings, IDS, 96).generate([[]])[0]
    assert np.argsort(result.reveal_step).tolist() == np.argsort(-margins).tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_transformer(temperature):
    """Rows of masks alone (the third prompt, the second text) are the same at every position: nothing but near-ties."""
    networks = transformer()
    settings = dataclasses.replace(SETTINGS, temperature=temperature)
    assert assert_agree(networks, settings, PROMPTS, exact_ties=False) <= 2
    assert assert_agree(networks, settings, GAPPED, infill=True, exact_ties=False) <= 1
