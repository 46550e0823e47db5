"""Decoding: the compiled unmasking loop, its strategies, and the queue that feeds it."""

from illada_jax.decoding.contract import LogitsFn, SpecialIds, plain_logits_fn
from illada_jax.decoding.decoder import Decoded, Decoder

__all__ = ["Decoded", "Decoder", "LogitsFn", "SpecialIds", "plain_logits_fn"]
