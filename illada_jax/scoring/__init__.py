"""Scoring: how probable are given candidates, and which benchmark number follows.

Begin with `scorer.Scorer`, which takes (context, candidate) pairs; its two methods are `confidence` (iLLaDA: reveal in
the order of confidence) and `monte_carlo` (LLaDA: the bound over random masks). `adapter` and `presets` run tasks of
lm-evaluation-harness with the settings of the papers, `manifest` records every knob, `sandbox` runs generated programs.

May import the foundation and decoding: like it, it takes any function that gives logits.
"""

from illada_jax.scoring.scorer import Score, ScoreConfig, Scorer

__all__ = ["Score", "ScoreConfig", "Scorer"]
