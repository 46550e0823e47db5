"""Schedules by hand values, weight decay, and the matrices that Muon updates."""

import functools

import jax
import numpy as np
import pytest
from flax import traverse_util

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


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_updates_are_those_of_the_formulas(name):
    """Three steps at half the rates, of which the first is clipped, against numpy.

    With Muon all but the layers' matrices get Adam with Nesterov's momentum, optax's default, and a matrix an update
    with the singular vectors of its momentum: the products of the two are symmetric.
    """
    config = config_with(name=name, b1=0.8, b2=0.7, eps=1e-2, weight_decay=0.2, clip_norm=5.0, learning_rate=1e-2,
                         muon_momentum=0.6, adam_learning_rate=3e-2)
    optimizer, muon = make_optimizer(config, 0.5), name == "muon"
    rng = np.random.default_rng(0)
    params, *gradients = ({path: scale * rng.normal(size=x.shape).astype(np.float32) for path, x in
                           traverse_util.flatten_dict(model.abstract_params(SMALL), sep="/").items()}
                          for scale in (1, 1, 0.01, 0.02))
    nested = functools.partial(traverse_util.unflatten_dict, sep="/")
    state, update = optimizer.init(nested(params)), jax.jit(optimizer.update)
    first, second = (dict.fromkeys(params, 0.0) for _ in range(2))
    for step, grads in enumerate(gradients, 1):
        updates, state = update(nested(grads), state, nested(params))
        norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in grads.values()))
        assert (norm > 5) == (step == 1)
        for path, got in traverse_util.flatten_dict(jax.device_get(updates), sep="/").items():
            g = grads[path] * min(1, 5 / norm)
            matrix = "scale" not in path
            if muon and matrix and path != "embedding":
                first[path] = 0.6 * first[path] + 0.4 * g
                momentum = 0.6 * first[path] / (1 - 0.6 ** (step + 1)) + 0.4 * g / (1 - 0.6**step)
                moved = -got / 5e-3 - 0.2 * params[path]
                inputs = 32 if path.endswith("down") else 16
                for a, b in zip(momentum.reshape(2, inputs, -1), moved.reshape(2, inputs, -1), strict=True):
                    for product in (a @ b.T, a.T @ b):
                        assert np.abs(product - product.T).max() < 1e-3 * np.abs(product).max(), path
                continue
            first[path] = 0.8 * first[path] + 0.2 * g
            second[path] = 0.7 * second[path] + 0.3 * g**2
            mean = first[path] / (1 - 0.8**step)
            if muon:
                mean = 0.8 * first[path] / (1 - 0.8 ** (step + 1)) + 0.2 * g / (1 - 0.8**step)
            change = mean / (np.sqrt(second[path] / (1 - 0.7**step)) + 1e-2)
            change += 0.2 * (matrix and not muon) * params[path]
            np.testing.assert_allclose(got, -(1.5e-2 if muon else 5e-3) * change, rtol=1e-3, atol=1e-7, err_msg=path)
