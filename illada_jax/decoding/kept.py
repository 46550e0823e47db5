"""Keys and values of the cache `append` between calls of the loop: on the device, from block to block and turn to turn.

A prompt is evaluated alone, on the canvas of its own bucket, and inserted into the batch; so its keys and values do not
depend on the other rows. For n buckets at most n programs evaluate prompts, and n·(n + 1)/2 insert them, n·(n - 1) move
the batch to another bucket, by copying; the loop is compiled n times, as for every cache. With reuse, n·(n + 1)/2 more
evaluate what follows a kept prefix. A cache holds 2 · layers · rows · columns · kv_heads · head_dim values, twice that
under guidance; while it moves, the old one is there, too.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from illada_jax.decoding.loop import Carry, Rules
from illada_jax.decoding.query import LogitsFn, keep_columns
from illada_jax.model.cache import Cache
from illada_jax.parallel.hosts import fetch
from illada_jax.parallel.sharding import RULES, replicated


@dataclass
class KeptPrefix:
    """The columns of the last finished row, for a prompt that begins with the same tokens.

    Attributes:
      tokens: ids of the columns that the cache holds.
      cache: their keys and values, a cache of one row (of two under guidance); None at first.
    """

    tokens: list[int] = field(default_factory=list)
    cache: Cache | None = None

    def common(self, tokens: Sequence[int], passes: int) -> int:
        """The number of leading tokens whose keys and values are here."""
        if self.cache is None or len(self.cache.segments_BS) != passes:
            return 0
        pairs = enumerate(zip(self.tokens, tokens, strict=False))
        return next((column for column, (old, new) in pairs if old != new), min(len(self.tokens), len(tokens)))


@dataclass
class KeptRows:
    """Keys and values of the rows of a batch.

    Attributes:
      logits_fn, rules, buckets, mesh: see `Decoder`.
      refresh: blocks between evaluations of all that a row has; 0 is never.
      prefix: what earlier calls have left, or None.
      cache: the cache, on the device; the loop updates it.
    """

    logits_fn: LogitsFn
    rules: Rules
    buckets: Sequence[int]
    mesh: Mesh | None
    refresh: int
    prefix: KeptPrefix | None = None
    cache: Cache | None = None

    def prepare(self, rows: Sequence[Carry], length: int) -> int | None:
        """Moves the cache to a canvas of `length` columns, and evaluates new rows and those to refresh.

        Returns:
          The number of blocks before the next refresh; None if there is none.
        """
        if self.cache is None:
            self.cache = _empty(self.rules.init_cache, self.rules.passes * len(rows), length, self.mesh)
        elif self.cache.segments_BS.shape[1] != length:
            self.cache = _resized(self.cache, length)
        remaining = []
        for slot, row in enumerate(rows):
            if row.done_B[0]:
                continue
            end, start = int(row.length_B[0]), int(row.prompt_B[0])
            blocks = -(-(end - start) // self.rules.settings.block_length)
            if not blocks or (self.refresh and blocks % self.refresh == 0):
                tokens = row.tokens_BL[0, :end].tolist()
                self.cache = _insert(self.cache, self._evaluate(tokens, None if blocks else self.prefix), slot)
            remaining.append(self.refresh - blocks % self.refresh if self.refresh else 0)
        return min(remaining) or None

    def _evaluate(self, tokens: list[int], prefix: KeptPrefix | None) -> Cache:
        """A cache of one row that holds the tokens; only those behind a kept prefix are evaluated."""
        common = prefix.common(tokens, self.rules.passes) if prefix else 0
        new = tokens[common:]
        canvas, width = (next(length for length in self.buckets if length >= len(ids)) for ids in (tokens, new))
        tokens_1T = np.array([new + [self.rules.mask_id] * (width - len(new))], np.int32)
        kept = _resized(prefix.cache, canvas) if common else None
        inputs = tokens_1T, np.int32([common]), np.int32([len(tokens)])
        inputs = jax.device_put(inputs, None if self.mesh is None else replicated(self.mesh))
        return row_cache(self.logits_fn, kept, *inputs, init_cache=self.rules.init_cache,
                         cfg_scale=self.rules.settings.cfg_scale, mask_id=self.rules.mask_id)

    def leave(self, slot: int, row: Carry) -> None:
        """Leaves the keys and values of a finished row to later calls."""
        if self.prefix is not None:
            self.prefix.cache = _row(self.cache, slot, self.rules.passes)
            self.prefix.tokens = row.tokens_BL[0, : int(fetch(self.prefix.cache.lengths_B)[0])].tolist()


@functools.partial(jax.jit, static_argnames=("init_cache", "cfg_scale", "mask_id"))
def row_cache(logits_fn: LogitsFn, kept: Cache | None, tokens_1T: jax.Array, first_1: jax.Array, end_1: jax.Array, *,
              init_cache: Callable[[int, int], Cache], cfg_scale: float, mask_id: int) -> Cache:
    """A cache of one row (of two under guidance): its first columns are kept ones, the others are evaluated."""
    if kept is None:
        cache = init_cache(2 if cfg_scale else 1, tokens_1T.shape[1]).replace(writes=True)
    else:
        columns_BS = jax.lax.broadcasted_iota(jnp.int32, kept.segments_BS.shape, 1)
        cache = kept.replace(segments_BS=jnp.where(columns_BS < first_1[:, None], kept.segments_BS, 0), appends=True)
    return keep_columns(logits_fn, cache, tokens_1T, first_1, end_1, cfg_scale=cfg_scale, mask_id=mask_id)


@functools.partial(jax.jit, donate_argnums=0)
def _insert(cache: Cache, row: Cache, slot: jax.Array) -> Cache:
    """The cache with the row in a slot, in place."""
    segments_BS = jnp.pad(row.segments_BS, ((0, 0), (0, cache.segments_BS.shape[1] - row.segments_BS.shape[1])))
    first = slot * len(segments_BS)
    return cache.replace(
        keys_YBSKH=jax.lax.dynamic_update_slice_in_dim(cache.keys_YBSKH, row.keys_YBSKH, first, 1),
        values_YBSKH=jax.lax.dynamic_update_slice_in_dim(cache.values_YBSKH, row.values_YBSKH, first, 1),
        segments_BS=jax.lax.dynamic_update_slice_in_dim(cache.segments_BS, segments_BS, first, 0))


@functools.partial(jax.jit, static_argnames="passes")
def _row(cache: Cache, slot: jax.Array, passes: int) -> Cache:
    """The cache of the row in a slot."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot * passes, passes, x.ndim // 2 - 1), cache)


