"""Both scorers against naive loops; a score depends only on its own pair."""

import dataclasses
import functools
import itertools
import math

import jax
import numpy as np
import pytest

from illada_jax import model
from illada_jax.config import MeshConfig
from illada_jax.errors import InputError
from illada_jax.parallel.mesh import make_mesh
from illada_jax.parallel.sharding import param_shardings
from illada_jax.scoring import ScoreConfig, Scorer
from illada_jax.scoring import log_probs as log_prob_queries
from illada_jax.scoring.log_probs import Query, log_softmax_at
from illada_jax.scoring.monte_carlo import hidden_columns, replicate_sizes
from tests import reference_model
from tests import reference_scoring as reference
from tests.decoding.toys import IDS, TRANSFORMER, network_of, transformer
from tests.util import random_params

NEAR = 1e-5
# Rows of at most 16 columns: the tests compile for few lengths.
PAIRS = [(list(rng.integers(4, 11, rng.integers(0, 7))), list(rng.integers(4, 11, rng.integers(1, 8))))
         for rng in map(np.random.default_rng, range(24))]
SETTINGS = {
    "plain": {}, "bos": {"bos": True}, "eos": {"eos": True}, "bos, eos, guidance": {"bos": True, "eos": True,
                                                                                    "cfg_scale": 0.5}}


@pytest.fixture(scope="module")
def networks():
    return transformer()


def scorer(logits_fn, **settings):
    return Scorer(logits_fn, ScoreConfig(**settings), IDS, TRANSFORMER.max_length)


def draws_of(context, candidate, mc_num, seed, bos=False, eos=False, **_):
    row, columns = reference.layout(context, candidate, IDS, bos, eos)
    return hidden_columns(Query(np.array(row, np.int32), np.array(columns), columns[0]), mc_num, seed)


@pytest.mark.parametrize("name", SETTINGS)
def test_confidence_equals_the_naive_loop(networks, name):
    logits_fn, network = networks
    scores = scorer(logits_fn, **SETTINGS[name]).score(PAIRS)
    near_ties = 0
    for (context, candidate), score in zip(PAIRS, scores, strict=True):
        value, _, closest = reference.confidence(network, context, candidate, IDS, **SETTINGS[name])
        near_ties += closest < NEAR
        assert closest < NEAR or abs(score.value - value) < 1e-5
        assert (score.length, score.stderr) == (len(candidate), 0)
    assert near_ties <= 1


@pytest.mark.parametrize("name", SETTINGS)
def test_monte_carlo_equals_the_naive_loop(networks, name):
    logits_fn, network = networks
    scores = scorer(logits_fn, method="monte_carlo", mc_num=11, seed=3, **SETTINGS[name]).score(PAIRS[:8])
    sizes = replicate_sizes(11)
    for (context, candidate), score in zip(PAIRS[:8], scores, strict=True):
        draws = draws_of(context, candidate, 11, 3, **SETTINGS[name])
        ends = np.cumsum([0, *sizes])
        means = [reference.monte_carlo(network, context, candidate, IDS, draws[start:end], **SETTINGS[name])
                 for start, end in itertools.pairwise(ends)]
        assert abs(score.value - np.mean(means)) < 1e-5 * abs(score.value)
        if len(candidate) > 1:
            assert abs(score.stderr - np.std(means, ddof=1) / math.sqrt(len(means))) < 1e-4


def test_one_draw_has_no_error_and_one_token_is_exact(networks):
    logits_fn, network = networks
    one_draw = scorer(logits_fn, method="monte_carlo", mc_num=1).score([PAIRS[3], ([5, 6], [7])])
    many = scorer(logits_fn, method="monte_carlo", mc_num=128)
    exact = many.score([([5, 6], [7])])[0]
    assert math.isnan(one_draw[0].stderr) and one_draw[1].stderr == 0 and exact.stderr == 0
    assert many.evaluator.evaluations == 1
    value, _, _ = reference.confidence(network, [5, 6], [7], IDS)
    assert abs(exact.value - value) < 1e-5 and abs(one_draw[1].value - value) < 1e-5


