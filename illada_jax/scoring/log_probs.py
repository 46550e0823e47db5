"""Log-probabilities of hidden tokens, in a bounded number of compiled shapes.

Dimensions: B rows, L columns, Q hidden columns of a row, C candidate tokens of each of them, V vocabulary.
"""

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from illada_jax.decoding.kept import row_cache
from illada_jax.decoding.query import CanvasSlice, LogitsFn, SpecialIds, guided_logits
from illada_jax.model.cache import Cache
from illada_jax.parallel.hosts import fetch
from illada_jax.parallel.mesh import use_mesh
from illada_jax.parallel.sharding import batch_sharding, replicated

# Columns whose logits are in memory at the same time, twice as many under guidance; more only for a single row.
_MAX_QUERIED_COLUMNS = 1024
# Padding to this many costs almost nothing and saves compiled shapes.
_MIN_TARGETS = 4


class Query(NamedTuple):
    """A row with hidden columns.

    Attributes:
      tokens_L: int32 ids of the whole row.
      hidden_Q: int columns that the network sees as MASK, ascending, at least one.
      context_length: columns of the context, which guidance hides.
    """

    tokens_L: np.ndarray
    hidden_Q: np.ndarray
    context_length: int

    def visible(self) -> bytes:
        """The visible tokens: queries that agree in them, and in the length of the context, share an evaluation."""
        tokens_L = self.tokens_L.copy()
        tokens_L[self.hidden_Q] = -1
        return tokens_L.tobytes()


class TokenLogProbs(NamedTuple):
    """Natural log-probabilities at the hidden columns of a query, normalised over all ids.

    Attributes:
      log_probs_Q: float32, of the row's own token.
      best_Q: float32, of the most probable id.
    """

    log_probs_Q: np.ndarray
    best_Q: np.ndarray


