"""A naive decoder: one row, one step, one position at a time, in plain Python and numpy.

The compiled decoder must give the same tokens, steps and log-probabilities. No padding, no batch, no buckets, no jit.
The two share only the random key of a draw, that of (seed, row, step, draw), with one number per slot of the block.
"""

import dataclasses
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
    """The result of decoding one row.

    Attributes:
      canvas: all tokens, prompt included.
      prompt_length: number of given tokens.
      limit: maximal length of the canvas.
      steps: network evaluations (a guided step counts as one).
      reveal_step: step of each canvas column, -1 if not written.
      log_prob: log-probability of each canvas column, 0 if not written.
      closest: the smallest difference between a preferred and another candidate (relative, for confidences close to 0):
        two float32 programs may differ where this is below 1e-5.
      tied: candidates were equal. On a table they are equal in every program, on a network nearly so.
    """

    canvas: list[int]
    prompt_length: int
    limit: int
    steps: int = 0
    reveal_step: list[int] = field(default_factory=list)
    log_prob: list[float] = field(default_factory=list)
    closest: float = math.inf
    tied: bool = False


def decode(network, prompt, settings: DecodeConfig, ids: SpecialIds, row: int = 0, infill: bool = False,
           limit: int | None = None) -> Trace:
    """Decodes one row.

    Args:
      network: maps a list of L ids to float32 logits [L, V]. With the cache `append` it is called with tokens, their
        columns and what is kept of earlier columns, and returns logits of the columns and what may be kept of them.
      prompt: ids; with MASK where something is to be filled in, if `infill`.
      settings: the sampler.
      ids: ids with a meaning.
      row: the row's number, which its random draws depend on.
      infill: fill the gaps and append nothing.
      limit: columns that the row may grow to; by default the prompt and max_new_tokens.
    """
    if limit is None:
        limit = len(prompt) + (0 if infill else settings.max_new_tokens)
    appends = settings.cache == "append"
    masks = limit - len(prompt) if settings.length == "fixed" and not appends else 0
    trace = Trace(list(prompt) + [ids.mask] * masks, len(prompt), limit)
    trace.reveal_step = [-1] * len(trace.canvas)
    trace.log_prob = [0.0] * len(trace.canvas)
    never = {ids.mask, *settings.suppressed_ids}
    never |= {ids.eos} if settings.logits_eos_inf else set()
    never |= {ids.eos, ids.pad} if infill else set()
    stop = set() if infill else {ids.eos, *settings.stop_ids}
    if infill:
        settings = dataclasses.replace(settings, end_of_thinking_boost=0.0, length="fixed")
    row_key = jax.random.fold_in(jax.random.key(settings.seed), row)
    see = functools.partial(guided_logits, network)
    if appends:
        see = Memory(network, trace)

    while True:
        if appends:
            see.remember(settings, ids)
        while len(trace.canvas) < limit and trace.canvas.count(ids.mask) < settings.block_length:
            trace.canvas.append(ids.mask)
            trace.reveal_step.append(-1)
            trace.log_prob.append(0.0)
        block = [c for c, token in enumerate(trace.canvas) if token == ids.mask][: settings.block_length]
        denoise_block(see, trace, block, settings, ids, never, row_key)
        if any(trace.canvas[column] in stop for column in block):
            return trace
        if len(trace.canvas) == limit and ids.mask not in trace.canvas:
            return trace


