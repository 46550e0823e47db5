"""A distribution over four tokens of three symbols: small enough to sum over all outcomes and all masks."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from illada_jax.data.batch import Batch
from illada_jax.diffusion.objective import objective
from illada_jax.diffusion.process import Corrupted
from illada_jax.diffusion.token_losses import token_losses

LENGTH, SYMBOLS, MASK = 4, 3, 3
OUTCOMES = np.array(list(itertools.product(range(SYMBOLS), repeat=LENGTH)), np.int32)
MASKS = np.array([m for m in itertools.product([False, True], repeat=LENGTH) if any(m)])


def make_joint() -> np.ndarray:
    """Probabilities of the 81 outcomes, far from independent."""
    return np.random.default_rng(0).dirichlet(np.full(len(OUTCOMES), 0.3)) * 0.99 + 0.01 / len(OUTCOMES)


def make_batch(tokens_BL):
    """Rows that are whole segments, every token maskable, of weight 1."""
    ones = np.ones(tokens_BL.shape, np.int32)
    return Batch(tokens_BL, ones.astype(bool), ones, np.cumsum(ones, 1, dtype=np.int32) - 1, ones.astype(np.float32))


def nats_of_rows(table, batch, corrupted):
    """Runs the project's own loss code with a table as the network; the head is the identity on its logits.

    The table holds logits [4, 4, 4, 4, L, V]: the first indices are the noisy tokens.
    """
    logits_BLV = jnp.asarray(table)[tuple(jnp.moveaxis(corrupted.noisy_BL, 1, 0))]
    return objective(functools.partial(token_losses, lambda x: x), logits_BLV, batch, corrupted)[2]


@jax.jit
def _nats_of_all(table):
    tokens_BL = np.repeat(OUTCOMES, len(MASKS), axis=0)
    masked_BL = np.tile(MASKS, (len(OUTCOMES), 1))
    corrupted = Corrupted(np.where(masked_BL, MASK, tokens_BL), masked_BL, np.ones(masked_BL.shape, np.float32))
    return nats_of_rows(table, make_batch(tokens_BL), corrupted)


def enumerated(table, measure) -> np.ndarray:
    """For each outcome, Σ over masks of measure(number masked) · Σ CE of the masked. Float64 [81]."""
    nats_NM = np.asarray(_nats_of_all(table), np.float64).reshape(len(OUTCOMES), len(MASKS))
    return nats_NM @ [measure(mask.sum()) for mask in MASKS]


def exact_measure(masked):
    """∫ t^(m-1) (1-t)^(L-m) dt: the weight of a mask with m masked tokens when eps = 0."""
    return math.factorial(masked - 1) * math.factorial(LENGTH - masked) / math.factorial(LENGTH)
