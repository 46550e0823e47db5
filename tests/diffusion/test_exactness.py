"""The loss is the bound that it claims to be: on four tokens of three symbols everything can be enumerated.

The network is the table of true conditionals, for which the bound is tight: it equals -log p(x) for every x.
"""

import functools
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from illada_jax.config import DiffusionConfig
from illada_jax.diffusion.objective import objective
from illada_jax.diffusion.process import Corrupted, corrupt, corrupt_fixed_count
from illada_jax.diffusion.token_losses import token_losses
from tests.enumerable import (
    LENGTH,
    MASK,
    OUTCOMES,
    SYMBOLS,
    enumerated,
    exact_measure,
    make_batch,
    make_joint,
    nats_of_rows,
)


@pytest.fixture(scope="module")
def joint():
    return make_joint()


@pytest.fixture(scope="module")
def conditionals(joint):
    """Log of the true conditionals, [4, 4, 4, 4, L, V]: the first indices are the noisy tokens; MASK has none."""
    table = np.full((SYMBOLS + 1,) * LENGTH + (LENGTH, SYMBOLS + 1), -1e9, np.float32)
    for noisy in itertools.product(range(SYMBOLS + 1), repeat=LENGTH):
        fits = np.all((noisy == OUTCOMES) | (np.array(noisy) == MASK), axis=1)
        for i, v in itertools.product(range(LENGTH), range(SYMBOLS)):
            mass = joint[fits & (OUTCOMES[:, i] == v)].sum()
            if mass > 0:
                table[(*noisy, i, v)] = math.log(mass / joint[fits].sum())
    return table


def eps_measure(eps):
    """The same with p = (1-eps)·t + eps, so p uniform on [eps, 1]."""

    def measure(masked):
        polynomial = np.polynomial.Polynomial([0] * (masked - 1) + [1]) * np.polynomial.Polynomial([1, -1]) ** (
            LENGTH - masked)
        integral = polynomial.integ()
        return (integral(1) - integral(eps)) / (1 - eps)

    return measure


def test_the_bound_of_the_true_conditionals_is_the_log_likelihood(joint, conditionals):
    assert (abs(enumerated(conditionals, exact_measure) + np.log(joint)) < 1e-5).all()


def test_the_bound_of_any_other_network_is_not_below_it(joint, conditionals):
    wrong = conditionals + np.random.default_rng(1).normal(size=conditionals.shape).astype(np.float32)
    assert joint @ enumerated(wrong, exact_measure) > -joint @ np.log(joint) + 0.1


@pytest.mark.parametrize("sampling", ["uniform", "stratified"])
@pytest.mark.parametrize("eps", [1e-3, 0.1])
def test_sampled_masks_agree_with_the_enumeration_for_their_eps(conditionals, sampling, eps):
    batch = make_batch(np.tile(OUTCOMES[17], (256, 1)))
    config = DiffusionConfig(mask_id=MASK, eps=eps, time_sampling=sampling)
    estimate = jax.jit(lambda key: jnp.mean(nats_of_rows(conditionals, batch, corrupt(key, batch, config))))
    means = np.asarray([estimate(key) for key in jax.random.split(jax.random.key(0), 100)])
    expected = enumerated(conditionals, eps_measure(eps))[17]
    assert abs(means.mean() - expected) < 3 * means.std(ddof=1) / math.sqrt(len(means))


def test_fixed_counts_agree_with_the_exact_bound_and_vary_less(conditionals):
    batch = make_batch(np.tile(OUTCOMES[17], (256, 1)))
    keys = jax.random.split(jax.random.key(1), 100)
    fixed = jax.jit(lambda key: jnp.mean(nats_of_rows(
        conditionals, batch, corrupt_fixed_count(key, batch, MASK, jnp.arange(256), 256))))
    config = DiffusionConfig(mask_id=MASK, eps=1e-3, time_sampling="uniform")
    sampled = jax.jit(lambda key: jnp.mean(nats_of_rows(conditionals, batch, corrupt(key, batch, config))))
    means, others = (np.asarray([f(key) for key in keys]) for f in (fixed, sampled))
    expected = enumerated(conditionals, exact_measure)[17]
    assert abs(means.mean() - expected) < 3 * means.std(ddof=1) / math.sqrt(len(means))
    assert means.std() < 0.5 * others.std()


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("chunk", [0, 1, 2, 4, 8])
def test_chunks_change_neither_loss_nor_gradient(chunk, compact):
    """Against the naive computation: all logits, autodiff through log_softmax."""
    rng = np.random.default_rng(0)
    hidden_BLD, matrix_DV = rng.normal(size=(3, 8, 5)).astype(np.float32), rng.normal(size=(5, 11)).astype(np.float32)
    batch = make_batch(rng.integers(0, 11, (3, 8), dtype=np.int32))
    corrupted = corrupt(jax.random.key(0), batch, DiffusionConfig(mask_id=10, eps=1e-3, time_sampling="stratified"))
    masked_BL = np.asarray(corrupted.masked_BL)

    @jax.jit
    def lean(hidden_BLD, matrix_DV):
        head = lambda x: jnp.einsum("...D,DV->...V", x, matrix_DV)  # noqa: E731
        losses = functools.partial(token_losses, head, chunk=chunk, compact=compact)
        loss, sums, nats_B = objective(losses, hidden_BLD, batch, corrupted)
        return 3 * loss, (nats_B, sums)

    def naive(hidden_BLD, matrix_DV):
        log_p_BLV = jax.nn.log_softmax(jnp.einsum("BLD,DV->BLV", hidden_BLD, matrix_DV))
        ce_BL = -jnp.take_along_axis(log_p_BLV, batch.tokens_BL[..., None], -1)[..., 0]
        correct = jnp.sum((jnp.argmax(log_p_BLV, -1) == batch.tokens_BL) & masked_BL)
        nats_B = jnp.sum(jnp.where(masked_BL, ce_BL / corrupted.p_BL, 0.0), axis=1)
        return 3 * jnp.sum(nats_B) / masked_BL.size, (nats_B, correct)

    (value, (nats_B, sums)), grads = jax.value_and_grad(lean, (0, 1), has_aux=True)(hidden_BLD, matrix_DV)
    (expected, (naive_nats_B, naive_correct)), naive_grads = jax.value_and_grad(naive, (0, 1), has_aux=True)(
        hidden_BLD, matrix_DV)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(lean(hidden_BLD, matrix_DV)[0], expected, rtol=1e-5)
    np.testing.assert_allclose(sums.loss / sums.weight, expected / 3, rtol=1e-5)
    np.testing.assert_allclose(nats_B, naive_nats_B, rtol=1e-5)
    assert sums.correct == naive_correct
    chex.assert_trees_all_close(grads, naive_grads, rtol=1e-5, atol=1e-6)