@pytest.mark.parametrize("settings", [{}, {"method": "monte_carlo", "mc_num": 6}, {"eos": True, "cfg_scale": 1.0}])
def test_alone_or_in_a_batch(networks, settings):
    """Batch size, order and other pairs change nothing; two runs of one batch are equal bit for bit."""
    logits_fn, network = networks
    alone = [scorer(logits_fn, batch_size=1, **settings).score([pair])[0] for pair in PAIRS]
    batched = scorer(logits_fn, batch_size=8, **settings).score(PAIRS)
    assert scorer(logits_fn, batch_size=8, **settings).score(PAIRS) == batched
    shuffled = np.random.default_rng(1).permutation(len(PAIRS))
    reordered = scorer(logits_fn, batch_size=2, **settings).score([PAIRS[i] for i in shuffled])
    back = [reordered[i] for i in np.argsort(shuffled)]
    near_ties = 0
    for pair, one, two, three in zip(PAIRS, alone, batched, back, strict=True):
        if not np.allclose([two.value, three.value], one.value, atol=1e-5, rtol=1e-6):
            assert "method" not in settings
            assert reference.confidence(network, *pair, IDS, **settings)[2] < NEAR
            near_ties += 1
    assert near_ties <= 1 and len({score.value for score in alone}) == len(PAIRS)


def cached(logits_fn, **settings):
    return Scorer(logits_fn, ScoreConfig(context_cache=True, **settings), IDS, TRANSFORMER.max_length,
                  init_cache=model.make_init_cache(TRANSFORMER))


def behind_a_context(start):
    """A naive network that has evaluated the first `start` columns once, alone."""
    evaluate = functools.partial(reference_model.evaluate, TRANSFORMER, random_params(TRANSFORMER, seed=0))

    def network(canvas):
        kept = evaluate(canvas[:start], range(start), [])[1]
        logits_TV, _ = evaluate(canvas[start:], range(start, len(canvas)), kept)
        return np.concatenate([np.zeros((start, logits_TV.shape[1])), logits_TV]).astype(np.float32)

    return network


@pytest.mark.parametrize("name", ["plain", "bos, eos, guidance"])
def test_with_a_cached_context_both_equal_the_naive_rule(networks, name):
    settings = SETTINGS[name]
    scores = cached(networks[0], **settings).score(PAIRS[:8])
    sampled = cached(networks[0], method="monte_carlo", mc_num=3, **settings).score(PAIRS[:8])
    for (context, candidate), score, estimate in zip(PAIRS, scores, sampled, strict=False):
        network = behind_a_context(len(context) + settings.get("bos", False))
        value, _, closest = reference.confidence(network, context, candidate, IDS, **settings)
        assert closest < NEAR or abs(score.value - value) < 1e-4
        draws = draws_of(context, candidate, 3, 0, **settings)
        assert abs(estimate.value - reference.monte_carlo(network, context, candidate, IDS, draws, **settings)) < 1e-4


@pytest.mark.parametrize("settings", [{}, {"method": "monte_carlo", "mc_num": 3, "cfg_scale": 0.5}])
def test_a_context_is_evaluated_once_and_alone(networks, settings):
    """Each of 10 contexts once for all its candidates and steps, though fewer are remembered; scores as when alone."""
    pairs = [(context, candidate) for context, _ in PAIRS[1:11] for _, candidate in PAIRS[:4]]
    passes, contexts = 2 if "cfg_scale" in settings else 1, []

    def counted(tokens_BT, positions_BT, segments_BT, query_columns_BQ, cache):
        if cache is not None and cache.writes:
            jax.debug.callback(contexts.append, len(tokens_BT))
        return networks[0](tokens_BT, positions_BT, segments_BT, query_columns_BQ, cache)

    together = cached(jax.tree_util.Partial(counted), batch_size=4, **settings)
    scores = together.score(pairs)
    jax.effects_barrier()
    assert contexts == [passes] * len({tuple(context) for context, _ in pairs if context})
    for pair, score in list(zip(pairs, scores, strict=True))[::5]:
        assert np.isclose(cached(networks[0], batch_size=1, **settings).score([pair])[0].value, score.value, atol=1e-5)
    questions = [pairs[first : first + 4] for first in range(0, len(pairs), 4)]
    best = [int(np.argmax([score.value for score in scores[first : first + 4]])) for first in range(0, len(pairs), 4)]
    assert cached(networks[0], batch_size=4, **settings).choose(questions) == best


def test_a_network_without_a_cache_cannot_keep_contexts(networks):
    with pytest.raises(InputError, match=r"config.score.context_cache = True: this network has no cache"):
        scorer(networks[0], context_cache=True)


def test_equal_inputs_are_evaluated_once(networks):
    logits_fn, _ = networks
    for cfg_scale, evaluations in ((0.0, 1), (1.0, 2)):
        answers = scorer(logits_fn, cfg_scale=cfg_scale)
        answers.score([([4, 5, 6], [token]) for token in range(4, 11)])
        assert answers.evaluator.evaluations == evaluations
    # The first token is shared by all: its column is the same, and so is what is revealed first or what is hidden.
    many = scorer(logits_fn)
    many.score([([4, 5, 6], [7, 8, last]) for last in (4, 5, 6)])
    assert many.evaluator.evaluations < 9


