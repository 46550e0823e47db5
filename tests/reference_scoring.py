"""Naive scorers: one row, one evaluation, one position at a time, in plain Python and numpy."""

import math

import numpy as np

from tests.reference import log_softmax


def logits_of(network, canvas, context_length, ids, cfg_scale):
    cond = np.asarray(network(canvas), np.float32)
    if not cfg_scale:
        return cond
    uncond = np.asarray(network([ids.mask] * context_length + list(canvas[context_length:])), np.float32)
    return uncond + np.float32(cfg_scale + 1) * (cond - uncond)


def layout(context, candidate, ids, bos, eos):
    """(whole row, columns of the candidate)."""
    before = [ids.bos] * bos + list(context)
    return before + list(candidate) + [ids.eos] * eos, list(range(len(before), len(before) + len(candidate)))


def confidence(network, context, candidate, ids, bos=False, eos=False, cfg_scale=0.0):
    """(The paper's sum, order of revealing, smallest gap between a preferred and another position)."""
    row, hidden = layout(context, candidate, ids, bos, eos)
    start, total, order, closest = hidden[0], 0.0, [], math.inf
    while hidden:
        canvas = [ids.mask if column in hidden else token for column, token in enumerate(row)]
        logits = logits_of(network, canvas, start, ids, cfg_scale)
        candidates = [(log_softmax(logits[column])[row[column]], -column) for column in hidden]
        candidates.sort(reverse=True)
        if len(candidates) > 1:
            closest = min(closest, candidates[0][0] - candidates[1][0])
        best, column = candidates[0][0], -candidates[0][1]
        total += float(best)
        order.append(column - start)
        hidden.remove(column)
    return total, order, closest


def monte_carlo(network, context, candidate, ids, draws, bos=False, eos=False, cfg_scale=0.0):
    """The mean over draws, each a list of hidden columns of the row, of L/l · Σ log p."""
    row, columns = layout(context, candidate, ids, bos, eos)
    values = []
    for hidden in draws:
        canvas = [ids.mask if column in hidden else token for column, token in enumerate(row)]
        logits = logits_of(network, canvas, columns[0], ids, cfg_scale)
        values.append(len(columns) / len(hidden) * sum(float(log_softmax(logits[c])[row[c]]) for c in hidden))
    return float(np.mean(values))


def greedy(network, context, length, ids):
    """Fills `length` masks after the context, at each step with the most probable id of all positions."""
    canvas = list(context) + [ids.mask] * length
    hidden = list(range(len(context), len(canvas)))
    while hidden:
        logits = np.asarray(network(canvas), np.float32)
        _, column, token = max((max(log_softmax(logits[c])), -c, int(np.argmax(logits[c]))) for c in hidden)
        canvas[-column] = token
        hidden.remove(-column)
    return canvas[len(context) :]
