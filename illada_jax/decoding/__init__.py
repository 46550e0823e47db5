"""Decoding: the compiled unmasking loop, its strategies, and the queue that feeds it.

Begin with `query`, what decoding asks of a network (a `LogitsFn`), and `reveal` and `confidence`, the strategies:
how many positions a step reveals, and which first. `loop` is the one loop that all of them share, `decoder` feeds it
with prompts of any length, `sampling` chooses tokens, `gaps` reads texts with `[[mask:N]]`. A row's tokens do not
depend on the rows beside it.

May import all of the foundation, but not training: any function that gives logits can be decoded.
"""

from illada_jax.decoding.decoder import Decoded, Decoder, check_settings
from illada_jax.decoding.query import LogitsFn, SpecialIds, plain_logits_fn

__all__ = ["Decoded", "Decoder", "LogitsFn", "SpecialIds", "check_settings", "plain_logits_fn"]
