"""Optimizers and the learning-rate schedule, built from the config with optax."""

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from illada_jax.config import Config
from illada_jax.model.int8 import INPUT_AXES


def make_schedule(config: Config, peak: float) -> optax.Schedule:
    """Warm-up from 0 to `peak`, (piecewise) constant, decay to the floor (iLLaDA and LLaDA papers, pre-training).

    All rates keep their ratio to config.optimizer.learning_rate, which becomes `peak`.
    """
    c = config.optimizer
    scale = peak / c.learning_rate
    schedules = [optax.constant_schedule(rate * scale) for rate in (c.learning_rate, *c.changed_rates)]
    boundaries = list(config.change_steps)
    if config.warmup_steps:
        schedules.insert(0, optax.linear_schedule(0.0, peak, config.warmup_steps))
        boundaries.insert(0, config.warmup_steps)
    if config.decay_steps:
        before, floor = (c.learning_rate, *c.changed_rates)[-1], c.final_learning_rate
        if c.decay_shape == "cosine":
            schedules.append(optax.cosine_decay_schedule(before * scale, config.decay_steps, alpha=floor / before))
        else:
            schedules.append(optax.linear_schedule(before * scale, floor * scale, config.decay_steps))
        boundaries.append(config.decay_start)
    return optax.join_schedules(schedules, boundaries)


def make_optimizer(config: Config, rate: float = 1.0) -> optax.GradientTransformation:
    """Clipping, then AdamW, or Muon on the matrices of the layers and NAdam on embedding, head and norms.

    Weight decay acts on matrices, not on norms; with Muon on the matrices of the layers only. `rate` is a factor of all
    learning rates.
    """
    c = config.optimizer
    schedule = make_schedule(config, c.learning_rate * rate)
    if c.name == "muon":
        optimizer = optax.contrib.muon(
            schedule,
            beta=c.muon_momentum,
            eps=c.eps,
            weight_decay=c.weight_decay,
            adam_b1=c.b1,
            adam_b2=c.b2,
            adam_learning_rate=make_schedule(config, c.adam_learning_rate * rate),
            muon_weight_dimension_numbers=_muon_dimensions,
        )
    else:
        optimizer = optax.adamw(schedule, b1=c.b1, b2=c.b2, eps=c.eps, weight_decay=c.weight_decay, mask=_is_matrix)
    clip = optax.clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity()
    return optax.chain(clip, optimizer)


def _is_matrix(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)


def _muon_dimensions(params: Any) -> Any:
    """Input and output axes of the stacked matrices of the layers, whose first axis is the layer; None for others."""
    def dimensions(path: Any, x: jax.Array) -> MuonDimensionNumbers | None:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name.startswith("layers/") or name not in INPUT_AXES:
            return None
        outputs = 1 + INPUT_AXES[name]
        return MuonDimensionNumbers(tuple(range(1, outputs)), tuple(range(outputs, x.ndim)))

    return jax.tree_util.tree_map_with_path(dimensions, params)
