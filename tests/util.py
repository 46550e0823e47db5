"""Helpers of several tests."""

import jax
import numpy as np

from illada_jax import model
from illada_jax.config import ModelConfig
from illada_jax.data.sources import registry


def documents(spec: str):
    """All documents of a source, in order."""
    for part in registry.parts(spec):
        yield from part.read()


def random_params(config: ModelConfig, scale: float = 2.0, seed: int = 1):
    """Random weights, `scale` times as large as at initialisation so that a wrong layout shows; nothing is compiled."""
    rng = np.random.default_rng(seed)
    shapes = model.abstract_params(config)

    def draw(path, x):
        std = scale * (2 / (5 * config.d_model)) ** 0.5
        center = 1.0 if path[-1].key == "scale" else 0.0
        return (center + std * rng.standard_normal(x.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)
