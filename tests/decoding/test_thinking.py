"""The end-of-thinking boost equals the naive one, on texts that often hold the string or a part of it."""

import functools

import jax
import numpy as np

from illada_jax.config import DecodeConfig
from illada_jax.decoding.thinking import boost_end_of_thinking
from tests import reference

STRING = (5, 6, 5, 7)  # its third id begins it again
SETTINGS = DecodeConfig(end_of_thinking_boost=3.0, end_of_thinking_power=2.0, end_of_thinking_ids=STRING)
ROWS, LENGTH, VOCABULARY = 256, 16, 8


def test_the_boost_equals_the_naive_one():
    """The active block has three slots: one that is written and two masks. Prompts hold the string, too."""
    rng = np.random.default_rng(0)
    tokens_BL = rng.choice([5, 6, 7], (ROWS, LENGTH), p=[0.45, 0.3, 0.25]).astype(np.int32)
    written_B = rng.integers(1, LENGTH - 1, ROWS)
    prompt_B = rng.integers(0, written_B + 1)
    limit_B = rng.integers(written_B + 2, LENGTH + 8)
    tokens_BL[np.arange(LENGTH) >= written_B[:, None]] = 0
    columns_BQ = written_B[:, None] + np.arange(-1, 2)
    logits_BQV = rng.normal(size=(ROWS, 3, VOCABULARY)).astype(np.float32)
    got_BQV = jax.jit(functools.partial(boost_end_of_thinking, SETTINGS, STRING))(
        logits_BQV, tokens_BL, prompt_B, limit_B, columns_BQ, np.tile([False, True, True], (ROWS, 1)))
    boosted = []
    for row, canvas in enumerate(tokens_BL.tolist()):
        expected = np.zeros((LENGTH, VOCABULARY), np.float32)
        expected[columns_BQ[row]] = logits_BQV[row]
        trace = reference.Trace(canvas[: written_B[row] + 2], int(prompt_B[row]), int(limit_B[row]))
        reference.boost(expected, trace, int(written_B[row]), SETTINGS)
        np.testing.assert_allclose(got_BQV[row], expected[columns_BQ[row]], atol=1e-5)
        boosted += np.flatnonzero((expected[columns_BQ[row]] != logits_BQV[row]).any(axis=0)).tolist()
    assert min(np.bincount(boosted)[5:]) > 4 and len(boosted) < ROWS - 4  # every id, and some rows are not boosted
