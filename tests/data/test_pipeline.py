import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from illada_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig
from illada_jax.data.batch import Batch
from illada_jax.data.corpus import Component, Corpus
from illada_jax.data.pipeline import Mixture, Pipeline, num_windows, pack
from illada_jax.data.tokenizers import ByteTokenizer
from illada_jax.errors import ConfigError, InputError

EOS, PAD = ByteTokenizer().eos_id, ByteTokenizer().pad_id


class ArrayStream:
    """A token stream in memory."""

    def __init__(self, tokens):
        self.tokens = np.asarray(tokens, np.int32)
        self.num_tokens, self.eos_id = len(tokens), EOS

    def read(self, start, stop):
        assert 0 <= start <= stop <= self.num_tokens
        return self.tokens[start:stop]


def numbered(num_tokens, first=1000):
    """A stream whose tokens are all different."""
    return ArrayStream(np.arange(first, first + num_tokens))


def make_pipeline(streams, weights=None, split=0.0, seed=0, **data):
    streams = streams if isinstance(streams, list) else [streams]
    weights = weights or [1 / len(streams)] * len(streams)
    components = tuple(Component(f"c{i}", s, w) for i, (s, w) in enumerate(zip(streams, weights, strict=True)))
    corpus = Corpus(tokenizer=ByteTokenizer(), train=streams[0], heldout=streams[0], fingerprint="fingerprint",
                    components=components)
    config = Config(data=DataConfig(**{"length": 8, "batch_size": 4} | data), seed=seed,
                    model=ModelConfig(max_length=8192), diffusion=DiffusionConfig(split_probability=split))
    return Pipeline(config, corpus)


def equal(a: Batch, b: Batch) -> bool:
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


def concatenated(batches) -> Batch:
    return Batch(*(np.concatenate(arrays) for arrays in zip(*batches, strict=True)))


EVERYTHING = {"split": 0.5, "isolate_documents": True, "random_length_probability": 0.5, "random_length_of": "row"}


@pytest.mark.parametrize("num_tokens", [32, 37, 100, 8 * 12 - 1])
def test_an_epoch_holds_every_token_once_and_the_next_one_in_another_order(num_tokens):
    pipeline = make_pipeline(numbered(num_tokens), batch_size=1)
    windows = num_windows(num_tokens, 8)
    epochs = []
    for epoch in range(2):
        batch = concatenated(pipeline.rows(step, [0]) for step in range(epoch * windows, (epoch + 1) * windows))
        epochs.append(batch.tokens_BL[batch.maskable_BL].tolist())
        assert (batch.tokens_BL[~batch.maskable_BL] == PAD).all()
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(1000, 1000 + num_tokens))
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])


@pytest.mark.parametrize("extras", [{}, EVERYTHING, EVERYTHING | {"random_length_of": "batch"}])
def test_shares_of_hosts_are_the_same_rows_in_the_same_order(extras):
    streams = [numbered(1000), numbered(400, 3000)]
    pipeline = make_pipeline(streams, [0.75, 0.25], batch_size=8, **extras)
    whole = {step: pipeline.rows(step, range(8)) for step in (3, 0, 17, 1)}
    for hosts in (1, 2, 4):
        for step in (17, 0, 1, 3):
            shares = [make_pipeline(streams, [0.75, 0.25], batch_size=8, **extras).rows(step, rows)
                      for rows in np.split(np.arange(8), hosts)]
            assert equal(concatenated(shares), whole[step])
    assert equal(pipeline.rows(3, [6, 1]), Batch(*(x[[6, 1]] for x in whole[3])))
    assert not np.array_equal(whole[0].tokens_BL, whole[1].tokens_BL)


@pytest.mark.parametrize("start", [0, 5])
def test_iterating_is_asking_step_by_step(start):
    pipeline = make_pipeline(numbered(500), **EVERYTHING)
    for n, batch in enumerate(itertools.islice(pipeline.iterate(start, np.array([1, 3])), 20)):
        assert equal(batch, pipeline.rows(start + n, [1, 3]))


def test_the_seed_decides_the_order():
    first, same, other = (make_pipeline(numbered(500), seed=seed, **EVERYTHING).rows(0, range(4)) for seed in (1, 1, 2))
    assert equal(first, same) and not equal(first, other)


