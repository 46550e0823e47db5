"""Confidence-based scoring (iLLaDA paper, Eq. 2): deterministic, and not a likelihood.

    S(y | p) = Σ_k log p(y_{i_k} | p, y_{k-1}),    i_k = argmax over hidden i of p(y_i | p, y_{k-1})

The candidate starts fully masked; at each step the position whose TRUE token is most probable is revealed, and its
log-probability counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from illada_jax.scoring.log_probs import LogProbEvaluator, Query, TokenLogProbs


@dataclass
class PartialCandidate:
    """A candidate on its way from masks to itself.

    Attributes:
      tokens_L: int32, context, candidate, and what stands visible behind it.
      hidden_Q: columns that are still hidden.
      context_length: columns before the candidate.
      value: the sum so far. What is still to come is at most 0, so this bounds the score from above.
      greedy: so far, decoding that writes the surest tokens of all first would have written the same.
    """

    tokens_L: np.ndarray
    hidden_Q: np.ndarray
    context_length: int
    value: float = 0.0
    greedy: bool = True


def finish(evaluator: LogProbEvaluator, candidates: Sequence[PartialCandidate], tokens_per_step: int = 1) -> None:
    """Reveals everything, all candidates in step.

    Args:
      evaluator: the network.
      candidates: the candidates; they are changed.
      tokens_per_step: tokens that a step reveals. With one it is the paper's score; more are an approximation, which
        takes as many times fewer evaluations.
    """
    while hidden := [candidate for candidate in candidates if len(candidate.hidden_Q)]:
        _advance(evaluator, hidden, tokens_per_step)


def best_candidate(evaluator: LogProbEvaluator, groups: Sequence[Sequence[PartialCandidate]], divisors: Sequence[Sequence[float]],
         tokens_per_step: int = 1) -> list[int]:
    """Finds the best candidate of each group, exactly, without finishing those that cannot win.

    A sum only falls. So the leader of a group, by its sum so far, is the only one that must advance, and once a leader
    is finished nothing can overtake it.

    Args:
      evaluator: the network.
      groups: candidates of one question each; they are changed.
      divisors: for each candidate, the length that its score is divided by before comparing.
      tokens_per_step: see `finish`.

    Returns:
      The index of the best candidate of each group; of equal ones the first.
    """
    def leader(group: int) -> int:
        bounds = [candidate.value / divisor for candidate, divisor in zip(groups[group], divisors[group], strict=True)]
        return int(np.argmax(bounds))

    # All sums start at 0, so all must take a step.
    _advance(evaluator, [candidate for group in groups for candidate in group], tokens_per_step)
    leaders = [leader(group) for group in range(len(groups))]
    while running := [group for group, best in enumerate(leaders) if len(groups[group][best].hidden_Q)]:
        _advance(evaluator, [candidate for group in running for candidate in _beside(groups[group][leaders[group]],
                                                                            groups[group])], tokens_per_step)
        for group in running:
            leaders[group] = leader(group)
    return leaders


def _beside(leader: PartialCandidate, group: Sequence[PartialCandidate]) -> list[PartialCandidate]:
    """Those of a group that look like the leader now: they share its evaluation."""
    def visible(candidate: PartialCandidate) -> bytes:
        tokens_L = candidate.tokens_L.copy()
        tokens_L[candidate.hidden_Q] = -1
        return tokens_L.tobytes()

    return [candidate for candidate in group if visible(candidate) == visible(leader)]


def _advance(evaluator: LogProbEvaluator, candidates: Sequence[PartialCandidate], tokens_per_step: int) -> None:
    """One evaluation and one step of each."""
    seen = evaluator([Query(candidate.tokens_L, candidate.hidden_Q, candidate.context_length) for candidate in candidates])
    for candidate, what in zip(candidates, seen, strict=True):
        _step(candidate, what, tokens_per_step)


def _step(candidate: PartialCandidate, seen: TokenLogProbs, tokens_per_step: int) -> None:
    # Of equal ones the leftmost is revealed first.
    order = np.argsort(-seen.log_probs_Q, kind="stable")
    now, later = order[:tokens_per_step], order[tokens_per_step:]
    candidate.greedy &= bool(np.all(seen.log_probs_Q[now] >= seen.best_Q[now])
                          and np.min(seen.log_probs_Q[now]) >= np.max(seen.best_Q[later], initial=-np.inf))
    candidate.value += float(np.sum(seen.log_probs_Q[now], dtype=np.float64))
    candidate.hidden_Q = np.delete(candidate.hidden_Q, now)