class Memory:
    """The cache `append`: what a network keeps of the columns that are finished, and of their masked copy.

    The prompt is evaluated alone. A finished block is evaluated once, with what is kept. Nothing else is seen while a
    block is denoised. All is computed again every `cache_refresh` blocks.
    """

    def __init__(self, network, trace: Trace):
        self.network, self.trace = network, trace
        self.cond, self.uncond, self.blocks = [], [], 0

    def remember(self, settings, ids) -> None:
        """Evaluates the columns that are new since the last block."""
        if settings.cache_refresh and self.blocks and self.blocks % settings.cache_refresh == 0:
            self.cond, self.uncond = [], []
        columns = list(range(len(self.cond), len(self.trace.canvas)))
        tokens = [self.trace.canvas[column] for column in columns]
        self.cond = self.cond + self.network(tokens, columns, self.cond)[1]
        self.uncond = self.uncond + self.network([ids.mask] * len(columns), columns, self.uncond)[1]
        self.blocks += 1

    def __call__(self, trace: Trace, settings, ids, start: int):
        """Logits of the canvas from column `start` of the block; nothing before it is asked for."""
        columns = list(range(start, len(trace.canvas)))
        tokens = [trace.canvas[column] for column in columns]
        cond, uncond = (np.asarray(self.network(tokens, columns, kept)[0]) for kept in (self.cond, self.uncond))
        guided = uncond + (settings.cfg_scale + 1) * (cond - uncond) if settings.cfg_scale else cond
        return np.concatenate([np.zeros((start, guided.shape[1])), guided]).astype(np.float32)


def denoise_block(see, trace, block, settings, ids, never, row_key) -> None:
    """Reveals all columns of the block, a few at each step."""
    for step in range(len(block)):
        masked = [column for column in block if trace.canvas[column] == ids.mask]
        if not masked:
            return
        logits = see(trace, settings, ids, block[0])
        if settings.end_of_thinking_boost:
            boost(logits, trace, masked[0], settings)
        logits[:, ids.vocab_size :] = -np.inf
        logits[:, sorted(never)] = -np.inf

        gumbel, uniform = draws(row_key, trace.steps, settings.block_length, logits.shape[1])

        predictions = []
        for column in masked:
            slot = block.index(column)
            token = choose(trace, logits[column], settings, gumbel[slot])
            log_p = log_softmax(demoted(logits[column], settings, ids))
            confidence = CONFIDENCES[settings.confidence](log_p, token, uniform[slot])
            predictions.append((confidence, column, token, log_p[token], entropy_of(log_p)))
        predictions.sort(key=lambda prediction: (-prediction[0], prediction[1]))

        count = REVEALS[settings.reveal](trace, settings, predictions, len(block), step)
        count = min(max(count, 1), len(masked))
        if count < len(masked):
            last, next_ = predictions[count - 1][0], predictions[count][0]
            note_gap(trace, last, next_, scale=min(1.0, abs(next_)))
        for _, column, token, log_p_token, _ in predictions[:count]:
            trace.canvas[column] = token
            trace.reveal_step[column] = trace.steps
            trace.log_prob[column] = float(log_p_token)
        trace.steps += 1


def guided_logits(network, trace: Trace, settings, ids, start: int):
    """The unconditional pass does not see the prompt; with variable length nothing before `start` of the block."""
    cond = np.array(network(trace.canvas), np.float32)
    if settings.cfg_scale == 0:
        return cond
    given = [step < 0 or (settings.length == "variable" and column < start)
             for column, step in enumerate(trace.reveal_step)]
    canvas = [ids.mask if g else token for g, token in zip(given, trace.canvas, strict=True)]
    uncond = np.array(network(canvas), np.float32)
    with np.errstate(invalid="ignore"):
        guided = uncond + np.float32(settings.cfg_scale + 1) * (cond - uncond)
    return np.where(cond == uncond, cond, guided)


def boost(logits, trace: Trace, column: int, settings) -> None:
    """Boosts the next token of the end-of-thinking string at the first masked column of the block."""
    ending, generated = list(settings.end_of_thinking_ids), trace.canvas[trace.prompt_length :]
    if any(generated[start : start + len(ending)] == ending for start in range(len(generated))):
        return
    before = trace.canvas[trace.prompt_length : column]
    begun = max(n for n in range(len(ending)) if n == 0 or before[-n:] == ending[:n])
    progress = min(1.0, (column - trace.prompt_length + 1) / (trace.limit - trace.prompt_length))
    logits[column, ending[begun]] += settings.end_of_thinking_boost * progress**settings.end_of_thinking_power


