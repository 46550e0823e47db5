"""Why steps matter: one token per step samples the joint distribution, all at once only the product of marginals."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from illada_jax.config import DecodeConfig
from illada_jax.decoding import Decoder, SpecialIds, plain_logits_fn

LENGTH, SYMBOLS, FIRST, ROWS = 3, 3, 4, 4096
IDS = SpecialIds(mask=0, eos=1, bos=2, pad=3, vocab_size=FIRST + SYMBOLS)
CRITICAL = 54.05  # chi-squared with 26 degrees of freedom exceeds this once in a thousand draws


def joint():
    """A distribution over all 27 texts with strong dependences: neighbours tend to be equal."""
    weights = np.random.default_rng(0).uniform(0.5, 1.5, (SYMBOLS,) * LENGTH)
    for outcome in itertools.product(range(SYMBOLS), repeat=LENGTH):
        weights[outcome] *= 6.0 ** sum(a == b for a, b in itertools.pairwise(outcome))
    return weights / weights.sum()


def true_conditionals(p):
    """A network that knows p: log p(x_i | visible tokens), by enumeration."""
    table = np.full((SYMBOLS + 1,) * LENGTH + (LENGTH, FIRST + SYMBOLS), -np.inf, np.float32)
    for seen in itertools.product(range(SYMBOLS + 1), repeat=LENGTH):  # the last symbol is MASK
        given = p[np.ix_(*[range(SYMBOLS) if s == SYMBOLS else [s] for s in seen])]
        for i in range(LENGTH):
            mass = given.sum(axis=tuple(axis for axis in range(LENGTH) if axis != i))
            ids = FIRST + (np.arange(SYMBOLS) if seen[i] == SYMBOLS else np.array([seen[i]]))
            table[(*seen, i, ids)] = np.log(mass / mass.sum())

    def network(table, tokens_BL):
        seen_BL = jnp.where(tokens_BL == IDS.mask, SYMBOLS, tokens_BL - FIRST)
        return table[seen_BL[:, 0], seen_BL[:, 1], seen_BL[:, 2]]

    return plain_logits_fn(jax.tree_util.Partial(network, jnp.asarray(table)))


def chi_squared(p, **settings):
    settings = DecodeConfig(max_new_tokens=LENGTH, block_length=LENGTH, temperature=1.0, batch_size=ROWS, **settings)
    results = Decoder(true_conditionals(p), settings, IDS, LENGTH).generate([[]] * ROWS)
    counts = np.zeros_like(p)
    for result in results:
        counts[tuple(np.array(result.tokens) - FIRST)] += 1
    return float(np.sum((counts - ROWS * p) ** 2 / (ROWS * p)))


def test_one_token_per_step_in_random_order_samples_the_joint_distribution():
    assert chi_squared(joint(), steps_per_block=LENGTH, confidence="random") < CRITICAL


def test_all_tokens_in_one_step_do_not():
    assert chi_squared(joint(), steps_per_block=1, confidence="random") > 10 * CRITICAL
