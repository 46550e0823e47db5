"""Schedules by hand values, weight decay, and the matrices that Muon updates."""

import jax
import numpy as np
import pytest

from illada_jax import model
from illada_jax.config import Config, ModelConfig, from_dict, to_dict
from illada_jax.errors import ConfigError
from illada_jax.training.optimizer import make_optimizer, make_schedule

SMALL = ModelConfig(vocab_size=64, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=32)


def config_with(steps=100, **optimizer):
    values = to_dict(Config(model=SMALL))
    values["train"]["steps"] = steps
    values["optimizer"] |= optimizer
    return from_dict(values)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ({}, {0: 1e-3, 99: 1e-3}),
        ({"warmup_steps": 10}, {0: 0.0, 5: 5e-4, 10: 1e-3, 99: 1e-3}),
        ({"decay_steps": 40, "final_learning_rate": 1e-4}, {59: 1e-3, 60: 1e-3, 80: 5.5e-4, 100: 1e-4, 150: 1e-4}),
        ({"decay_steps": 40, "decay_start": 20}, {20: 1e-3, 40: 5e-4, 60: 0.0, 99: 0.0}),
        ({"decay_steps": 40, "decay_shape": "cosine", "final_learning_rate": 2e-4},
         {60: 1e-3, 70: 2e-4 + 8e-4 * (1 + 0.5**0.5) / 2, 80: 6e-4, 100: 2e-4}),
        ({"warmup_steps": 10, "change_steps": (30,), "changed_rates": (2e-4,), "decay_steps": 20,
          "final_learning_rate": 1e-4}, {10: 1e-3, 29: 1e-3, 30: 2e-4, 79: 2e-4, 90: 1.5e-4, 100: 1e-4}),
    ],
)
def test_the_schedule_has_its_hand_values(optimizer, expected):
    config = config_with(**optimizer)
    for peak in (1e-3, 5e-3):
        schedule = make_schedule(config, peak)
        for step, rate in expected.items():
            np.testing.assert_allclose(schedule(step), rate * peak / 1e-3, rtol=1e-5, atol=1e-9, err_msg=f"step {step}")


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"change_steps": (30,)}, "changed_rates"),
        ({"warmup_steps": 30, "decay_start": 20, "decay_steps": 10}, "warmup_steps = 30: must not exceed .*, 20"),
        ({"warmup_steps": 70, "decay_start": 60, "decay_steps": 40}, "warmup_steps = 70: must not exceed .*, 60"),
        ({"change_steps": (30, 20), "changed_rates": (1e-4, 1e-5)}, "must ascend"),
        ({"change_steps": (70,), "changed_rates": (1e-4,), "decay_start": 60, "decay_steps": 40}, "start of the decay"),
        ({"change_steps": (30,), "changed_rates": (1e-4,), "final_learning_rate": 2e-4}, "final_learning_rate"),
    ],
)
def test_inconsistent_schedules_are_refused(optimizer, message):
    with pytest.raises(ConfigError, match=message):
        config_with(**optimizer)


@pytest.mark.parametrize(("steps", "optimizer", "expected"), [
    (4400, {"warmup_steps": 50, "decay_steps": 3400}, (50, (), 1000, 3400)),
    (3450, {"warmup_steps": 50, "decay_steps": 3400}, (50, (), 50, 3400)),
    (345, {"warmup_steps": 50, "decay_steps": 3400}, (5, (), 5, 340)),
    (1, {"warmup_steps": 50, "decay_steps": 3400}, (0, (), 1, 0)),
    (100, {"warmup_steps": 200}, (100, (), 100, 0)),
    (100, {"warmup_steps": 50, "decay_fraction": 0.7}, (30, (), 30, 70)),
    (100, {"warmup_steps": 20, "decay_fraction": 0.7}, (20, (), 30, 70)),
    (100, {"warmup_steps": 20, "change_steps": (600,), "changed_rates": (1e-4,), "decay_steps": 400},
     (2, (60,), 60, 40)),
    (100, {"warmup_steps": 20, "decay_start": 500, "decay_steps": 400}, (20, (), 500, 400)),
])
def test_a_schedule_that_does_not_fit_is_scaled(steps, optimizer, expected):
    """Only then, and down; a start of the decay is kept."""
    config = config_with(steps, **optimizer)
    assert (config.warmup_steps, config.change_steps, config.decay_start, config.decay_steps) == expected
    assert (config.schedule_scale == 1) == (config.warmup_steps == optimizer["warmup_steps"])
    rates = np.asarray(make_schedule(config, 1e-3)(np.arange(steps)))
    assert rates.max() <= 1.001e-3 and (steps == 1 or rates.max() > 9e-4)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_acts_on_matrices_only(name):
    """With zero gradients an update consists of the decay only."""
    config = config_with(name=name, weight_decay=0.5)
    optimizer = make_optimizer(config)
    shapes = model.abstract_params(SMALL)
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(lambda: optimizer.update(zeros, optimizer.init(params), params))()
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        decayed = path[-1].key != "scale" and not (name == "muon" and path[-1].key == "embedding")
        np.testing.assert_allclose(update, -5e-4 if decayed else 0.0, atol=1e-9, err_msg=str(path))


def test_muon_makes_the_updates_of_layer_matrices_orthogonal():
    """A matrix of random gradients becomes one whose singular values are all near one: per layer, input by output."""
    config = config_with(name="muon", weight_decay=0.0, clip_norm=0.0, learning_rate=1.0)
    optimizer = make_optimizer(config)
    rng = np.random.default_rng(0)
    shapes = model.abstract_params(SMALL)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    updates, _ = jax.jit(lambda: optimizer.update(params, optimizer.init(params), params))()
    inputs = {"q": 16, "k": 16, "v": 16, "o": 16, "gate": 16, "up": 16, "down": 32}
    matrices = {**updates["layers"]["attention"], **updates["layers"]["mlp"]}
    for name, size in inputs.items():
        for matrix in matrices[name]:
            singular = np.linalg.svd(matrix.reshape(size, -1), compute_uv=False)
            assert singular.min() > 0.4 * singular.max(), name
