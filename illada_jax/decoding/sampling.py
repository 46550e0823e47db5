"""Choosing a token for every position of the active block: logit masks, temperature, top-k, top-p and Gumbel noise."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from illada_jax.config import DecodeConfig
from illada_jax.decoding.confidence import Prediction, argmax, log_softmax

# Purposes of random keys. Samples depend on the numbers: never renumber them.
_TOKEN, _ORDER, _NUM_PURPOSES = 0, 1, 2


def row_keys(seed: int, rows: jax.Array) -> jax.Array:
    """Key data uint32 [B, 2] of the given row numbers; independent of the batch."""
    fold_in = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return jax.random.key_data(fold_in(jax.random.key(seed), rows))


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


def keep_top_k(logits_BQV: jax.Array, top_k: int) -> jax.Array:
    """Keeps the top_k most probable tokens and those that tie with the last one; sets the others to -inf."""
    lowest_BQ1 = jax.lax.top_k(logits_BQV, min(top_k, logits_BQV.shape[-1]))[0][:, :, -1:]
    return jnp.where(logits_BQV >= lowest_BQ1, logits_BQV, -jnp.inf)


def nucleus(logits_BQV: jax.Array, top_p: float) -> jax.Array:
    """Keeps the most probable tokens with a total mass of at least top_p; sets the others to -inf.

    Tokens that tie with the last one are kept, too (nucleus sampling, Holtzman et al., 2020).
    """
    sorted_BQV = -jnp.sort(-logits_BQV, axis=-1)
    probs_BQV = jax.nn.softmax(sorted_BQV, axis=-1)
    before_BQV = jnp.cumsum(probs_BQV, axis=-1) - probs_BQV
    lowest_BQ1 = jnp.min(jnp.where(before_BQV < top_p, sorted_BQV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BQV >= lowest_BQ1, logits_BQV, -jnp.inf)


def choose(logits_BQV: jax.Array, settings: DecodeConfig, keys_B: jax.Array) -> jax.Array:
    """A token for each position, int32 [B, Q]: the argmax, or a sample of softmax(logits / temperature).

    Samples come from the top_k tokens, and of these from the nucleus: the order temperature, top-k, top-p of Hugging
    Face transformers and of vLLM. top_p is a share of the probability of the tokens that top_k keeps.

    A sample is argmax(logits / temperature + Gumbel noise). The noise is float32 in JAX's high-range mode, whose upper
    tail reaches down to probabilities of 1e-38. That of the default mode ends at 1e-7, which acts like a lower
    temperature; the published code draws in float64 for that reason.
    """
    if settings.temperature > 0:
        logits_BQV = logits_BQV / settings.temperature
        if settings.top_k:
            logits_BQV = keep_top_k(logits_BQV, settings.top_k)
        if settings.top_p < 1:
            logits_BQV = nucleus(logits_BQV, settings.top_p)
        shape_QV = logits_BQV.shape[1:]
        # Drawn flat: XLA's CPU compiler takes ten times as long for the same draw in more dimensions.
        gumbel = jax.vmap(lambda key: jax.random.gumbel(key, (math.prod(shape_QV),), mode="high").reshape(shape_QV))
        logits_BQV = logits_BQV + gumbel(keys_B)
    return argmax(logits_BQV)


def predict(logits_BQV: jax.Array, settings: DecodeConfig, last_ids: tuple[int, ...], keys_B2: jax.Array,
            steps_B: jax.Array) -> Prediction:
    """Chooses a token for each position. Temperature, top-k and top-p do not apply to the log-probabilities.

    `last_ids` may be chosen but have probability 0 in confidences, so that they are written last. The logits are those
    after `mask_logits`, keys_B2 are the key data of the rows, and steps_B the steps that they have taken.
    """
    num_columns = logits_BQV.shape[1]
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (num_columns,)))
    return Prediction(
        tokens_BQ=choose(logits_BQV, settings, _step_keys(keys_B2, _TOKEN, steps_B)),
        log_probs_BQV=log_softmax(mask_logits(logits_BQV, last_ids)),
        uniform_BQ=uniform(_step_keys(keys_B2, _ORDER, steps_B)),
    )
