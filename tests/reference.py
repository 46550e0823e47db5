"""The decoder as one would explain it: one row, one step, one position at a time, in plain Python and numpy.

The compiled decoder must give the same tokens, steps and confidences. No padding, no batch, no buckets, no jit. Shared
is only which key a draw takes, that of (seed, row, step, draw), with one number for each slot of the block.
"""

import functools
import math
from dataclasses import dataclass, field

import jax
import numpy as np

from illada_jax.config import DecodeConfig
from illada_jax.decoding import SpecialIds

TOKEN_DRAW, ORDER_DRAW = 0, 1


@dataclass
class Trace:
    """What decoding one row gives.

    Attributes:
      canvas: all tokens, prompt included.
      steps: network evaluations (a guided step counts as one).
      reveal_step: of each canvas column, -1 where nothing was written.
      log_prob: of each canvas column, 0 where nothing was written.
      closest: the smallest difference between two candidates of which one was preferred (for confidences close to 0,
        relative to them): two float32 programs may differ where this is below 1e-5.
      tied: candidates were equal. Those of a table are in every program, those of a network nearly so.
    """

    canvas: list[int]
    steps: int = 0
    reveal_step: list[int] = field(default_factory=list)
    log_prob: list[float] = field(default_factory=list)
    closest: float = math.inf
    tied: bool = False


def decode(network, prompt, settings: DecodeConfig, ids: SpecialIds, row: int = 0, infill: bool = False,
           limit: int | None = None) -> Trace:
    """Decodes one row.

    Args:
      network: maps a list of L ids to float32 logits [L, V].
      prompt: ids; with MASK where something is to be filled in, if `infill`.
      settings: the sampler.
      ids: ids with a meaning.
      row: the row's number, which its random draws depend on.
      infill: fill the gaps and append nothing.
      limit: columns that the row may grow to; by default the prompt and max_new_tokens.
    """
    trace = Trace(list(prompt))
    if limit is None:
        limit = len(prompt) + (0 if infill else settings.max_new_tokens)
    never = {ids.mask} | ({ids.eos, ids.pad} if infill else set())
    stop = set() if infill else {ids.eos}
    row_key = jax.random.fold_in(jax.random.key(settings.seed), row)
    trace.reveal_step = [-1] * len(prompt)
    trace.log_prob = [0.0] * len(prompt)

    while True:
        while len(trace.canvas) < limit and trace.canvas.count(ids.mask) < settings.block_length:
            trace.canvas.append(ids.mask)
            trace.reveal_step.append(-1)
            trace.log_prob.append(0.0)
        block = [c for c, token in enumerate(trace.canvas) if token == ids.mask][: settings.block_length]
        denoise_block(network, trace, block, settings, ids, never, row_key)
        if any(trace.canvas[column] in stop for column in block):
            return trace
        if len(trace.canvas) == limit and ids.mask not in trace.canvas:
            return trace


def denoise_block(network, trace, block, settings, ids, never, row_key) -> None:
    """Reveals all columns of the block, a few at each step."""
    for step in range(len(block)):
        masked = [column for column in block if trace.canvas[column] == ids.mask]
        if not masked:
            return
        logits = np.array(network(trace.canvas), np.float32)
        logits[:, ids.vocab_size :] = -np.inf
        logits[:, sorted(never)] = -np.inf

        gumbel, uniform = draws(row_key, trace.steps, settings.block_length, logits.shape[1])

        guesses = []
        for column in masked:
            slot = block.index(column)
            token = choose(trace, logits[column], settings.temperature, gumbel[slot])
            log_p = log_softmax(logits[column])
            confidence = CONFIDENCES[settings.confidence](log_p, token, uniform[slot])
            guesses.append((confidence, column, token, log_p[token]))
        guesses.sort(key=lambda guess: (-guess[0], guess[1]))

        count = REVEALS[settings.reveal](settings, len(block), step)
        count = min(max(count, 1), len(masked))
        if count < len(masked):
            last, next_ = guesses[count - 1][0], guesses[count][0]
            note_gap(trace, last, next_, scale=min(1.0, abs(next_)))
        for _, column, token, log_p_token in guesses[:count]:
            trace.canvas[column] = token
            trace.reveal_step[column] = trace.steps
            trace.log_prob[column] = float(log_p_token)
        trace.steps += 1


def draws(row_key, step: int, slots: int, vocabulary: int):
    """The random numbers of a step: Gumbel noise [slots, vocabulary] and uniform numbers [slots]."""
    gumbel, uniform = _draws(row_key, step, slots, vocabulary)
    return np.asarray(gumbel).reshape(slots, vocabulary), np.asarray(uniform)


@functools.partial(jax.jit, static_argnums=(2, 3))  # only because drawing is slow otherwise
def _draws(row_key, step, slots, vocabulary):
    token_key, order_key = (jax.random.fold_in(row_key, step * 2 + draw) for draw in (TOKEN_DRAW, ORDER_DRAW))
    return jax.random.gumbel(token_key, (slots * vocabulary,), mode="high"), jax.random.uniform(order_key, (slots,))


def note_gap(trace: Trace, larger: float, smaller: float, scale: float = 1.0) -> None:
    if larger == smaller:
        trace.tied = True
    else:
        trace.closest = min(trace.closest, float(larger - smaller) / scale)


def choose(trace: Trace, logits, temperature: float, gumbel) -> int:
    """The most probable token, or a sample from softmax(logits / temperature)."""
    if temperature > 0:
        logits = logits / np.float32(temperature) + gumbel
    best, second = np.sort(logits)[::-1][:2]
    note_gap(trace, best, second)
    return int(np.argmax(logits))


def log_softmax(logits):
    """Float32, without saturation: the best token's own term never enters the sum."""
    best = int(np.argmax(logits))
    shifted = (logits - logits[best]).astype(np.float32)
    others = np.delete(shifted, best)
    return shifted - np.log1p(np.sum(np.exp(others), dtype=np.float32))


def low_confidence(log_p, token, uniform):
    return log_p[token]


def random(log_p, token, uniform):
    return np.log(uniform)


def top_k(settings, total: int, step: int) -> int:
    base, extra = divmod(total, settings.steps_per_block)
    return base + 1 if step < extra else base


CONFIDENCES = {"low_confidence": low_confidence, "random": random}
REVEALS = {"top_k": top_k}
