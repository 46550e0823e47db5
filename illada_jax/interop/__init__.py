"""Hugging Face checkpoints in and out, and the one way to open or load a model."""

from illada_jax.interop.loading import load_model, open_source

__all__ = ["load_model", "open_source"]
