"""Scoring: log-probabilities of given candidates.

Begin with `scorer.Scorer`, which scores (context, candidate) pairs by one of two methods: `confidence` (iLLaDA: reveal
in order of confidence) and `monte_carlo` (LLaDA: the likelihood bound over random masks). `log_probs` evaluates the
network for both. `illada_jax.evaluation` builds benchmarks on it.

May import decoding and all packages below it. Like decoding, it takes any function that returns logits.
"""

from illada_jax.scoring.scorer import Score, ScoreConfig, Scorer

__all__ = ["Score", "ScoreConfig", "Scorer"]
