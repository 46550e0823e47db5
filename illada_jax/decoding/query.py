"""What the decoder asks of the rest of the world: a function from tokens to logits, and the ids that mean something."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.tree_util import Partial


class LogitsFn(Protocol):
    """The decoder's only view of a network. Pass a `jax.tree_util.Partial`: its params are then arguments under jit."""

    def __call__(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array, query_columns_BQ: jax.Array, cache: Any
    ) -> tuple[jax.Array, Any]:
        """Logits of the wanted columns.

        Args:
          tokens_BT: int32 ids of the slice that is computed: the whole canvas, or part of it when a cache has the rest.
          positions_BT: int32 canvas column of each token.
          segments_BT: int32, 1 for tokens, 0 for padding.
          query_columns_BQ: int32 columns of the slice whose logits are needed.
          cache: None, or keys and values of the canvas.

        Returns:
          (logits_BQV float32, the cache with this slice written into it).
        """


END_OF_THINKING = "</think>"


class SpecialIds(NamedTuple):
    """Ids with a meaning. vocab_size is the tokenizer's: the network's V may be larger, those ids are never chosen.

    `end_of_thinking` is what the end-of-thinking boost pushes towards, unless the settings name other ids. `unused` are
    ids of the tokenizer that stand for nothing: they are never chosen either.
    """

    mask: int
    eos: int
    bos: int
    pad: int
    vocab_size: int
    end_of_thinking: tuple[int, ...] = ()
    unused: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any) -> "SpecialIds":
        """The special ids of a `data.tokenizer.Tokenizer`."""
        return cls(tokenizer.mask_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id, tokenizer.vocab_size,
                   tuple(tokenizer.encode(END_OF_THINKING)), tokenizer.unused_ids)


def plain_logits_fn(function: Any) -> Partial:
    """Wraps `f(tokens_BL) -> logits_BLV` (a function or a Partial) as a LogitsFn: for oracles and tests."""
    return Partial(_plain, function if isinstance(function, Partial) else Partial(function))


def _plain(function, tokens_BT, positions_BT, segments_BT, query_columns_BQ, cache):
    del positions_BT, segments_BT
    logits_BTV = function(tokens_BT).astype(jnp.float32)
    return jnp.take_along_axis(logits_BTV, query_columns_BQ[:, :, None], axis=1), cache