@functools.partial(jax.jit, static_argnames="length")
def _resized(cache: Cache, length: int) -> Cache:
    """The first columns of the cache, or more of them."""
    def resized(x: jax.Array) -> jax.Array:
        axis = x.ndim // 2
        x = jax.lax.slice_in_dim(x, 0, min(length, x.shape[axis]), axis=axis)
        return jnp.pad(x, [(0, length - x.shape[axis] if each == axis else 0) for each in range(x.ndim)])

    return jax.tree.map(resized, cache)


def _empty(init_cache: Callable[[int, int], Cache], rows: int, length: int, mesh: Mesh | None) -> Cache:
    """An empty cache."""
    if mesh is None:
        return init_cache(rows, length)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_cache(init_cache, rows, length, mesh))
    return jax.jit(init_cache, static_argnums=(0, 1), out_shardings=shardings)(rows, length)


def abstract_cache(init_cache: Callable[[int, int], Cache], rows: int, length: int, mesh: Mesh) -> Cache:
    """The cache as ShapeDtypeStructs: rows are sharded as in a batch, heads over `tensor` if it divides them."""
    def abstract(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec(RULES["batch"])
        if x.ndim > 2:
            heads = RULES["heads_act"] if x.shape[3] % mesh.shape[RULES["heads_act"]] == 0 else None
            spec = PartitionSpec(None, RULES["batch"], None, heads)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(abstract, jax.eval_shape(lambda: init_cache(rows, length)))
