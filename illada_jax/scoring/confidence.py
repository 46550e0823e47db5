"""Confidence-based scoring (iLLaDA paper, Eq. 2): deterministic, and not a likelihood.

    S(y | p) = Σ_k log p(y_{i_k} | p, y_{k-1}),    i_k = argmax over hidden i of p(y_i | p, y_{k-1})

The candidate starts fully masked. Each step reveals the position whose true token is most probable and adds its
log-probability.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from illada_jax.scoring.log_probs import LogProbEvaluator, Query


@dataclass
class PartialCandidate:
    """A candidate that is partly revealed.

    Attributes:
      query: the row; its hidden columns are those that are still to be revealed.
      value: the sum so far in nats. Further terms are at most 0, so this is an upper bound on the score.
      greedy: True while greedy decoding, the most confident tokens first, would have written the same.
    """

    query: Query
    value: float = 0.0
    greedy: bool = True


def best_candidate(evaluator: LogProbEvaluator, groups: Sequence[Sequence[PartialCandidate]],
                   divisors: Sequence[Sequence[float]], tokens_per_step: int = 1) -> list[int]:
    """The best candidate of each group, exact, without revealing the others completely.

    A sum only falls. So only the leader of a group, by its sum so far, has to advance, and a complete leader cannot be
    overtaken. Sums are divided by the divisors, such as lengths, before comparing; the first one of equals is best. The
    candidates are changed in place.
    """
    def leader(group: int) -> int:
        bounds = [candidate.value / divisor for candidate, divisor in zip(groups[group], divisors[group], strict=True)]
        return int(np.argmax(bounds))

    # All sums start at 0, so every candidate takes the first step.
    advance(evaluator, [candidate for group in groups for candidate in group], tokens_per_step)
    leaders = [leader(group) for group in range(len(groups))]
    while running := [group for group, best in enumerate(leaders) if len(groups[group][best].query.hidden_Q)]:
        # Candidates with the leader's visible tokens share its evaluation.
        visible = {group: groups[group][leaders[group]].query.visible() for group in running}
        advance(evaluator, [candidate for group in running for candidate in groups[group]
                             if candidate.query.visible() == visible[group]], tokens_per_step)
        for group in running:
            leaders[group] = leader(group)
    return leaders


def advance(evaluator: LogProbEvaluator, candidates: Sequence[PartialCandidate], tokens_per_step: int) -> None:
    """Advances each candidate, which must have hidden columns, by one evaluation and one step, in place.

    A step reveals `tokens_per_step` tokens. 1 is the paper's score; k approximates it in 1/k of the evaluations.
    """
    results = evaluator([candidate.query for candidate in candidates])
    for candidate, (log_probs_Q, best_Q) in zip(candidates, results, strict=True):
        # The leftmost of equals comes first.
        order = np.argsort(-log_probs_Q, kind="stable")
        now, later = order[:tokens_per_step], order[tokens_per_step:]
        candidate.greedy &= bool(np.all(log_probs_Q[now] >= best_Q[now])
                                 and np.min(log_probs_Q[now]) >= np.max(best_Q[later], initial=-np.inf))
        candidate.value += float(np.sum(log_probs_Q[now], dtype=np.float64))
        candidate.query = candidate.query._replace(hidden_Q=np.delete(candidate.query.hidden_Q, now))
