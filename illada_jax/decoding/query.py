"""The contract of a network, `LogitsFn`, and `guided_logits`, with which decoder, scorers and traces evaluate it.

Dimensions: B rows, L canvas columns, T columns of a slice, Q queried columns of the slice, V vocabulary.
"""

from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from illada_jax.config import DecodeConfig
from illada_jax.model.cache import Cache

END_OF_THINKING = "</think>"


class LogitsFn(Protocol):
    """A network as decoding and scoring call it. As a `jax.tree_util.Partial` it takes its params through jit."""

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array,
                 query_columns_BQ: jax.Array, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        """Logits of the queried columns.

        Args:
          tokens_BT: int32 ids of the slice: the whole canvas, or a part of it when a cache holds the rest.
          positions_BT: int32 canvas column of each token; unused slots hold the canvas length.
          segments_BT: int32, 1 for tokens, 0 for padding and unused slots.
          query_columns_BQ: int32 indices into the slice.
          cache: None, or keys and values of the canvas; its `writes` and `appends` say how this call uses them.

        Returns:
          (logits_BQV float32, the cache after the call, or None).
        """


class CanvasSlice(NamedTuple):
    """Canvas columns that a query evaluates; the first three fields are those of `LogitsFn`.

    given_BT is True in tokens that guidance hides: the prompt (with variable length also the finished blocks), or the
    text around gaps. It may be True in padding.
    """

    tokens_BT: jax.Array
    positions_BT: jax.Array
    segments_BT: jax.Array
    given_BT: jax.Array


def guided_logits(logits_fn: LogitsFn, canvas: CanvasSlice, query_columns_BQ: jax.Array, cache: Cache | None = None, *,
                  cfg_scale: float, mask_id: int) -> tuple[jax.Array, Cache | None]:
    """The network's logits with LLaDA's unsupervised classifier-free guidance: uncond + (w + 1)·(cond - uncond).

    Both passes are one batch of 2B rows. The rows of a pair are neighbours, so that a mesh keeps them on one device.

    w is `cfg_scale`; 0 is one unguided pass. In the unconditional pass, `mask_id` replaces given tokens. The queried
    columns are indices into the slice. A cache has B rows, 2B under guidance, and is returned as the network leaves it.

    Raises:
      AssertionError: shapes do not match, or the network breaks its contract.
    """
    chex.assert_rank([canvas.tokens_BT, query_columns_BQ], 2)
    chex.assert_equal_shape(canvas)
    inputs = (canvas.tokens_BT, canvas.positions_BT, canvas.segments_BT, query_columns_BQ)
    if cfg_scale:
        hidden_BT = canvas.given_BT & (canvas.segments_BT > 0)
        uncond = (jnp.where(hidden_BT, mask_id, canvas.tokens_BT), *inputs[1:])
        inputs = [jnp.stack(pair, axis=1).reshape(-1, pair[0].shape[1]) for pair in zip(inputs, uncond, strict=True)]
    logits, cache = logits_fn(*inputs, cache)
    chex.assert_shape(logits, (*inputs[3].shape, None))
    chex.assert_type(logits, jnp.float32)
    if cfg_scale:
        cond_BQV, uncond_BQV = jnp.unstack(logits.reshape(-1, 2, *logits.shape[1:]), axis=1)
        guided_BQV = uncond_BQV + (cfg_scale + 1) * (cond_BQV - uncond_BQV)
        logits = jnp.where(cond_BQV == uncond_BQV, cond_BQV, guided_BQV)  # both may be -inf
    return logits, cache


def keep_columns(logits_fn: LogitsFn, cache: Cache, tokens_BT: jax.Array, first_B: jax.Array, end_B: jax.Array, *,
                 cfg_scale: float, mask_id: int) -> Cache:
    """The cache after one evaluation of the columns [first, end) of each row, whose keys and values it then holds.

    The columns hold the first tokens of tokens_BT; the rest of it is not used. They attend to each other and to what
    the cache holds (`appends`), or to each other alone, if they are a whole canvas (`writes`). Guidance hides them all:
    the unconditional rows of the cache, every second one, are fed `mask_id`.
    """
    columns_BT = first_B[:, None] + jax.lax.broadcasted_iota(jnp.int32, tokens_BT.shape, 1)
    used_BT = columns_BT < end_B[:, None]
    canvas = CanvasSlice(tokens_BT, jnp.where(used_BT, columns_BT, cache.segments_BS.shape[1]),
                         used_BT.astype(jnp.int32), used_BT)
    no_queries_B1 = jnp.zeros_like(tokens_BT[:, :1])  # the logits of one column: the contract has some
    return guided_logits(logits_fn, canvas, no_queries_B1, cache, cfg_scale=cfg_scale, mask_id=mask_id)[1]


class SpecialIds(NamedTuple):
    """Token ids with a special meaning.

    Attributes:
      mask, eos, bos, pad: the special tokens.
      vocab_size: ids of the tokenizer. The network's V may be larger; ids from vocab_size on are never chosen.
      end_of_thinking: ids of the string that the end-of-thinking boost promotes, unless the settings give others.
      unused: ids of the tokenizer without a token; never chosen.
    """

    mask: int
    eos: int
    bos: int
    pad: int
    vocab_size: int
    end_of_thinking: tuple[int, ...] = ()
    unused: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any, settings: DecodeConfig | None = None) -> "SpecialIds":
        """The special ids of a `data.tokenizers.Tokenizer`; `settings` say whether the end of thinking is needed."""
        boosted = settings and settings.end_of_thinking_boost and not settings.end_of_thinking_ids
        return cls(tokenizer.mask_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id, tokenizer.vocab_size,
                   tuple(tokenizer.encode_behind(END_OF_THINKING)) if boosted else (), tokenizer.unused_ids)


def plain_logits_fn(function: Any) -> Partial:
    """Adapts `f(tokens_BL) -> logits_BLV`, a function or a Partial, to the contract of LogitsFn; without a cache."""
    return Partial(_query_plain, function if isinstance(function, Partial) else Partial(function))


def _query_plain(function, tokens_BT, positions_BT, segments_BT, query_columns_BQ, cache):
    del positions_BT, segments_BT
    logits_BTV = function(tokens_BT).astype(jnp.float32)
    return jnp.take_along_axis(logits_BTV, query_columns_BQ[:, :, None], axis=1), cache