def test_every_corpus_has_an_order_of_its_own_that_follows_the_seed():
    def firsts(seed):
        rows = make_pipeline([numbered(800), numbered(800, 3000)], seed=seed, batch_size=50).rows(0, range(50))
        tokens = rows.tokens_BL[:, 0]
        return tokens[tokens < 3000].tolist(), (tokens[tokens >= 3000] - 2000).tolist()

    orders = [*firsts(1), *firsts(2)]
    assert all(a != b for a, b in itertools.combinations(orders, 2))


def test_rows_without_extras_are_one_segment():
    batch = make_pipeline(numbered(64)).rows(0, range(4))
    assert batch.maskable_BL.all() and (batch.segments_BL == 1).all() and (batch.weights_BL == 1).all()
    assert (batch.positions_BL == np.arange(8)).all()
    assert [x.dtype for x in batch] == [np.int32, bool, np.int32, np.int32, np.float32]


def naive_pack(windows, length, starts):
    """Segments and positions of each token, one by one."""
    segments, positions = np.zeros((2, len(windows), length), np.int32)
    for row, window in enumerate(windows):
        segment, position = 0, 0
        for column in range(len(window)):
            if column == 0 or column in starts[row]:
                segment, position = segment + 1, 0
            segments[row, column], positions[row, column] = segment, position
            position += 1
    return segments, positions


@given(st.lists(st.tuples(st.integers(1, 9), st.sets(st.integers(1, 8))), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_packing_is_what_the_naive_one_says(rows):
    windows = [np.arange(10, 10 + used, dtype=np.int32) for used, _ in rows]
    starts = [sorted(c for c in columns if c < used) for used, columns in rows]
    batch = pack(windows, 9, PAD, starts)
    segments, positions = naive_pack(windows, 9, starts)
    assert np.array_equal(batch.segments_BL, segments) and np.array_equal(batch.positions_BL, positions)
    assert np.array_equal(batch.maskable_BL, segments > 0) and np.array_equal(batch.weights_BL, segments > 0)
    for row, window in enumerate(windows):
        assert batch.tokens_BL[row].tolist() == [*window, *[PAD] * (9 - len(window))]


def test_isolated_documents_are_segments():
    stream = ArrayStream([10, 11, EOS, 12, EOS, 13, 14, EOS, 15, 16, 17, 18, EOS, EOS, 19, 20])
    batch = make_pipeline(stream, batch_size=2, isolate_documents=True).heldout_windows(stream, 8, 0)
    assert batch.segments_BL.tolist() == [[1, 1, 1, 2, 2, 3, 3, 3], [1, 1, 1, 1, 1, 2, 3, 3]]
    assert batch.positions_BL.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 0, 0, 1]]


