"""Scoring: confidence-based scoring and Monte-Carlo likelihood of candidates, presets and a harness."""

from illada_jax.scoring.scorer import Score, ScoreConfig, Scorer

__all__ = ["Score", "ScoreConfig", "Scorer"]
