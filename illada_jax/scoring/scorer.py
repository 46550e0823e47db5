"""Scores of (context, candidate) pairs, by confidence or Monte Carlo."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from jax.sharding import Mesh

from illada_jax.decoding.query import LogitsFn, SpecialIds
from illada_jax.errors import ConfigError, InputError
from illada_jax.model.cache import Cache
from illada_jax.scoring.confidence import PartialCandidate, advance, best_candidate
from illada_jax.scoring.log_probs import LogProbEvaluator, Query
from illada_jax.scoring.monte_carlo import estimate

Method = Literal["confidence", "monte_carlo"]


@dataclass(frozen=True)
class ScoreConfig:
    """Settings of a scorer. Frozen and hashable.

    Attributes:
      method: `confidence` (iLLaDA paper, Eq. 2) or `monte_carlo` (LLaDA paper, Eq. 6).
      mc_num: draws of `monte_carlo`.
      bos: BOS precedes the context.
      eos: one EOS follows the candidate, visible and not scored.
      cfg_scale: classifier-free guidance w: uncond + (w + 1)·(cond - uncond), uncond without the context; 0 is none.
      tokens_per_step: tokens that a step of `confidence` reveals. 1 is the paper's score; larger values approximate it.
      context_cache: evaluate each context once, alone, for all candidates and steps (`log_probs.LogProbEvaluator`):
        much faster, and approximate for bidirectional networks.
      batch_size: rows evaluated at the same time; scores do not depend on it.
      seed: seed of `monte_carlo`.
    """

    method: Method = "confidence"
    mc_num: int = 128
    bos: bool = False
    eos: bool = False
    cfg_scale: float = 0.0
    tokens_per_step: int = 1
    context_cache: bool = False
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self):
        if self.method not in get_args(Method):
            known = ", ".join(map(repr, get_args(Method)))
            raise ConfigError(f"config.score.method = {self.method!r}: must be one of {known}")
        for name in ("mc_num", "tokens_per_step", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"config.score.{name} = {getattr(self, name)!r}: must be greater than 0")
        for name in ("cfg_scale", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"config.score.{name} = {getattr(self, name)!r}: must be 0 or more")


class Score(NamedTuple):
    """The score of a candidate.

    Attributes:
      value: sum of log-probabilities in nats: by `monte_carlo` an estimate of the log-likelihood, by `confidence` not a
        likelihood.
      stderr: standard error of `value` over draws: 0 where it is exact or nothing is drawn, NaN for one draw.
      length: tokens of the candidate.
      greedy: `confidence`: True if greedy decoding of as many tokens, the surest first, writes exactly this candidate.
        `monte_carlo`: None.
    """

    value: float
    stderr: float
    length: int
    greedy: bool | None = None


class Scorer:
    """Scores candidates with one network.

    A score depends on the context, the candidate and the settings; not on the other candidates, their order or the
    batch size (in float32, except for near-ties).

    Attributes:
      evaluator: the network; counts its evaluations.
    """

    def __init__(self, logits_fn: LogitsFn, settings: ScoreConfig, ids: SpecialIds, max_length: int,
                 mesh: Mesh | None = None, init_cache: Callable[[int, int], Cache] | None = None):
        """Prepares scoring; nothing is compiled yet. For the arguments see `LogProbEvaluator`.

        Raises:
          ConfigError: contexts are to be cached, and `init_cache` is None.
        """
        if settings.context_cache and init_cache is None:
            raise ConfigError("config.score.context_cache = True: this network has no cache; set it to False")
        self.settings = settings
        self.evaluator = LogProbEvaluator(logits_fn, ids, max_length, settings.batch_size, settings.cfg_scale, mesh,
                                          init_cache if settings.context_cache else None)

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        """Scores (context ids, candidate ids); one score per pair, in order.

        Raises:
          InputError: a candidate is empty or too long, or an id is invalid; the message names the pair.
        """
        rows = [self._row(f"pair {index}", context, candidate) for index, (context, candidate) in enumerate(pairs)]
        return [score for part in self._parts([[row] for row in rows])
                for score in self._score([row for row, in part])]

    def _parts(self, groups: list[list[Query]]) -> Iterator[list[list[Query]]]:
        """Consecutive groups; with cached contexts, no part has more of them than the evaluator remembers."""
        part, contexts = [], set()
        for group in groups:
            added = {row.tokens_L[: row.context_length].tobytes() for row in group}
            if part and self.settings.context_cache and len(contexts | added) > self.settings.batch_size:
                yield part
                part, contexts = [], set()
            part.append(group)
            contexts |= added
        yield part

    def _score(self, rows: list[Query]) -> list[Score]:
        if self.settings.method == "monte_carlo":
            estimates = estimate(self.evaluator, rows, self.settings.mc_num, self.settings.seed)
            return [Score(value, stderr, len(row.hidden_Q))
                    for row, (value, stderr) in zip(rows, estimates, strict=True)]
        candidates = [PartialCandidate(row) for row in rows]
        while hidden := [candidate for candidate in candidates if len(candidate.query.hidden_Q)]:
            advance(self.evaluator, hidden, self.settings.tokens_per_step)
        return [Score(candidate.value, 0.0, len(row.hidden_Q), candidate.greedy)
                for row, candidate in zip(rows, candidates, strict=True)]

    def choose(self, questions: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]],
               divisors: Sequence[Sequence[float]] | None = None) -> list[int]:
        """The index of the best pair (context ids, candidate ids) of each question; the first one of equals.

        By `confidence` this takes fewer evaluations than `score` and chooses the same: candidates that cannot win are
        not completed.

        Before comparing, scores are divided by the divisors, such as lengths; by default 1.

        Raises:
          InputError: see `score`, or a question has no candidates.
        """
        rows = [[self._row(f"question {index}, pair {choice}", *pair) for choice, pair in enumerate(pairs)]
                for index, pairs in enumerate(questions)]
        if [] in rows:
            raise InputError(f"question {rows.index([])}: has no candidates")
        divisors = iter(divisors or [[1.0] * len(group) for group in rows])
        return [best for part in self._parts(rows) for best in self._choose(part, [next(divisors) for _ in part])]

    def _choose(self, rows: list[list[Query]], divisors: list[Sequence[float]]) -> list[int]:
        if self.settings.method == "confidence":
            groups = [[PartialCandidate(row) for row in group] for group in rows]
            return best_candidate(self.evaluator, groups, divisors, self.settings.tokens_per_step)
        flat = [row for group in rows for row in group]
        values = iter(estimate(self.evaluator, flat, self.settings.mc_num, self.settings.seed))
        return [int(np.argmax([next(values)[0] / divisor for divisor in group])) for group in divisors]

    def _row(self, name: str, context: Sequence[int], candidate: Sequence[int]) -> Query:
        if not len(candidate):
            raise InputError(f"{name}: the candidate is empty")
        ids, max_length = self.evaluator.ids, self.evaluator.max_length
        before = [ids.bos] * self.settings.bos + list(context)
        tokens = before + list(candidate) + [ids.eos] * self.settings.eos
        if len(tokens) > max_length:
            raise InputError(f"{name}: {len(before)} tokens of context, {len(candidate)} of the candidate and "
                             f"{int(self.settings.eos)} after it exceed the context of {max_length} tokens")
        for id_ in tokens:
            if not 0 <= id_ < ids.vocab_size:
                raise InputError(f"{name}: id {id_} is outside the vocabulary of {ids.vocab_size}")
        if ids.mask in tokens:
            raise InputError(f"{name}: contains MASK (id {ids.mask}), which cannot be scored")
        return Query(np.array(tokens, np.int32), np.arange(len(before), len(before) + len(candidate)), len(before))
