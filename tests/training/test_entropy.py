"""A tiny network trained by the real loop on a distribution that can be enumerated reaches its entropy, from above.

The distribution is that of `tests/diffusion/test_exactness.py`. A visible start token goes before the four that are
drawn: without one, rotary positions cannot tell the places of identical masks apart.
"""

import itertools

import jax
import numpy as np
import pytest
from etils import epath

from illada_jax import model
from illada_jax.config import Config, from_dict, to_dict
from illada_jax.data.pipeline import Batches, pack
from illada_jax.data.tokenizers import ByteTokenizer
from illada_jax.parallel.mesh import make_mesh
from illada_jax.training.loop import RunSetup, train
from tests.enumerable import LENGTH, MASK, OUTCOMES, SYMBOLS, enumerated, exact_measure, make_joint

START = SYMBOLS + 1  # a separate id, besides the symbols and MASK
NOISY = np.array(list(itertools.product(range(SYMBOLS + 1), repeat=LENGTH)), np.int32)


def after_start(tokens_BL: np.ndarray) -> np.ndarray:
    return np.pad(tokens_BL, ((0, 0), (1, 0)), constant_values=START)


class Draws(Batches):
    """Rows are independent draws from the distribution, a function of (seed, step, row) as everywhere."""

    fingerprint = "enumerable"

    def __init__(self, config: Config, joint_N: np.ndarray):
        super().__init__(config, pad_id=0)
        self._cumulative_N = np.cumsum(joint_N)

    def rows(self, step, rows):
        draws_B = self.step_draws(step, 99)[np.asarray(rows), 0]
        batch = pack(list(after_start(OUTCOMES[np.searchsorted(self._cumulative_N, draws_B)])), 1 + LENGTH, pad_id=0)
        return batch._replace(maskable_BL=batch.tokens_BL != START)

    def epochs(self, step):
        return {}


def make_config() -> Config:
    values = to_dict(Config())
    values["model"] |= {"vocab_size": SYMBOLS + 2, "d_model": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1,
                        "head_dim": 16, "d_ff": 96, "max_length": 1 + LENGTH, "rope_theta": 20.0, "tied_head": False,
                        "scan_unroll": 2}
    values["data"] |= {"length": 1 + LENGTH, "batch_size": 128}
    values["diffusion"] |= {"mask_id": MASK, "eps": 0.05}
    values["optimizer"] |= {"name": "muon", "learning_rate": 1e-2, "adam_learning_rate": 1e-2, "warmup_steps": 20,
                            "decay_steps": 1400, "weight_decay": 0.0}
    values["train"] |= {"steps": 2000, "tensorboard": False, "plateau_window": 0, "log_every": 100}
    values["eval"] |= {"every": 250}
    values["checkpoint"] |= {"every": 10**6}
    return from_dict(values)


@pytest.mark.slow
def test_the_loop_reaches_the_entropy_and_its_bound_is_never_below_it(tmp_path):
    config, joint = make_config(), make_joint()
    seen_NL = after_start(NOISY)
    ones_NL = np.ones_like(seen_NL)
    positions_NL = np.cumsum(ones_NL, axis=1, dtype=np.int32) - 1
    # Normalised over the whole vocabulary, as everywhere: what START gets is lost.
    log_probs = jax.jit(lambda params: jax.nn.log_softmax(model.head(
        config.model, params, model.hidden(config.model, params, seen_NL, positions_NL, ones_NL))))
    bounds = []

    def bound(params, step):
        log_probs_NLV = np.array(log_probs(params))[:, 1:]
        # The table has no column for START: its share goes to MASK, which is never right either.
        log_probs_NLV[..., MASK] = np.logaddexp(log_probs_NLV[..., MASK], log_probs_NLV[..., START])
        table = np.zeros((SYMBOLS + 1,) * LENGTH + (LENGTH, SYMBOLS + 1), np.float32)
        table[tuple(NOISY.T)] = log_probs_NLV[..., :START]
        bounds.append(joint @ enumerated(table, exact_measure))
        return {"eval/bound": float(bounds[-1])}

    mesh = make_mesh(config.mesh, jax.devices()[:1])
    train(RunSetup(config, epath.Path(tmp_path / "w"), mesh, Draws(config, joint), ByteTokenizer(), {"bound": bound}))
    entropy = -joint @ np.log(joint)
    assert bounds[0] > 1.02 * entropy
    assert min(bounds) > entropy - 1e-5
    assert bounds[-1] < 1.02 * entropy
