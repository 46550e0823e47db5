"""Confidence-based scoring (iLLaDA paper, Eq. 2): deterministic, and not a likelihood.

    S(y | p) = Σ_k log p(y_{i_k} | p, y_{k-1}),    i_k = argmax over hidden i of p(y_i | p, y_{k-1})

The candidate starts fully masked. Each step reveals the position whose true token is most probable and adds its
log-probability.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from illada_jax.scoring.log_probs import LogProbEvaluator, Query, TokenLogProbs


@dataclass
class PartialCandidate:
    """A candidate that is partly revealed.

    Attributes:
      tokens_L: int32, context, candidate and the visible tokens after it.
      hidden_Q: columns that are still hidden.
      context_length: columns before the candidate.
      value: the sum so far in nats. Further terms are at most 0, so this is an upper bound on the score.
      greedy: True while greedy decoding, the surest tokens first, would have written the same.
    """

    tokens_L: np.ndarray
    hidden_Q: np.ndarray
    context_length: int
    value: float = 0.0
    greedy: bool = True


def reveal_all(evaluator: LogProbEvaluator, candidates: Sequence[PartialCandidate], tokens_per_step: int = 1) -> None:
    """Reveals all candidates completely, in lockstep.

    Args:
      evaluator: the network.
      candidates: changed in place.
      tokens_per_step: tokens that a step reveals. 1 is the paper's score; k approximates it in 1/k of the evaluations.
    """
    while hidden := [candidate for candidate in candidates if len(candidate.hidden_Q)]:
        _advance(evaluator, hidden, tokens_per_step)


def best_candidate(evaluator: LogProbEvaluator, groups: Sequence[Sequence[PartialCandidate]],
                   divisors: Sequence[Sequence[float]], tokens_per_step: int = 1) -> list[int]:
    """The best candidate of each group, exact, without revealing the others completely.

    A sum only falls. So only the leader of a group, by its sum so far, has to advance, and a complete leader cannot be
    overtaken.

    Args:
      evaluator: the network.
      groups: the candidates of each question; changed in place.
      divisors: for each candidate, the length that its score is divided by before comparing.
      tokens_per_step: see `reveal_all`.

    Returns:
      The index of the best candidate of each group; the first one of equals.
    """
    def leader(group: int) -> int:
        bounds = [candidate.value / divisor for candidate, divisor in zip(groups[group], divisors[group], strict=True)]
        return int(np.argmax(bounds))

    # All sums start at 0, so every candidate takes the first step.
    _advance(evaluator, [candidate for group in groups for candidate in group], tokens_per_step)
    leaders = [leader(group) for group in range(len(groups))]
    while running := [group for group, best in enumerate(leaders) if len(groups[group][best].hidden_Q)]:
        _advance(evaluator, [candidate for group in running
                             for candidate in _same_input(groups[group][leaders[group]], groups[group])],
                 tokens_per_step)
        for group in running:
            leaders[group] = leader(group)
    return leaders


def _same_input(leader: PartialCandidate, group: Sequence[PartialCandidate]) -> list[PartialCandidate]:
    """Candidates of a group with the leader's visible tokens: they share its evaluation."""
    def visible(candidate: PartialCandidate) -> bytes:
        tokens_L = candidate.tokens_L.copy()
        tokens_L[candidate.hidden_Q] = -1
        return tokens_L.tobytes()

    return [candidate for candidate in group if visible(candidate) == visible(leader)]


def _advance(evaluator: LogProbEvaluator, candidates: Sequence[PartialCandidate], tokens_per_step: int) -> None:
    """One evaluation and one step of each candidate."""
    results = evaluator([Query(candidate.tokens_L, candidate.hidden_Q, candidate.context_length)
                         for candidate in candidates])
    for candidate, result in zip(candidates, results, strict=True):
        _reveal(candidate, result, tokens_per_step)


def _reveal(candidate: PartialCandidate, result: TokenLogProbs, tokens_per_step: int) -> None:
    # The leftmost of equals comes first.
    order = np.argsort(-result.log_probs_Q, kind="stable")
    now, later = order[:tokens_per_step], order[tokens_per_step:]
    candidate.greedy &= bool(np.all(result.log_probs_Q[now] >= result.best_Q[now])
                             and np.min(result.log_probs_Q[now]) >= np.max(result.best_Q[later], initial=-np.inf))
    candidate.value += float(np.sum(result.log_probs_Q[now], dtype=np.float64))
    candidate.hidden_Q = np.delete(candidate.hidden_Q, now)
