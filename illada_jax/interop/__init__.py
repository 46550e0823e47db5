"""Hugging Face checkpoints in and out, and the one way to load a model."""

from illada_jax.interop.loading import load_model

__all__ = ["load_model"]