@dataclass(repr=False, eq=False)
class LogProbEvaluator:
    """Evaluates queries with one network.

    Queries with the same visible tokens share an evaluation: candidates of one token, and the first steps of candidates
    of one length. A result does not depend on the other queries, except for its last bits.

    Attributes:
      logits_fn: the network. A Partial with other params does not compile again.
      max_length: the context of the network, in tokens.
      batch_size: maximal rows of a batch; fewer where many columns are queried.
      cfg_scale: classifier-free guidance that hides the context; 0 is none.
      mesh: devices to shard the rows over.
      init_cache: the network's `(rows, length) -> empty cache`, for contexts that are evaluated once, alone, for all
        queries: then a query evaluates what follows its context, which attends to the context's keys and values. That
        approximates a bidirectional network. None evaluates whole rows.
      evaluations: rows evaluated so far (twice as many under guidance), without padding.
    """

    logits_fn: LogitsFn
    ids: SpecialIds
    max_length: int
    batch_size: int
    cfg_scale: float = 0.0
    mesh: Mesh | None = None
    init_cache: Callable[[int, int], Cache] | None = None
    evaluations: int = 0
    _contexts: dict[bytes, Cache] = field(default_factory=dict)

    @property
    def _shards(self) -> int:
        return 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def __call__(self, queries: Sequence[Query]) -> list[TokenLogProbs]:
        """One result per query, in order."""
        same_input = defaultdict(list)
        for index, query in enumerate(queries):
            same_input[query.visible(), query.context_length].append(index)
        shapes = [self._padded_shape(query) for query in queries]
        groups = sorted(same_input.values(), key=lambda group: (shapes[group[0]], group[0]), reverse=True)
        batches = self._batches(groups, [shapes[group[0]] for group in groups])
        dispatched = [(batch, self._dispatch([[queries[index] for index in group] for group in batch]))
                      for batch in batches]
        results = {}
        for batch, result in dispatched:  # all batches are dispatched before the first is fetched
            log_probs_BQC, best_BQ = fetch(result)
            for row, group in enumerate(batch):
                for target, index in enumerate(group):
                    count = len(queries[index].hidden_Q)
                    results[index] = TokenLogProbs(log_probs_BQC[row, :count, target], best_BQ[row, :count])
        return [results[index] for index in range(len(queries))]

    def _padded_shape(self, query: Query) -> tuple[int, int, int]:
        """(Cached columns, evaluated columns, queried columns) of the query with padding."""
        cached = query.context_length if self.init_cache else 0
        lengths = (min(_rounded(length, 8), self.max_length) for length in (cached, len(query.tokens_L) - cached))
        return *lengths, _rounded(len(query.hidden_Q), 4)

    def _batches(self, groups: list[list[int]], shapes: list[tuple[int, int, int]]) -> Iterator[list[list[int]]]:
        """Cuts groups, sorted by descending shape, into batches; each is padded to the shape of its first group.

        A batch has a power of two of rows, hence no padded rows, except over a mesh, which takes whole shards.
        """
        start = 0
        while start < len(groups):
            end = start + 1
            while (end < len(groups) and end - start < self.batch_size and shapes[end][0] == shapes[start][0]
                   and (end + 1 - start) * max(shape[2] for shape in shapes[start : end + 1]) <= _MAX_QUERIED_COLUMNS):
                end += 1
            while start < end:
                rows = end - start
                size = rows if rows <= self._shards else 1 << (rows.bit_length() - 1)
                yield groups[start : start + size]
                start += size

    def _dispatch(self, batch: list[list[Query]]) -> tuple[jax.Array, jax.Array]:
        """Dispatches one batch; each of its rows holds all queries that share it."""
        cached, length, _ = self._padded_shape(batch[0][0])
        num_queried = max(self._padded_shape(group[0])[2] for group in batch)
        rows = -(-(1 << (len(batch) - 1).bit_length()) // self._shards) * self._shards
        num_targets = max(_MIN_TARGETS, 1 << (max(map(len, batch)) - 1).bit_length())
        tokens_BL = np.full((rows, length), self.ids.pad, np.int32)
        lengths_B, context_lengths_B = np.zeros((2, rows), np.int32)
        columns_BQ = np.zeros((rows, num_queried), np.int32)
        targets_BQC = np.zeros((rows, num_queried, num_targets), np.int32)
        for row, group in enumerate(batch):
            query = group[0]
            count = len(query.hidden_Q)
            start = query.context_length if cached else 0
            tokens_BL[row, : len(query.tokens_L) - start] = query.tokens_L[start:]
            tokens_BL[row, query.hidden_Q - start] = self.ids.mask
            lengths_B[row], context_lengths_B[row] = len(query.tokens_L), query.context_length
            columns_BQ[row, :count] = query.hidden_Q - start
            for target, query in enumerate(group):
                targets_BQC[row, :count, target] = query.tokens_L[query.hidden_Q]
        self.evaluations += len(batch) * (2 if self.cfg_scale else 1)
        arrays = tokens_BL, lengths_B, context_lengths_B, columns_BQ, targets_BQC
        sharding = None if self.mesh is None else batch_sharding(self.mesh)
        with contextlib.nullcontext() if self.mesh is None else use_mesh(self.mesh):
            caches = tuple(self._context(group[0], cached) for group in batch) if cached else ()
            return token_log_probs(self.logits_fn, *jax.device_put(arrays, sharding),
                                   caches + caches[:1] * (rows - len(caches)), mask_id=self.ids.mask,
                                   cfg_scale=self.cfg_scale)

    def _context(self, query: Query, columns: int) -> Cache:
        """Keys and values of the query's context, with padding; as many contexts as a batch has rows are remembered."""
        context_L = query.tokens_L[: query.context_length]
        cache = self._contexts.pop(key := context_L.tobytes(), None)
        if cache is None:
            self.evaluations += 2 if self.cfg_scale else 1
            inputs = np.resize(context_L, (1, columns)), np.int32([0]), np.int32([len(context_L)])
            inputs = jax.device_put(inputs, None if self.mesh is None else replicated(self.mesh))
            cache = row_cache(self.logits_fn, None, *inputs, init_cache=self.init_cache, cfg_scale=self.cfg_scale,
                              mask_id=self.ids.mask)
        self._contexts[key] = cache  # the latest is the last
        if len(self._contexts) > self.batch_size:
            del self._contexts[next(iter(self._contexts))]
        return cache


def _rounded(count: int, parts: int) -> int:
    """Columns rounded up to a multiple of 8 and of 1/parts of the power of two below: few sizes, little padding."""
    step = max(8, (1 << count.bit_length()) // 2 // parts)
    return -(-count // step) * step


@functools.partial(jax.jit, static_argnames=("mask_id", "cfg_scale"))
def token_log_probs(logits_fn: LogitsFn, tokens_BL: jax.Array, lengths_B: jax.Array, context_lengths_B: jax.Array,
                    columns_BQ: jax.Array, targets_BQC: jax.Array, caches: tuple[Cache, ...] = (), *, mask_id: int,
                    cfg_scale: float) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of the targets, float32 [B, Q, C], and of the most probable id, float32 [B, Q].

    Rows hold MASK in hidden columns, `lengths_B` columns and then padding; guidance hides the first `context_lengths_B`
    columns. `columns_BQ` are the columns to query, `targets_BQC` the ids to evaluate at each of them. With the `caches`
    of the rows' contexts, tokens and columns are those behind the context.
    """
    positions_BL = jax.lax.broadcasted_iota(jnp.int32, tokens_BL.shape, 1)
    cache = None
    if caches:
        positions_BL += context_lengths_B[:, None]
        cache = jax.tree.map(lambda *rows: jnp.concatenate(rows, axis=rows[0].ndim // 2 - 1), *caches)
    segments_BL = (positions_BL < lengths_B[:, None]).astype(jnp.int32)
    canvas = CanvasSlice(tokens_BL, positions_BL, segments_BL, positions_BL < context_lengths_B[:, None])
    logits_BQV, _ = guided_logits(logits_fn, canvas, columns_BQ, cache, cfg_scale=cfg_scale, mask_id=mask_id)
    return log_softmax_at(logits_BQV, targets_BQC)


def log_softmax_at(logits_BQV: jax.Array, targets_BQC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log softmax at the targets and its maximum, without saturation and without an array of all log-probabilities.

    With m the largest logit, log p(c) = (z_c - m) - log1p(Σ of the others' exp(z_v - m)): a probability that float32
    rounds to 1 keeps its distance from 1, so that confident positions do not tie. Both results are float32.
    """
    max_BQ1 = jnp.max(logits_BQV, axis=-1, keepdims=True)
    is_max_BQV = logits_BQV == max_BQ1
    # One of the largest is m itself; further ones count as others.
    others_BQ = jnp.sum(jnp.where(is_max_BQV, 0.0, jnp.exp(logits_BQV - max_BQ1)), axis=-1)
    others_BQ += jnp.sum(is_max_BQV, axis=-1, dtype=jnp.float32) - 1
    best_BQ = -jnp.log1p(others_BQ)
    return jnp.take_along_axis(logits_BQV, targets_BQC, axis=-1) - max_BQ1 + best_BQ[:, :, None], best_BQ
