"""Given times and masks, loss and gradients do not depend on accumulation, devices or neighbours; nor do the masks."""

import functools

import jax
import numpy as np
import pytest

from illada_jax.config import Config, DiffusionConfig, from_dict, to_dict
from illada_jax.data.batch import Batch
from illada_jax.diffusion.process import Corrupted, corrupt
from illada_jax.parallel.mesh import make_mesh, use_mesh
from illada_jax.parallel.sharding import batch_sharding
from illada_jax.training.step import abstract_state, loss_gradients, make_init, make_train_step
from tests.util import random_params

ROWS, LENGTH, VOCABULARY, MASK = 32, 24, 48, 47


def make_config(microbatches=1) -> Config:
    values = to_dict(Config())
    values["model"] |= {"vocab_size": VOCABULARY, "d_model": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
                        "head_dim": 8, "d_ff": 24, "max_length": LENGTH}
    values["data"] |= {"length": LENGTH, "batch_size": ROWS}
    values["diffusion"] |= {"mask_id": MASK}
    values["train"] |= {"microbatches": microbatches, "logits_chunk": 4}
    return from_dict(values)


def make_batch() -> Batch:
    """Rows of one to three segments, some with padding, and weights that differ."""
    rng = np.random.default_rng(0)
    segments_BL = np.sort(rng.integers(1, 4, (ROWS, LENGTH)), axis=1)
    used_B = rng.integers(LENGTH // 2, LENGTH + 1, ROWS)
    segments_BL = np.where(np.arange(LENGTH) < used_B[:, None], segments_BL, 0).astype(np.int32)
    positions_BL = np.stack([np.arange(LENGTH) - np.searchsorted(row[:used], row) * (row > 0)
                             for row, used in zip(segments_BL, used_B, strict=True)]).astype(np.int32)
    real_BL = segments_BL > 0
    return Batch(rng.integers(0, MASK, (ROWS, LENGTH), dtype=np.int32), real_BL, segments_BL,
                 np.where(real_BL, positions_BL, 0).astype(np.int32),
                 (real_BL * rng.uniform(0.5, 2, (ROWS, 1))).astype(np.float32))


def make_corrupted(batch: Batch) -> Corrupted:
    """One time per segment, as a plain loop."""
    rng = np.random.default_rng(1)
    p_BL = np.ones(batch.tokens_BL.shape, np.float32)
    for row, segment in {(r, s) for r in range(ROWS) for s in batch.segments_BL[r] if s}:
        p_BL[row, batch.segments_BL[row] == segment] = rng.uniform(0.05, 1)
    masked_BL = (rng.random(p_BL.shape) < p_BL) & batch.maskable_BL
    return Corrupted(np.where(masked_BL, MASK, batch.tokens_BL), masked_BL, p_BL)


@functools.cache
def gradients_function(config, mesh):
    """One function per config and mesh: compiled once for all batches."""
    return jax.jit(functools.partial(loss_gradients, config, mesh))


def loss_and_gradients(params, batch, corrupted, num_devices=1, microbatches=1):
    config = make_config(microbatches)
    mesh = make_mesh(config.mesh, jax.devices()[:num_devices])
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh)).params
    with use_mesh(mesh):
        f = gradients_function(config, mesh)
        rows = jax.device_put((batch, corrupted), batch_sharding(mesh))
        gradients, sums = f(jax.device_put(params, shardings), *rows)
    return jax.device_get((sums.loss / sums.weight, gradients))


def assert_equal(a, b):
    """To 1e-6: the loss relatively, gradients absolutely, whose entries go up to a few tenths."""
    (loss, gradients), (other_loss, other_gradients) = a, b
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    assert max(np.abs(x).max() for x in jax.tree.leaves(gradients)) > 0.2
    jax.tree.map(lambda x, y: np.testing.assert_allclose(y, x, rtol=0, atol=1e-6), gradients, other_gradients)


@pytest.fixture(scope="module")
def params():
    return random_params(make_config().model)


@pytest.fixture(scope="module")
def expected(params):
    """In one part, on one device."""
    batch = make_batch()
    return loss_and_gradients(params, batch, make_corrupted(batch))


@pytest.mark.parametrize(("num_devices", "microbatches"), [(1, 2), (1, 4), (8, 1), (8, 4)])
def test_accumulation_and_devices_change_nothing(params, expected, num_devices, microbatches):
    batch = make_batch()
    assert_equal(expected, loss_and_gradients(params, batch, make_corrupted(batch), num_devices, microbatches))


def test_a_segment_packed_beside_others_is_as_alone(params):
    """The second segment of every row, the others of weight 0, against the same tokens at the start of empty rows."""
    batch = make_batch()
    corrupted = make_corrupted(batch)
    chosen_BL = batch.segments_BL == 2
    packed = batch._replace(weights_BL=np.where(chosen_BL, batch.weights_BL, 0).astype(np.float32))
    order_BL = np.argsort(~chosen_BL, axis=1, kind="stable")
    moved = [np.where(np.take_along_axis(chosen_BL, order_BL, 1), np.take_along_axis(x, order_BL, 1), 0).astype(x.dtype)
             for x in (*batch, *corrupted)]
    alone, alone_corrupted = Batch(*moved[:5]), Corrupted(*moved[5:])
    assert (alone.positions_BL.max(axis=1) == np.maximum(chosen_BL.sum(axis=1) - 1, 0)).all()
    assert_equal(loss_and_gradients(params, packed, corrupted), loss_and_gradients(params, alone, alone_corrupted))


def test_rows_do_not_depend_on_the_rows_beside_them(params, expected):
    batch = make_batch()
    order = np.random.default_rng(2).permutation(ROWS)
    shuffled, corrupted = jax.tree.map(lambda x: x[order], (batch, make_corrupted(batch)))
    assert_equal(expected, loss_and_gradients(params, shuffled, corrupted))


@pytest.mark.parametrize("sampling", ["stratified", "uniform"])
def test_masks_do_not_depend_on_the_devices(sampling):
    batch, config = make_batch(), DiffusionConfig(mask_id=MASK, eps=1e-3, time_sampling=sampling)
    f = jax.jit(functools.partial(corrupt, config=config))
    one, *others = (f(jax.random.key(0), jax.device_put(batch, batch_sharding(make_mesh(Config().mesh, devices))))
                    for devices in (jax.devices()[:1], jax.devices()[:2], jax.devices()))
    assert 0.3 < np.mean(one.masked_BL) < 0.7
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_the_step_masks_the_same_for_any_devices_and_accumulation():
    """Counts of masked tokens by tenth of the masking probability are the same for any mesh and micro-batches."""
    counts = []
    for num_devices, microbatches in ((1, 1), (8, 4)):
        config = make_config(microbatches)
        mesh = make_mesh(config.mesh, jax.devices()[:num_devices])
        with use_mesh(mesh):
            _, metrics = make_train_step(config, mesh)(
                make_init(config, mesh)(), jax.device_put(make_batch(), batch_sharding(mesh)))
        counts.append(np.asarray(metrics.sums.masked_K))
    np.testing.assert_array_equal(*counts)
