"""The training step against a plain computation, and its small parts by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from illada_jax import model
from illada_jax.config import Config, FaultsConfig, from_dict, to_dict
from illada_jax.data.batch import Batch
from illada_jax.diffusion.objective import LossSums
from illada_jax.diffusion.process import corrupt
from illada_jax.keys import Purpose, key_for
from illada_jax.parallel.mesh import make_mesh
from illada_jax.training.optimizer import make_optimizer
from illada_jax.training.step import TrainState, _is_bad, init_state, is_finite, make_train_step, skip_steps
from tests.util import random_params

ROWS, LENGTH, VOCABULARY, MASK = 4, 12, 20, 19


def make_config(seed=5, **optimizer) -> Config:
    values = to_dict(Config())
    values["seed"] = seed
    values["model"] |= {"vocab_size": VOCABULARY, "d_model": 8, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1,
                        "head_dim": 4, "d_ff": 12, "max_length": LENGTH}
    values["data"] |= {"length": LENGTH, "batch_size": ROWS}
    values["diffusion"] |= {"mask_id": MASK}
    # With a large epsilon Adam's updates do not magnify the last bits of small gradients.
    values["optimizer"] |= {"ema_decay": 0.9, "eps": 1e-2, "weight_decay": 0.3, "clip_norm": 0.1, **optimizer}
    return from_dict(values)


def make_batch() -> Batch:
    rng = np.random.default_rng(0)
    tokens_BL = rng.integers(0, MASK, (ROWS, LENGTH), dtype=np.int32)
    columns_BL = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    return Batch(tokens_BL, columns_BL > 1, np.ones_like(tokens_BL), columns_BL,
                 rng.uniform(0.5, 2, (ROWS, LENGTH)).astype(np.float32))


def test_a_step_is_masks_loss_gradient_and_update():
    """Masks of (seed, step), the loss by all logits and autodiff, and the optimizer at half its rates."""
    config, batch, step = make_config(), make_batch(), 3
    params = random_params(config.model)
    optimizer = make_optimizer(config, 0.5)

    @jax.jit
    def plain(params):
        noisy_BL, masked_BL, p_BL = corrupt(key_for(5, Purpose.CORRUPTION, step), batch, config.diffusion)

        def loss(params):
            hidden_BLD = model.hidden(config.model, params, noisy_BL, batch.positions_BL, batch.segments_BL)
            ce_BL = optax.softmax_cross_entropy_with_integer_labels(
                model.head(config.model, params, hidden_BLD), batch.tokens_BL)
            return jnp.sum(jnp.where(masked_BL, batch.weights_BL * ce_BL / p_BL, 0.0))

        total, grads = jax.value_and_grad(loss)(params)
        weight = jnp.sum(batch.weights_BL * batch.maskable_BL)
        grads = jax.tree.map(lambda g: g / weight, grads)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return total, weight, jnp.sum(masked_BL), optax.tree.norm(grads), optax.apply_updates(params, updates)

    total, weight, masked, norm, after = jax.device_get(plain(params))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    average = jax.tree.map(lambda x: x + 1, params)
    state, metrics = make_train_step(config, mesh, 0.5)(
        TrainState(np.int32(step), params, jax.jit(optimizer.init)(params), average), batch)
    np.testing.assert_allclose(metrics.sums.loss, total, rtol=1e-5)
    np.testing.assert_allclose(metrics.sums.weight, weight, rtol=1e-6)
    assert (metrics.sums.masked, metrics.sums.maskable) == (masked, ROWS * (LENGTH - 2))
    np.testing.assert_allclose(metrics.gradient_norm, norm, rtol=1e-5)
    assert norm > 2 * config.optimizer.clip_norm
    decay = (1 + step) / (10 + step)
    for new, expected, old, ema in zip(*map(jax.tree.leaves, (state.params, after, params, state.ema)), strict=True):
        np.testing.assert_allclose(new - old, expected - old, rtol=1e-4, atol=2e-7)
        np.testing.assert_allclose(ema, decay * (old + 1) + (1 - decay) * new, rtol=1e-5, atol=1e-6)
    assert (int(state.step), bool(metrics.bad), state.eval_params is state.ema) == (step + 1, False, True)


def test_the_initial_params_follow_the_seed():
    one, other = (jax.jit(lambda: init_state(make_config(seed)).params["embedding"])() for seed in (1, 2))  # noqa: B023
    assert (np.asarray(one) != np.asarray(other)).all()


@pytest.mark.parametrize(("loss", "norm", "limit", "bad"), [
    (1.0, 1.0, 0.0, False), (np.nan, 1.0, 0.0, True), (np.inf, 1.0, 0.0, True), (1.0, np.inf, 0.0, True),
    (1.0, np.nan, 0.0, True), (99.0, 1.0, 2.1, False), (1.0, 1.0, 1.9, True),
])
def test_bad_steps(loss, norm, limit, bad):
    """Ten masked tokens with a cross-entropy of 2 nats on average."""
    none_K = np.zeros(10, np.float32)
    sums = LossSums(jnp.float32(loss), 20.0, 10.0, 20.0, 0.0, none_K, none_K + 2, none_K)
    assert bool(_is_bad(FaultsConfig(max_cross_entropy=limit), sums, jnp.float32(norm))) == bad


def test_skipped_steps_count_and_one_bad_number_is_found():
    def state():
        return TrainState(jnp.int32(3), {"a": jnp.ones(2), "b": jnp.zeros(2)}, {"count": jnp.int32(5)})

    skipped = skip_steps(state(), jnp.int32(4))
    assert (int(skipped.step), int(skipped.opt_state["count"])) == (7, 9)
    np.testing.assert_array_equal(skipped.params["a"], np.ones(2))
    assert is_finite(state())
    assert not is_finite(dataclasses.replace(state(), params={"a": jnp.ones(2), "b": jnp.array([0, jnp.nan])}))