def test_splits_have_their_probability_and_uniform_cuts():
    pipeline = make_pipeline(numbered(8000), split=0.3, batch_size=50)
    batch = concatenated(pipeline.rows(step, range(50)) for step in range(80))
    split = batch.segments_BL.max(axis=1) == 2
    assert abs(split.mean() - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5
    cuts = np.bincount((batch.segments_BL[split] == 1).sum(axis=1), minlength=9)
    assert cuts[0] == cuts[8] == 0
    assert (abs(cuts[1:8] - split.sum() / 7) < 5 * (split.sum() / 7) ** 0.5).all()
    row = np.flatnonzero(split)[0]
    cut = (batch.segments_BL[row] == 1).sum()
    assert batch.positions_BL[row].tolist() == [*range(cut), *range(8 - cut)]


def test_splits_do_not_depend_on_cuts():
    """Half of the rows are cut short, half are split, so half of those that are not cut."""
    pipeline = make_pipeline(numbered(8000), split=0.5, batch_size=50, random_length_probability=0.5,
                             random_length_of="row")
    batch = concatenated(pipeline.rows(step, range(50)) for step in range(20))
    whole = batch.maskable_BL.all(axis=1)
    assert abs((batch.segments_BL[whole].max(axis=1) == 2).mean() - 0.5) < 4 * 0.5 / whole.sum() ** 0.5


def test_windows_of_one_token_are_never_split():
    assert (make_pipeline(numbered(10), split=1.0, length=1).rows(0, range(4)).segments_BL == 1).all()


@pytest.mark.parametrize("unit", ["batch", "row"])
def test_random_lengths(unit):
    pipeline = make_pipeline(numbered(8000), batch_size=50, random_length_probability=0.5, random_length_of=unit)
    lengths = np.array([pipeline.rows(step, range(50)).maskable_BL.sum(axis=1) for step in range(200)])
    one_for_all = (lengths == lengths[:, :1]).all(axis=1)
    assert one_for_all.all() if unit == "batch" else not one_for_all.any()
    drawn = lengths[:, 0]
    counts = np.bincount(drawn, minlength=9)
    assert counts[0] == 0 and (counts[1:8] > 0).all()
    assert abs((drawn == 8).mean() - (0.5 + 0.5 / 8)) < 4 * 0.5 / 200**0.5
    batch = pipeline.rows(int(np.argmin(drawn)), range(50))
    assert batch.tokens_BL.shape == (50, 8) and (batch.tokens_BL[~batch.maskable_BL] == PAD).all()


def test_a_mixture_hits_its_weights_and_goes_through_every_corpus():
    streams = [numbered(800, 1000), numbered(80, 10_000), numbered(8000, 100_000)]
    pipeline = make_pipeline(streams, [0.5, 0.3, 0.2], batch_size=10)
    batch = concatenated(pipeline.rows(step, range(10)) for step in range(100))
    origin = np.digitize(batch.tokens_BL[:, 0], [5000, 50_000])
    counts = np.bincount(origin)
    assert (abs(counts - [500, 300, 200]) <= 1).all()
    windows = np.array([100, 10, 1000])
    assert list(pipeline.epochs(100).values()) == pytest.approx(list(counts / windows))
    small = np.sort(batch.tokens_BL[origin == 1][:290].reshape(29, 80), axis=1)
    assert (small == np.arange(10_000, 10_080)).all()


@given(st.lists(st.floats(1e-4, 1), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_mixtures_are_exact_at_any_point(weights):
    mixture, seen = Mixture(weights), [0] * len(weights)
    for k in range(300):
        assert mixture.counts(k) == seen
        component, nth = mixture.place(k)
        assert nth == seen[component]
        seen[component] += 1
    far = 10**12
    for count, weight in zip(mixture.counts(far), weights, strict=True):
        assert abs(count / far - weight / sum(weights)) < 1e-9
    for component, nth in map(mixture.place, range(far, far + 5)):
        assert nth in (mixture.counts(far)[component] + i for i in range(5))


def test_heldout_windows():
    pipeline, stream = make_pipeline(numbered(64)), numbered(35)
    everything = pipeline.heldout_windows(stream, 8, 0)
    assert everything.tokens_BL[everything.maskable_BL].tolist() == list(range(1000, 1035))
    assert everything.tokens_BL.shape == (5, 8)
    some = pipeline.heldout_windows(stream, 8, 2)
    assert some.tokens_BL[:, 0].tolist() == [1000, 1016]
    assert equal(pipeline.heldout_windows(stream, 8, 99), everything)


def test_nothing_held_out():
    with pytest.raises(InputError, match="nothing is held out"):
        make_pipeline(numbered(64)).heldout_windows(ArrayStream([]), 8, 0)


def test_corpus_too_small_for_one_batch():
    with pytest.raises(InputError, match=r"corpus c1: 24 training tokens are 3 windows .*fewer than the rows"):
        make_pipeline([numbered(64), numbered(24)])


@pytest.mark.parametrize(("values", "message"), [
    ({"weights": (0.5, 0.6)}, r"config\.data\.weights = \(0\.5, 0\.6\): must be greater than 0 and sum to 1"),
    ({"weights": (1.5, -0.5)}, r"config\.data\.weights = \(1\.5, -0\.5\): must be greater than 0"),
    ({"weights": (1.0,)}, "needs a weight for each of the 2 sources"),
    ({"heldout_fraction": 1.0}, "heldout_fraction"),
    ({"random_length_probability": 1.5}, r"must lie in \[0, 1\]"),
])
def test_bad_settings(values, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(sources=("prepared:a", "prepared:b"), **values)


def test_bad_split_probability():
    with pytest.raises(ConfigError, match=r"config\.diffusion\.split_probability = -0\.1: must lie in \[0, 1\]"):
        dataclasses.replace(DiffusionConfig(), split_probability=-0.1)