def test_guidance_hides_the_context_of_each_pair(networks):
    """Here the same row, with the same column hidden, has contexts of two lengths."""
    pairs = [([4], [5, 6]), ([4], [5, 7]), ([4, 5], [6]), ([4, 5], [7])]
    for settings in ({}, {"method": "monte_carlo", "mc_num": 4}):
        guided = scorer(networks[0], cfg_scale=1.0, **settings)
        together, alone = guided.score(pairs), [guided.score([pair])[0] for pair in pairs]
        np.testing.assert_allclose([score.value for score in together], [score.value for score in alone], atol=1e-5)


def test_shapes_are_few(networks):
    logits_fn, _ = networks
    log_prob_queries.token_log_probs.clear_cache()
    for count in (1, 5, 11, 24):
        scorer(logits_fn, batch_size=4).score(PAIRS[:count])
    # Two lengths (8, 16), three batch sizes, and one, two or four candidates to a row where rows are shared.
    assert log_prob_queries.token_log_probs._cache_size() <= 2 * 3 * 3


@pytest.mark.parametrize("batch_size, max_columns, sizes", [(8, 1024, {1, 2, 4, 8}), (3, 1024, {1, 2}),
                                                            (8, 32, {1, 2, 4})])
def test_no_row_is_padding_and_batches_have_their_limits(networks, monkeypatch, batch_size, max_columns, sizes):
    """Limits of rows and of queried columns, of which each row has eight."""
    logits_fn, _ = networks
    answers, rows, run = scorer(logits_fn, batch_size=batch_size), [], log_prob_queries.token_log_probs
    monkeypatch.setattr(log_prob_queries, "_MAX_QUERIED_COLUMNS", max_columns)

    def counted(logits_fn, tokens_BL, *arrays, **settings):
        rows.append(len(tokens_BL))
        return run(logits_fn, tokens_BL, *arrays, **settings)

    monkeypatch.setattr(log_prob_queries, "token_log_probs", counted)
    answers.score([pair for pair in PAIRS if len(pair[1]) > 2][:13])
    assert sum(rows) == answers.evaluator.evaluations and set(rows) == sizes


