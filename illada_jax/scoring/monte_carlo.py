"""Monte-Carlo likelihood of a candidate (LLaDA paper, Eq. 6): unbiased for the bound on its log-likelihood.

Each draw takes a count l from 1..L, masks l positions of the candidate, and multiplies the summed log-probabilities of
their true tokens by L / l. If the network knows the true conditionals, the expectation is the exact log-likelihood;
otherwise it lies below the model's log-likelihood.

Counts are stratified: the draws of a set spread evenly over 1..L from one random offset. Draws form independent sets
(replicates), whose scatter gives the standard error.
"""

import functools
import math
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from illada_jax.keys import Purpose, key_for
from illada_jax.scoring.log_probs import LogProbEvaluator, Query

# Eight replicates give a usable standard error (7 degrees of freedom); more would stratify less.
MAX_REPLICATES = 8
_QUERIES_AT_ONCE = 2048


def estimate(evaluator: LogProbEvaluator, candidates: Sequence[Query], mc_num: int,
             seed: int) -> list[tuple[float, float]]:
    """Log-likelihoods in nats with standard errors.

    Masks depend only on (seed, context, draw): candidates of one context share them, in any batch. All columns of a
    candidate are hidden in its query; `mc_num` is the number of draws of each.

    Returns:
      (mean, standard error) of each. The error is NaN for a single draw, and 0 for a candidate of one token, whose mean
      is exact.
    """
    results: list[tuple[float, float]] = []
    size = max(1, _QUERIES_AT_ONCE // mc_num)
    for first in range(0, len(candidates), size):
        part = candidates[first : first + size]
        draws = [[candidate._replace(hidden_Q=columns_Q) for columns_Q in hidden_columns(candidate, mc_num, seed)]
                 for candidate in part]
        found = iter(evaluator([query for queries in draws for query in queries]))
        for candidate, queries in zip(part, draws, strict=True):
            length = len(candidate.hidden_Q)
            values_N = np.array([length / len(query.hidden_Q) * np.sum(next(found).log_probs_Q, dtype=np.float64)
                                 for query in queries])
            results.append(_mean_and_stderr(values_N, length))
    return results


def replicate_sizes(mc_num: int) -> list[int]:
    """Number of draws of each replicate, as equal as possible."""
    count = min(mc_num, MAX_REPLICATES)
    return [mc_num // count + (replicate < mc_num % count) for replicate in range(count)]


def hidden_columns(candidate: Query, mc_num: int, seed: int) -> list[np.ndarray]:
    """Hidden columns of each draw, ascending."""
    start, length = candidate.context_length, len(candidate.hidden_Q)
    # Keyed by the context, not by a running number: a score must not depend on the other candidates.
    context = zlib.crc32(candidate.tokens_L[:start].tobytes())
    key = jax.random.fold_in(key_for(seed, Purpose.SCORING), np.uint32(context))
    width = 1 << (length - 1).bit_length()
    offsets_N, priorities_NL = map(np.asarray, jax.device_get(_uniforms(key, mc_num, width)))
    columns, draw = [], 0
    for size in replicate_sizes(mc_num):
        for time in (offsets_N[draw] + np.arange(size) / size) % 1:
            count = min(int(time * length) + 1, length)
            lowest = np.argsort(priorities_NL[draw, :length], kind="stable")[:count]
            columns.append(start + np.sort(lowest))
            draw += 1
    return columns


@functools.partial(jax.jit, static_argnums=(1, 2))
def _uniforms(key: jax.Array, draws: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Uniform numbers [draws] and [draws, width]; the first columns are the same for every width."""
    keys_N = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(draws))
    offset_keys_N, priority_keys_N = jnp.unstack(jax.vmap(jax.random.split)(keys_N), axis=1)
    return (jax.vmap(jax.random.uniform)(offset_keys_N),
            jax.vmap(lambda key: jax.random.uniform(key, (width,)))(priority_keys_N))


def _mean_and_stderr(values_N: np.ndarray, length: int) -> tuple[float, float]:
    ends = np.cumsum(replicate_sizes(len(values_N)))[:-1]
    # Each replicate is unbiased, so all have equal weight, also where one has a draw more.
    means_R = np.array([part.mean() for part in np.split(values_N, ends)])
    if length == 1:
        stderr = 0.0
    else:
        stderr = float(means_R.std(ddof=1) / math.sqrt(len(means_R))) if len(means_R) > 1 else math.nan
    return float(means_R.mean()), stderr
