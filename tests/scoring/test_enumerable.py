"""Scores by enumeration, of a network of true conditionals over four tokens of three symbols."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from illada_jax.decoding import SpecialIds, plain_logits_fn
from illada_jax.scoring import ScoreConfig, Scorer

LENGTH, SYMBOLS = 4, 3
MASK = SYMBOLS
IDS = SpecialIds(mask=MASK, eos=4, bos=5, pad=6, vocab_size=7)
OUTCOMES = np.array(list(itertools.product(range(SYMBOLS), repeat=LENGTH)))
T_QUANTILE = 2.3646  # 97.5 %, seven degrees of freedom: eight replicates


def conditionals(joint, length, symbols):
    """Log p(token v at i | visible tokens), [canvas tokens…, i, v]."""
    outcomes = np.array(list(itertools.product(range(symbols), repeat=length)))
    table = np.full((symbols + 1,) * length + (length, symbols + 1), -1e9, np.float32)
    for canvas in itertools.product(range(symbols + 1), repeat=length):
        fits = np.all((canvas == outcomes) | (np.array(canvas) == symbols), axis=1)
        for i, v in itertools.product(range(length), range(symbols)):
            mass = joint[fits & (outcomes[:, i] == v)].sum()
            if mass > 0:
                table[(*canvas, i, v)] = math.log(mass / joint[fits].sum())
    return table


def _lookup(table, tokens_BL):
    length = table.ndim - 2
    logits_BLV = jnp.asarray(table)[tuple(jnp.moveaxis(tokens_BL[:, :length], 1, 0))]
    return jnp.pad(logits_BLV, ((0, 0), (0, tokens_BL.shape[1] - length), (0, 0)))


def scorer(table, **settings):
    return Scorer(plain_logits_fn(jax.tree_util.Partial(_lookup, table)), ScoreConfig(**settings), IDS, 8)


@pytest.fixture(scope="module")
def joint():
    return np.random.default_rng(0).dirichlet(np.full(len(OUTCOMES), 0.3)) * 0.99 + 0.01 / len(OUTCOMES)


@pytest.fixture(scope="module")
def table(joint):
    return conditionals(joint, LENGTH, SYMBOLS)


def test_confidence_by_hand():
    """Two tokens a or b with p(aa) = .5, p(ab) = .2, p(ba) = .2, p(bb) = .1.

    "ab": p(first a) = .7, p(second b) = .3: first the a, then p(b | a) = .2/.7. "ba": p(b) = .3 < p(second a) = .7:
    first the second token, then p(b | a second) = .2/.7. "bb": .3 and .3, a tie: the left one first, then .1/.3.
    With "a" as context: p(a | a) = .5/.7.
    """
    hand = conditionals(np.array([0.5, 0.2, 0.2, 0.1]), 2, 2)
    ids = SpecialIds(mask=2, eos=3, bos=4, pad=5, vocab_size=6)
    scored = Scorer(plain_logits_fn(jax.tree_util.Partial(_lookup, hand)), ScoreConfig(), ids, 8)
    values = [score.value for score in scored.score([([], [0, 1]), ([], [1, 0]), ([], [1, 1]), ([0], [0])])]
    expected = [math.log(0.7) + math.log(0.2 / 0.7), math.log(0.7) + math.log(0.2 / 0.7),
                math.log(0.3) + math.log(0.1 / 0.3), math.log(0.5 / 0.7)]
    np.testing.assert_allclose(values, expected, atol=1e-6)


def test_confidence_sums_are_the_log_likelihood_of_true_conditionals(joint, table):
    """By the chain rule any order gives log p(x) when the conditionals are those of one joint distribution."""
    values = [score.value for score in scorer(table).score([([], outcome) for outcome in OUTCOMES])]
    np.testing.assert_allclose(values, np.log(joint), atol=1e-5)


def test_monte_carlo_covers_the_exact_log_likelihood(joint, table):
    """The interval of the t quantile holds the exact value in 91-99 % of 200 repeats, and the mean is unbiased."""
    covered, values = [], []
    for repeat in range(200):
        outcome = repeat % len(OUTCOMES)
        score = scorer(table, method="monte_carlo", mc_num=32, seed=repeat).score([([], OUTCOMES[outcome])])[0]
        difference = score.value - math.log(joint[outcome])
        covered.append(abs(difference) <= T_QUANTILE * score.stderr)
        values.append(difference)
    assert 0.91 <= np.mean(covered) <= 0.99
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(len(values))


def test_monte_carlo_of_a_continuation(joint, table):
    """Log p(last three | first), from many draws."""
    outcome = OUTCOMES[40]
    exact = math.log(joint[40] / joint[OUTCOMES[:, 0] == outcome[0]].sum())
    score = scorer(table, method="monte_carlo", mc_num=2048).score([(outcome[:1], outcome[1:])])[0]
    assert abs(score.value - exact) < 4 * score.stderr < 0.2


def test_a_wrong_network_scores_below_the_likelihood(joint, table):
    """The expectation is a lower bound: on average over the data, wrong conditionals lose."""
    wrong = table + np.random.default_rng(1).normal(size=table.shape).astype(np.float32)
    scores = scorer(wrong, method="monte_carlo", mc_num=64).score([([], outcome) for outcome in OUTCOMES])
    assert joint @ [score.value for score in scores] < joint @ np.log(joint) - 0.1