def demoted(logits, settings, ids):
    """LLaDA's `confidence_eos_eot_inf`: after the choice, EOS (without noise only) and EoT get probability 0."""
    logits = logits.copy()
    if settings.confidence_eos_eot_inf:
        if settings.temperature == 0:
            logits[ids.eos] = -np.inf
        if settings.eot_id >= 0:
            logits[settings.eot_id] = -np.inf
    return logits


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


def choose(trace: Trace, logits, settings, gumbel) -> int:
    """The most probable token, or a sample of softmax(logits / temperature) from the top_k and of those the nucleus."""
    if settings.temperature > 0:
        logits = logits / np.float32(settings.temperature)
        if settings.top_k:
            logits = keep_top_k(trace, logits, settings.top_k)
        if settings.top_p < 1:
            logits = nucleus(trace, logits, settings.top_p)
        logits = logits + gumbel
    best, second = np.sort(logits)[::-1][:2]
    note_gap(trace, best, second)
    return int(np.argmax(logits))


def keep_top_k(trace: Trace, logits, top_k: int):
    descending = sorted(logits, reverse=True)
    least = descending[top_k - 1] if top_k < len(descending) else -np.inf
    for logit in descending[top_k:]:  # ties are kept, near-ties may fall either way
        if logit != least:
            trace.closest = min(trace.closest, float(least - logit))
    return np.where(logits >= least, logits, -np.inf)


def nucleus(trace: Trace, logits, top_p: float):
    probs = np.exp(log_softmax(logits))
    mass = 0.0
    for id_ in np.argsort(-logits, kind="stable"):
        trace.closest = min(trace.closest, abs(mass - top_p))
        if mass >= top_p:
            break
        mass += probs[id_]
        least = logits[id_]
    return np.where(logits >= least, logits, -np.inf)


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


def margin(log_p, token, uniform):
    second, best = np.sort(log_p.astype(np.float64))[-2:]
    with np.errstate(divide="ignore"):
        return np.float32(best + np.log(-np.expm1(second - best)) if second - best > -0.7
                          else best + np.log1p(-np.exp(second - best)))


def negative_entropy(log_p, token, uniform):
    return -entropy_of(log_p)


def entropy_of(log_p):
    return -sum(np.exp(value) * value for value in log_p if value > -np.inf)


def fixed_schedule(trace, settings, predictions, total: int, step: int) -> int:
    base, extra = divmod(total, settings.steps_per_block)
    return base + 1 if step < extra else base


def threshold(trace, settings, predictions, total: int, step: int) -> int:
    return prefix(trace, predictions, lambda n, prediction: math.exp(prediction[0]) - settings.threshold, strict=False)


def factor(trace, settings, predictions, total: int, step: int) -> int:
    def slack(n, prediction):
        return settings.factor - (n + 1) * (1 - math.exp(prediction[0]))

    return prefix(trace, predictions, slack, strict=True)


def entropy_bound(trace, settings, predictions, total: int, step: int) -> int:
    def slack(n, prediction):
        entropies = [g[4] for g in predictions[:n]]
        return settings.entropy_bound - (sum(entropies) - max(entropies))

    return prefix(trace, predictions, slack, strict=False)


def prefix(trace, predictions, slack, strict: bool) -> int:
    """Number of leading predictions, surest first, with slack > 0 (or ≥ 0)."""
    for n, prediction in enumerate(predictions, start=1):
        left = slack(n, prediction)
        if left != 0:
            trace.closest = min(trace.closest, abs(left))
        if left < 0 or (strict and left == 0):
            return n - 1
    return len(predictions)


CONFIDENCES = {"low_confidence": low_confidence, "margin": margin, "entropy": negative_entropy, "random": random}
REVEALS = {"schedule": fixed_schedule, "threshold": threshold, "factor": factor, "entropy_bound": entropy_bound}