def test_what_is_not_masked_is_not_computed():
    """With compact, a chunk without a masked position is left out: its (infinite) logits have no effect."""
    weights_BL = jnp.zeros((2, 8)).at[0, 3].set(2.0).at[1, 6].set(0.5)
    hidden_BLD = jnp.full((2, 8, 1), jnp.nan).at[0, 3].set(1.0).at[1, 6].set(1.0)
    head = lambda x: jnp.concatenate([x, 0 * x], -1)  # noqa: E731
    loss, ce_BL, _ = token_losses(head, hidden_BLD, jnp.zeros((2, 8), jnp.int32), weights_BL, 1, compact=True)
    expected = np.log1p(np.exp(-1.0))
    np.testing.assert_allclose(loss, 2.5 * expected, rtol=1e-6)
    np.testing.assert_allclose(ce_BL, np.where(weights_BL != 0, expected, 0), rtol=1e-6)


@pytest.mark.parametrize("compact", [False, True])
def test_the_gradient_is_finite_where_nothing_is_masked(compact):
    batch = make_batch(np.zeros((1, 4), np.int32))
    corrupted = Corrupted(batch.tokens_BL, np.zeros((1, 4), bool), np.zeros((1, 4), np.float32))
    losses = functools.partial(token_losses, lambda h: h, chunk=2, compact=compact)
    grad = jax.grad(lambda x: objective(losses, x, batch, corrupted)[0])
    assert np.isfinite(grad(jnp.ones((1, 4, 3)))).all()


def test_sums_are_those_of_a_plain_loop():
    """In all and by masking probability; where nothing may be masked, weights do not count."""
    rng = np.random.default_rng(0)
    maskable_BL, weights_BL = rng.random((4, 6)) < 0.8, rng.random((4, 6)).astype(np.float32)
    batch = make_batch(rng.integers(0, 9, (4, 6), dtype=np.int32))._replace(
        maskable_BL=maskable_BL, weights_BL=weights_BL)
    p_BL = np.array([0.05, 0.1, 0.11, 1.0], np.float32)[:, None] * np.ones((4, 6), np.float32)
    masked_BL, correct_BL = maskable_BL & (rng.random((4, 6)) < 0.6), rng.random((4, 6)) < 0.5
    ce_BL = rng.random((4, 6)).astype(np.float32)
    _, sums, _ = objective(lambda *_: (jnp.float32(0), ce_BL, correct_BL), None, batch,
                             Corrupted(batch.tokens_BL, masked_BL, p_BL))
    assert (sums.masked, sums.maskable, sums.correct) == (
        masked_BL.sum(), maskable_BL.sum(), (correct_BL & masked_BL).sum())
    np.testing.assert_allclose(sums.weight, weights_BL[maskable_BL].sum(), rtol=1e-5)
    for bucket, rows in ((0, [0, 1]), (1, [2]), (9, [3]), (5, [])):
        np.testing.assert_allclose(sums.masked_K[bucket], masked_BL[rows].sum())
        np.testing.assert_allclose(sums.ce_K[bucket], (ce_BL * masked_BL)[rows].sum(), rtol=1e-5)
        np.testing.assert_allclose(sums.correct_K[bucket], (correct_BL & masked_BL)[rows].sum())


def test_the_loss_is_a_mean_whatever_the_size_of_the_weights():
    batch = make_batch(np.zeros((2, 4), np.int32))
    corrupted = Corrupted(batch.tokens_BL, np.ones((2, 4), bool), np.ones((2, 4), np.float32))
    losses = functools.partial(token_losses, lambda h: h)
    for scale in (1.0, 1e-3, 1e3):
        scaled = batch._replace(weights_BL=scale * batch.weights_BL)
        np.testing.assert_allclose(objective(losses, jnp.ones((2, 4, 3)), scaled, corrupted)[0], math.log(3), rtol=1e-5)
