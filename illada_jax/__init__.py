"""illada_jax."""
