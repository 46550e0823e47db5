"""Decoding: the compiled unmasking loop, its strategies, and the queue of prompts in front of it.

Begin with `query`, the contract of a network (`LogitsFn`) and the one function that evaluates it. `reveal` and
`confidence` are the strategies: the number of positions that a step reveals, and their order. `loop` is the compiled
loop that all strategies share, `decoder` feeds it prompts of any length, `sampling` chooses tokens, `thinking` bounds
the length of the reasoning, `gaps` parses texts with `[[mask:N]]`. A row's tokens do not depend on the other rows.

May import model, parallel and what these import, but not training: any function that returns logits can be decoded.
"""

from illada_jax.decoding.decoder import Decoded, Decoder
from illada_jax.decoding.query import LogitsFn, SpecialIds, plain_logits_fn

__all__ = ["Decoded", "Decoder", "LogitsFn", "SpecialIds", "plain_logits_fn"]
