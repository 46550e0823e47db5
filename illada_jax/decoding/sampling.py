"""Choosing a token for every position of the active block: logit masks, temperature, top-k, top-p and Gumbel noise."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from illada_jax.config import DecodeConfig
from illada_jax.decoding.confidence import Prediction, argmax, log_softmax

# Purposes of random keys. Samples depend on the numbers: never renumber them.
_TOKEN, _ORDER, _NUM_PURPOSES = 0, 1, 2
_STOP_IDS = 8  # the width of the table of stop ids is a multiple: few numbers of them compile another program


class RowSettings(NamedTuple):
    """Settings that may differ between the rows of a batch: arrays, so that another value compiles nothing.

    Attributes:
      temperature_B: float32; 0 is greedy.
      top_k_B: int32; 0 is off.
      top_p_B: float32; 1 is off.
      log_threshold_B: float32 logarithm of the reveal threshold.
      stop_ids_BI: int32; a row is done after the first block that contains one of them. Unused slots hold -1.
    """

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    log_threshold_B: jax.Array
    stop_ids_BI: jax.Array

    @classmethod
    def of(cls, settings: DecodeConfig, stop_ids: tuple[int, ...] = (), most_stop_ids: int = 0) -> "RowSettings":
        """Those of one row, as numpy arrays, with room for `most_stop_ids`."""
        width = -(-max(len(stop_ids), most_stop_ids, 1) // _STOP_IDS) * _STOP_IDS
        return cls(np.float32([settings.temperature]), np.int32([settings.top_k]), np.float32([settings.top_p]),
                   np.float32([math.log(settings.threshold)]),
                   np.int32([[*stop_ids, *[-1] * (width - len(stop_ids))]]))


@jax.jit
def row_keys(seeds_B: jax.Array, rows_B: jax.Array) -> jax.Array:
    """Key data uint32 [B, 2] of the given seeds (uint32) and row numbers; independent of the batch."""
    return jax.random.key_data(jax.vmap(lambda seed, row: jax.random.fold_in(jax.random.key(seed), row))(seeds_B,
                                                                                                         rows_B))


def _step_keys(keys_B2: jax.Array, purpose: int, steps_B: jax.Array) -> jax.Array:
    """Typed keys [B] of (row, the row's step, purpose)."""
    return jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(keys_B2), steps_B * _NUM_PURPOSES + purpose)


def mask_logits(logits_BQV: jax.Array, ids: tuple[int, ...], vocab_size: int | None = None) -> jax.Array:
    """Sets the logits of the given ids, and of those from vocab_size on, to -inf."""
    # A table, because a tokenizer may leave hundreds of ids unused.
    never_V = np.zeros(logits_BQV.shape[-1], bool)
    never_V[[id_ for id_ in ids if id_ < never_V.size]] = True
    never_V[never_V.size if vocab_size is None else vocab_size :] = True
    return jnp.where(never_V[None, None], -jnp.inf, logits_BQV) if never_V.any() else logits_BQV


def keep_likely(logits_BQV: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """Keeps the top_k most probable tokens, and of these the nucleus; sets the others to -inf.

    A nucleus is the most probable tokens with a total mass of at least top_p (Holtzman et al., 2020). Tokens that tie
    with the last one are kept, too. A top_k of 0 and a top_p of 1 keep all.
    """
    sorted_BQV = -jnp.sort(-logits_BQV, axis=-1)
    last_B11 = (jnp.where(top_k_B > 0, top_k_B, sorted_BQV.shape[-1]) - 1)[:, None, None]
    lowest_BQ1 = jnp.take_along_axis(sorted_BQV, last_B11, axis=-1, mode="clip")
    sorted_BQV = jnp.where(sorted_BQV >= lowest_BQ1, sorted_BQV, -jnp.inf)
    probs_BQV = jax.nn.softmax(sorted_BQV, axis=-1)
    before_BQV = jnp.cumsum(probs_BQV, axis=-1) - probs_BQV
    top_p_B11 = top_p_B[:, None, None]
    in_nucleus_BQV = (before_BQV < top_p_B11) | (top_p_B11 >= 1)
    nucleus_BQ1 = jnp.min(jnp.where(in_nucleus_BQV, sorted_BQV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BQV >= jnp.maximum(lowest_BQ1, nucleus_BQ1), logits_BQV, -jnp.inf)


def choose(logits_BQV: jax.Array, rows: RowSettings, keys_B: jax.Array) -> jax.Array:
    """A token for each position, int32 [B, Q]: the argmax, or a sample of softmax(logits / temperature).

    Samples come from the top_k tokens, and of these from the nucleus: the order temperature, top-k, top-p of Hugging
    Face transformers and of vLLM. top_p is a share of the probability of the tokens that top_k keeps.

    A sample is argmax(logits / temperature + Gumbel noise). The noise is float32 in JAX's high-range mode, whose upper
    tail reaches down to probabilities of 1e-38. That of the default mode ends at 1e-7, which acts like a lower
    temperature; the published code draws in float64 for that reason.

    The steps that no row asks for are skipped at run time.
    """
    sampled_B11 = rows.temperature_B[:, None, None] > 0

    def noisy(logits_BQV):
        scaled_BQV = logits_BQV / jnp.where(sampled_B11, rows.temperature_B[:, None, None], 1.0)
        some_filter = jnp.any(sampled_B11[:, 0, 0] & ((rows.top_k_B > 0) | (rows.top_p_B < 1)))
        scaled_BQV = jax.lax.cond(some_filter, lambda x: keep_likely(x, rows.top_k_B, rows.top_p_B), lambda x: x,
                                  scaled_BQV)
        shape_QV = logits_BQV.shape[1:]
        # Drawn flat: XLA's CPU compiler takes ten times as long for the same draw in more dimensions.
        gumbel = jax.vmap(lambda key: jax.random.gumbel(key, (math.prod(shape_QV),), mode="high").reshape(shape_QV))
        return jnp.where(sampled_B11, scaled_BQV + gumbel(keys_B), logits_BQV)

    return argmax(jax.lax.cond(jnp.any(sampled_B11), noisy, lambda x: x, logits_BQV))


def predict(logits_BQV: jax.Array, rows: RowSettings, last_ids: tuple[int, ...], greedy_last_ids: tuple[int, ...],
            keys_B2: jax.Array, steps_B: jax.Array) -> Prediction:
    """Chooses a token for each position. Temperature, top-k and top-p do not apply to the log-probabilities.

    `last_ids`, and in greedy rows `greedy_last_ids`, may be chosen but have probability 0 in confidences, so that they
    are written last. The logits are those after `mask_logits`, keys_B2 are the key data of the rows, and steps_B the
    steps that they have taken.
    """
    num_columns = logits_BQV.shape[1]
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (num_columns,)))
    demoted_BQV = mask_logits(logits_BQV, last_ids)
    if greedy_last_ids:
        demoted_BQV = jnp.where(rows.temperature_B[:, None, None] > 0, demoted_BQV,
                                mask_logits(demoted_BQV, greedy_last_ids))
    return Prediction(
        tokens_BQ=choose(logits_BQV, rows, _step_keys(keys_B2, _TOKEN, steps_B)),
        log_probs_BQV=log_softmax(demoted_BQV),
        uniform_BQ=uniform(_step_keys(keys_B2, _ORDER, steps_B)),
    )
