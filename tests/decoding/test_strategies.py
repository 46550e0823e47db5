"""Confidences, reveal strategies, sampling and guidance by hand-computed values, with and without jit."""

import math

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from illada_jax.config import DecodeConfig
from illada_jax.decoding.confidence import CONFIDENCES, Prediction
from illada_jax.decoding.query import CanvasSlice, guided_logits, plain_logits_fn
from illada_jax.decoding.reveal import reveal_mask
from illada_jax.decoding.sampling import keep_likely, mask_logits

LN = math.log
PROBS_BQV = np.float32([[[0.5, 0.25, 0.25, 0.0], [0.0, 0.125, 0.0, 0.875]]])
PREDICTION = Prediction(jnp.array([[1, 3]]), jnp.log(PROBS_BQV), jnp.array([[0.5, 0.1]]))


class StrategiesTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(
        ("low_confidence", [LN(0.25), LN(0.875)]), ("margin", [LN(0.25), LN(0.75)]), ("random", [LN(0.5), LN(0.1)]),
        ("entropy", [0.5 * LN(0.5) + 0.5 * LN(0.25), 0.125 * LN(0.125) + 0.875 * LN(0.875)]))
    def test_confidences(self, name, expected):
        got_BQ = self.variant(CONFIDENCES[name])(PREDICTION)
        chex.assert_trees_all_close(got_BQ, np.float32([expected]), rtol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(
        ({"reveal": "schedule", "steps_per_block": 2}, [0, 3]), ({"reveal": "threshold", "threshold": 0.7}, [0, 3]),
        ({"reveal": "threshold", "threshold": 0.999}, [0]), ({"reveal": "factor", "factor": 0.5}, [0]),
        ({"reveal": "factor", "factor": 1.0}, [0, 3]), ({"reveal": "entropy_bound", "entropy_bound": 0.3}, [0, 3]),
        ({"reveal": "entropy_bound", "entropy_bound": 0.5}, [0, 1, 3]))
    def test_reveals(self, changes, expected):
        """Column 2 is the surest but not masked; 0, 3 and 1 follow. The block had four masks."""
        settings = DecodeConfig(**{"block_length": 4, "steps_per_block": 4, **changes})
        confidence_BQ, entropy_BQ = np.log(np.float32([[0.9, 0.5, 0.99, 0.8]])), np.full((1, 4), 0.25, np.float32)
        masked_BQ = np.array([[True, True, False, True]])

        def reveals(*arrays):
            return reveal_mask(settings, *arrays)

        got_BQ = self.variant(reveals)(confidence_BQ, masked_BQ, np.int32([4]), entropy_BQ,
                                       np.log(np.float32([settings.threshold])), np.int32(0))
        assert np.flatnonzero(got_BQ[0]).tolist() == expected

    @chex.variants(with_jit=True, without_jit=True)
    def test_masked_logits_and_nucleus(self):
        logits_BQV = jnp.log(jnp.float32([[[0.4, 0.3, 0.2, 0.1]]]))

        def kept(logits_BQV):
            return [jnp.isfinite(keep_likely(x, jnp.int32([0]), jnp.float32([top_p])))
                    for x, top_p in ((mask_logits(logits_BQV, (1,), 3), 0.6), (logits_BQV, 0.5))]

        one, other = self.variant(kept)(logits_BQV)
        assert one.tolist() == [[[True, False, False, False]]] and other.tolist() == [[[True, True, False, False]]]


@pytest.mark.parametrize("top_k, kept", [(1, [0]), (2, [0, 1, 2]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]),
                                         (9, [0, 1, 2, 3])])
def test_ties_with_the_last_of_the_top_k_are_kept(top_k, kept):
    logits_BQV = jnp.log(jnp.float32([[[0.4, 0.25, 0.25, 0.1, 0.0]]]))
    filtered_BQV = keep_likely(logits_BQV, jnp.int32([top_k]), jnp.float32([1.0]))
    assert jnp.flatnonzero(jnp.isfinite(filtered_BQV)).tolist() == kept


def test_guidance_equals_two_passes():
    """Logits depend on all tokens of a row; given tokens are masked in the unconditional pass, padding is not."""
    weights_VV = np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32)

    def network(tokens_BL):
        return weights_VV[tokens_BL] + jnp.sum(weights_VV[tokens_BL], axis=1, keepdims=True)

    tokens_BL = np.int32([[3, 4, 0, 5], [5, 0, 0, 1]])
    segments_BL, given_BL = np.int32([[1, 1, 1, 1], [1, 1, 1, 0]]), np.array([[1, 1, 0, 0], [1, 0, 0, 1]], bool)
    positions_BL = np.broadcast_to(np.arange(4, dtype=np.int32), (2, 4))
    canvas, columns_BQ = CanvasSlice(tokens_BL, positions_BL, segments_BL, given_BL), np.int32([[2, 3], [1, 2]])
    got_BQV, _ = guided_logits(plain_logits_fn(network), canvas, columns_BQ, cfg_scale=0.5, mask_id=0)
    cond_BLV, uncond_BLV = network(tokens_BL), network(np.int32([[0, 0, 0, 5], [0, 0, 0, 1]]))
    guided_BLV = uncond_BLV + 1.5 * (cond_BLV - uncond_BLV)
    chex.assert_trees_all_close(got_BQV, jnp.take_along_axis(guided_BLV, columns_BQ[:, :, None], 1), rtol=1e-5)
    with pytest.raises(AssertionError):
        guided_logits(plain_logits_fn(network), canvas._replace(given_BT=given_BL[:, :3]), columns_BQ, cfg_scale=0.5,
                      mask_id=0)
    with pytest.raises(AssertionError):  # a network that ignores query_columns_BQ
        guided_logits(lambda tokens_BT, *_: (network(tokens_BT), None), canvas, columns_BQ, cfg_scale=0.0, mask_id=0)
