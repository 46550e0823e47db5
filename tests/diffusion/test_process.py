"""Times, masks and counts: their distributions and independences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from illada_jax.config import DiffusionConfig
from illada_jax.data.batch import Batch
from illada_jax.diffusion.process import (
    corrupt,
    corrupt_fixed_count,
    sample_times,
    stratified_ranks,
    stratified_times,
)

MASK = 99


def make_batch(batch_size=8, length=16, segments_BL=None, maskable_BL=None):
    shape = (batch_size, length)
    return Batch(
        tokens_BL=np.arange(batch_size * length, dtype=np.int32).reshape(shape) % 90,
        maskable_BL=np.ones(shape, bool) if maskable_BL is None else maskable_BL,
        segments_BL=np.ones(shape, np.int32) if segments_BL is None else segments_BL,
        positions_BL=np.tile(np.arange(length, dtype=np.int32), (batch_size, 1)),
        weights_BL=np.ones(shape, np.float32),
    )


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 12, 64])
def test_times_hit_every_stratum_once(batch_size):
    times_B = np.asarray(stratified_times(jax.random.key(3), batch_size))
    assert ((times_B >= 0) & (times_B < 1)).all()
    gaps = np.diff(np.sort(times_B))
    np.testing.assert_allclose(gaps, 1 / batch_size, atol=1e-6)


@pytest.mark.parametrize("batch_size", [12, 48, 64])
def test_every_aligned_slice_is_stratified_too(batch_size):
    ranks = stratified_ranks(batch_size)
    for size in (2, 4, 8, 16, 32):
        for start in range(0, batch_size, size) if batch_size % size == 0 else ():
            strata = ranks[start : start + size] * size // batch_size
            assert sorted(strata) == list(range(size))


def test_each_time_is_uniform_by_itself():
    times_KB = jax.vmap(lambda k: stratified_times(k, 4))(jax.random.split(jax.random.key(0), 4000))
    for row in range(4):
        counts, _ = np.histogram(np.asarray(times_KB[:, row]), bins=10, range=(0, 1))
        assert (np.abs(counts - 400) < 5 * 400**0.5).all()


@pytest.mark.parametrize("sampling", ["stratified", "uniform"])
def test_a_segment_has_one_time_and_segments_differ(sampling):
    segments_BL = np.array([[1, 1, 1, 2, 2, 3, 0, 0]] * 4, np.int32)
    times_BL = np.asarray(sample_times(jax.random.key(0), segments_BL, sampling))
    for row in times_BL:
        assert len(set(row[:3])) == len(set(row[3:5])) == 1
        assert len({row[0], row[3], row[5]}) == 3
    assert len(set(times_BL[:, 0])) == 4


def test_further_segments_are_a_golden_ratio_apart():
    segments_BL = np.array([[1, 2, 3, 4]] * 8, np.int32)
    times_BL = np.asarray(sample_times(jax.random.key(1), segments_BL, "stratified"))
    np.testing.assert_array_equal(times_BL[:, 0], stratified_times(jax.random.key(1), 8))
    np.testing.assert_allclose(np.diff(times_BL, axis=1) % 1, (5**0.5 - 1) / 2, atol=1e-6)


def test_masks_follow_their_probability_and_spare_what_is_not_maskable():
    maskable_BL = np.ones((64, 512), bool)
    maskable_BL[:, :100] = False
    batch = make_batch(64, 512, maskable_BL=maskable_BL)
    out = corrupt(jax.random.key(0), batch, DiffusionConfig(mask_id=MASK, eps=1e-3, time_sampling="stratified"))
    masked_BL, p_BL = np.asarray(out.masked_BL), np.asarray(out.p_BL)
    assert not masked_BL[:, :100].any()
    np.testing.assert_array_equal(np.asarray(out.noisy_BL), np.where(masked_BL, MASK, batch.tokens_BL))
    share_B, p_B = masked_BL[:, 100:].mean(axis=1), p_BL[:, 0]
    assert (np.abs(share_B - p_B) < 5 * np.sqrt(p_B * (1 - p_B) / 412) + 1e-3).all()
    assert p_BL.min() >= 1e-3
    assert p_BL.max() <= 1


def test_a_row_is_corrupted_the_same_whatever_the_length_of_the_batch_of_masks():
    """Masks depend on (key, row), not on how many rows there are."""
    config = DiffusionConfig(mask_id=MASK, eps=0.0, time_sampling="uniform")
    small, large = (corrupt(jax.random.key(5), make_batch(n), config) for n in (4, 8))
    np.testing.assert_array_equal(small.masked_BL, large.masked_BL[:4])


def test_fixed_counts_are_uniform_exact_and_without_replacement():
    maskable_BL = np.ones((16, 10), bool)
    maskable_BL[:, [0, 4, 9]] = False
    maskable_BL[3] = False
    batch = make_batch(16, 10, maskable_BL=maskable_BL)
    draw = jax.jit(lambda key: corrupt_fixed_count(key, batch, MASK, jnp.arange(16), 16))
    counts = np.zeros(8)
    for key in jax.random.split(jax.random.key(0), 100):
        out = draw(key)
        count_B = np.asarray(out.masked_BL).sum(axis=1)
        assert count_B[3] == 0
        assert not (np.asarray(out.masked_BL) & ~maskable_BL).any()
        kept = np.arange(16) != 3
        np.testing.assert_allclose(np.asarray(out.p_BL)[kept, 0], count_B[kept] / 7, rtol=1e-6)
        counts += np.bincount(count_B[kept], minlength=8)
    assert counts[0] == 0
    assert (np.abs(counts[1:] / 1500 - 1 / 7) < 0.02).all()


def test_no_probability_is_outside_the_unit_interval_at_eps_zero():
    out = corrupt(jax.random.key(0), make_batch(), DiffusionConfig(mask_id=MASK, eps=0.0, time_sampling="stratified"))
    assert bool(jnp.all((out.p_BL >= 0) & (out.p_BL < 1)))