def test_reveal_several_at_a_time(networks):
    """One evaluation for each step of k tokens; all at once is the sum of independent log-probabilities."""
    logits_fn, network = networks
    context, candidate = PAIRS[5]
    for count in (2, 3, len(candidate)):
        several = scorer(logits_fn, tokens_per_step=count)
        value = several.score([(context, candidate)])[0].value
        assert several.evaluator.evaluations == -(-len(candidate) // count)
    everything = list(range(len(context), len(context) + len(candidate)))
    assert abs(value - reference.monte_carlo(network, context, candidate, IDS, [everything])) < 1e-4


@pytest.mark.parametrize("divided", [False, True])
def test_choose_finds_the_best_with_fewer_evaluations(networks, divided):
    logits_fn, _ = networks
    questions = [[(PAIRS[start][0], PAIRS[start + i][1]) for i in range(4)] for start in range(0, 24, 4)]
    divisors = [[len(pair[1]) for pair in pairs] for pairs in questions] if divided else None
    choosing, scoring = scorer(logits_fn), scorer(logits_fn)
    chosen = choosing.choose(questions, divisors)
    flat = iter(scoring.score([pair for pairs in questions for pair in pairs]))
    values = [[next(flat).value / (len(pair[1]) if divided else 1) for pair in pairs] for pairs in questions]
    assert chosen == [int(np.argmax(group)) for group in values]
    assert choosing.evaluator.evaluations < scoring.evaluator.evaluations
    for settings in ({"method": "monte_carlo", "mc_num": 4, "seed": 3}, {"tokens_per_step": 3}):
        other = scorer(logits_fn, **settings)
        flat = iter(other.score([pair for pairs in questions for pair in pairs]))
        values = [[next(flat).value / (len(pair[1]) if divided else 1) for pair in pairs] for pairs in questions]
        assert other.choose(questions, divisors) == [int(np.argmax(group)) for group in values]


def test_of_equal_candidates_the_first_is_chosen(networks):
    same = [([4, 5], [6, 7, 8])] * 3
    assert scorer(networks[0]).choose([same]) == [0]


def test_greedy_is_what_decoding_writes(networks):
    logits_fn, network = networks
    found = 0
    for seed in range(40):
        context = list(np.random.default_rng(seed).integers(4, 11, 5))
        written = reference.greedy(network, context, 3, IDS)
        if IDS.mask in written or max(written) >= IDS.vocab_size:
            continue
        other = [*written[:-1], 4 + (written[-1] - 3) % 7]
        scores = scorer(logits_fn).score([(context, written), (context, other)])
        assert [score.greedy for score in scores] == [True, False]
        found += 1
    assert found >= 3


def test_on_many_devices():
    config = dataclasses.replace(TRANSFORMER, num_kv_heads=2)
    params = random_params(config)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    spread = jax.device_put(params, param_shardings(mesh, model.param_axes(config)))
    one = Scorer(model.make_logits_fn(config, params), ScoreConfig(), IDS, 96).score(PAIRS[:6])
    many = Scorer(model.make_logits_fn(config, spread), ScoreConfig(), IDS, 96, mesh).score(PAIRS[:6])
    network = network_of(config, params)
    for pair, first, second in zip(PAIRS, one, many, strict=False):
        assert abs(first.value - second.value) < 1e-4 or reference.confidence(network, *pair, IDS)[2] < NEAR


def test_log_probabilities_do_not_saturate():
    """Float32 softmax is exactly 1 beyond a margin of 17; here the order of sure positions survives."""
    logits = np.array([[[30.0, 0, -5], [40, 0, -5], [0, 90, 1], [7, 7, 7]]], np.float32)
    targets = np.array([[[0, 1], [0, 2], [1, 0], [0, 2]]], np.int32)
    found, best = log_softmax_at(logits, targets)
    double = logits.astype(np.float64)
    exact = np.take_along_axis(double, targets, axis=-1) - np.logaddexp.reduce(double, axis=-1, keepdims=True)
    np.testing.assert_allclose(found[0, :, 1], exact[0, :, 1], rtol=1e-6)
    for column, others in ((0, [-30, -35]), (1, [-40, -45]), (2, [-90, -89])):
        expected = -math.log1p(sum(map(math.exp, others)))
        assert found[0, column, 0] == pytest.approx(expected, rel=1e-5) and expected < 0
    assert best[0, 3] == pytest.approx(-math.log(3)) and found[0, 3, 0] == pytest.approx(-math.log(3))


def test_masks_of_monte_carlo():
    """Counts are stratified, positions uniform, candidates of one context share masks and others do not."""
    def columns(context, length, mc_num=64, seed=0, token=4):
        row = np.array([*context, *[token] * length], np.int32)
        drawn = hidden_columns(Query(row, np.arange(len(context), len(row)), len(context)), mc_num, seed)
        return [(np.asarray(hidden) - len(context)).tolist() for hidden in drawn]

    assert replicate_sizes(1) == [1] and replicate_sizes(3) == [1, 1, 1] and replicate_sizes(20) == [3] * 4 + [2] * 4
    assert columns([5, 6], 8) == columns([5, 6], 8, token=9)
    assert columns([5, 6], 8) != columns([6, 5], 8) and columns([5, 6], 8) != columns([5, 6], 8, seed=1)
    for start in range(0, 64, 8):  # each replicate of eight draws holds every count once
        assert sorted(len(hidden) for hidden in columns([5, 6], 8)[start : start + 8]) == list(range(1, 9))
    assert len({tuple(hidden) for hidden in columns([5, 6], 8) if len(hidden) == 2}) > 2  # every draw has its own
    seen = np.zeros(8)
    for seed in range(64):
        for hidden in columns([7], 8, seed=seed):
            assert hidden == sorted(set(hidden)) and set(hidden) <= set(range(8))
            seen[hidden] += 1
    expected = 64 * 64 * 9 / 16
    assert np.all(np.abs(seen - expected) < 5 * math.sqrt(expected))


@pytest.mark.parametrize("pairs, message", [
    ([([4], [])], "pair 0: the candidate is empty"),
    ([([4], [5]), ([4] * 90, [5] * 7)], "pair 1: 90 tokens of context, 7 of the candidate and 0 after it exceed the"),
    ([([4], [11])], "id 11 is outside the vocabulary of 11"),
    ([([4], [5]), ([-1], [5])], "pair 1: id -1 is outside the vocabulary of 11"),
    ([([IDS.mask], [5])], "contains MASK (id 0)"),
])
def test_bad_pairs(networks, pairs, message):
    with pytest.raises(InputError) as caught:
        scorer(networks[0]).score(pairs)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_bad_questions(networks):
    with pytest.raises(InputError, match="question 1: has no candidates"):
        scorer(networks[0]).choose([[([4], [5])], []])


@pytest.mark.parametrize("settings, message", [
    ({"method": "x"}, "config.score.method = 'x': must be one of 'confidence', 'monte_carlo'"),
    ({"mc_num": 0}, "config.score.mc_num = 0: must be greater than 0"),
    ({"cfg_scale": -1.0}, "config.score.cfg_scale = -1.0: must be 0 or more"),
])
def test_bad_settings(settings, message):
    with pytest.raises(InputError) as caught:
        ScoreConfig(**settings)
    assert str(caught.value) == message
