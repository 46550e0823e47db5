"""Looking at rows with hidden tokens: log-probabilities of what is hidden, in a bounded number of compiled shapes.

Dimensions: B rows, L columns, Q hidden columns of a row, C tokens that are asked for at each of them, V vocabulary.
"""

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from illada_jax.decoding.query import CanvasSlice, LogitsFn, SpecialIds, guided_logits
from illada_jax.parallel.mesh import use_mesh
from illada_jax.parallel.sharding import batch_sharding

# Logits of at most this many columns exist at a time, unless one row alone asks for more.
_COLUMNS_AT_ONCE = 1024
# Padding up to here costs next to nothing and saves shapes to compile.
_FEWEST_CHOICES = 4


class Query(NamedTuple):
    """A row, and what of it is hidden.

    Attributes:
      tokens_L: int32, the whole row.
      hidden_Q: int, columns that the network sees as MASK, ascending, at least one.
      context_length: columns at the start that are given; guidance hides them.
    """

    tokens_L: np.ndarray
    hidden_Q: np.ndarray
    context_length: int


class TokenLogProbs(NamedTuple):
    """What the network says about the hidden columns of a query.

    Attributes:
      log_probs_Q: float32, log-probability of the token that is there, over all ids.
      best_Q: float32, log-probability of the most probable id.
    """

    log_probs_Q: np.ndarray
    best_Q: np.ndarray


class LogProbEvaluator:
    """Answers queries with one network.

    Rows that look the same to the network are computed once, whatever is asked of them: candidates of one token share
    an evaluation, and so do the first steps of candidates of one length. What is answered does not depend on the other
    queries, but for the last bits.

    Attributes:
      evaluations: rows that the network has evaluated (twice as many under guidance), without padding.
    """

    def __init__(self, logits_fn: LogitsFn, ids: SpecialIds, max_length: int, batch_size: int, cfg_scale: float = 0.0,
                 mesh: Mesh | None = None):
        """Prepares looking; nothing is compiled yet.

        Args:
          logits_fn: the network. A Partial with other params does not compile again.
          ids: ids with a meaning.
          max_length: the context of the network.
          batch_size: rows of a batch, at most; fewer where many columns are asked for.
          cfg_scale: classifier-free guidance w: logits_u + (w + 1)·(logits_c - logits_u), u without the context.
          mesh: devices to spread the rows over.
        """
        self.evaluations = 0
        self._logits_fn = logits_fn
        self._ids = ids
        self._max_length = max_length
        self._batch_size = batch_size
        self._cfg_scale = cfg_scale
        self._mesh = mesh
        self._shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]

    def __call__(self, queries: Sequence[Query]) -> list[TokenLogProbs]:
        """One answer for each query, in their order."""
        alike = defaultdict(list)
        for index, query in enumerate(queries):
            canvas_L = query.tokens_L.copy()
            canvas_L[query.hidden_Q] = self._ids.mask
            alike[canvas_L.tobytes(), query.context_length].append(index)
        groups = sorted(alike.values(), key=lambda group: (self._shape(queries[group[0]]), group[0]), reverse=True)
        started = [(batch, self._start([[queries[index] for index in group] for group in batch]))
                   for batch in self._batches(groups, queries)]
        results = {}
        for batch, result in started:  # all batches are on their way before the first is waited for
            log_probs_BQC, best_BQ = jax.device_get(result)
            for row, group in enumerate(batch):
                for choice, index in enumerate(group):
                    count = len(queries[index].hidden_Q)
                    results[index] = TokenLogProbs(log_probs_BQC[row, :count, choice], best_BQ[row, :count])
        return [results[index] for index in range(len(queries))]

    def _shape(self, query: Query) -> tuple[int, int]:
        """Columns and queried columns that the query is padded to."""
        length, num_queried = len(query.tokens_L), len(query.hidden_Q)
        return min(_rounded(length, 8), self._max_length), _rounded(num_queried, 4)

    def _batches(self, groups: list[list[int]], queries: Sequence[Query]) -> list[list[list[int]]]:
        """Cuts groups, sorted by descending shape, into batches; each is padded to its first.

        Their numbers of rows are powers of two, so that none is padding (but over a mesh, which takes whole shards).
        """
        batches: list[list[list[int]]] = []
        widest = 0
        for group in groups:
            num_queried = self._shape(queries[group[0]])[1]
            widest = max(widest, num_queried)
            if (not batches or len(batches[-1]) == self._batch_size
                    or (len(batches[-1]) + 1) * widest > _COLUMNS_AT_ONCE):
                batches.append([])
                widest = num_queried
            batches[-1].append(group)
        return [part for batch in batches for part in self._powers(batch)]

    def _powers(self, batch: list[list[int]]) -> Iterator[list[list[int]]]:
        while batch:
            size = len(batch) if len(batch) <= self._shards else 1 << (len(batch).bit_length() - 1)
            yield batch[:size]
            batch = batch[size:]

    def _start(self, batch: list[list[Query]]) -> tuple[jax.Array, jax.Array]:
        """Dispatches one batch, each of its rows with all queries that share it."""
        length = self._shape(batch[0][0])[0]
        num_queried = max(self._shape(group[0])[1] for group in batch)
        rows = -(-(1 << (len(batch) - 1).bit_length()) // self._shards) * self._shards
        choices = max(_FEWEST_CHOICES, 1 << (max(map(len, batch)) - 1).bit_length())
        tokens_BL = np.full((rows, length), self._ids.pad, np.int32)
        lengths_B, contexts_B = np.zeros((2, rows), np.int32)
        columns_BQ = np.zeros((rows, num_queried), np.int32)
        targets_BQC = np.zeros((rows, num_queried, choices), np.int32)
        for row, group in enumerate(batch):
            query = group[0]
            count = len(query.hidden_Q)
            tokens_BL[row, : len(query.tokens_L)] = query.tokens_L
            tokens_BL[row, query.hidden_Q] = self._ids.mask
            lengths_B[row], contexts_B[row] = len(query.tokens_L), query.context_length
            columns_BQ[row, :count] = query.hidden_Q
            for choice, query in enumerate(group):
                targets_BQC[row, :count, choice] = query.tokens_L[query.hidden_Q]
        self.evaluations += len(batch) * (2 if self._cfg_scale else 1)
        arrays = tokens_BL, lengths_B, contexts_B, columns_BQ, targets_BQC
        settings = {"mask_id": self._ids.mask, "cfg_scale": self._cfg_scale}
        if self._mesh is None:
            return token_log_probs(self._logits_fn, *jax.device_put(arrays), **settings)
        with use_mesh(self._mesh):
            return token_log_probs(self._logits_fn, *jax.device_put(arrays, batch_sharding(self._mesh)), **settings)


def _rounded(count: int, parts: int) -> int:
    """Columns rounded up to a multiple of 8, and of a part of the power of two below them: few sizes, little waste."""
    step = max(8, (1 << (count.bit_length() - 1)) // parts)
    return -(-count // step) * step


@functools.partial(jax.jit, static_argnames=("mask_id", "cfg_scale"))
def token_log_probs(logits_fn: LogitsFn, tokens_BL: jax.Array, lengths_B: jax.Array, context_lengths_B: jax.Array,
                    columns_BQ: jax.Array, targets_BQC: jax.Array, *, mask_id: int, cfg_scale: float,
                    ) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of target tokens, with guidance that hides the context.

    Args:
      logits_fn: the network.
      tokens_BL: int32 rows, MASK in hidden columns.
      lengths_B: int32, columns of each row; the rest is padding.
      context_lengths_B: int32, columns of each row's context.
      columns_BQ: int32 columns to query.
      targets_BQC: int32 ids to evaluate at each of them.
      mask_id: id of MASK.
      cfg_scale: classifier-free guidance; 0 is none.

    Returns:
      (log-probabilities of the targets, float32 [B, Q, C]; of the most probable id, float32 [B, Q]).

    Raises:
      AssertionError: shapes do not match.
    """
    rows = len(tokens_BL)
    chex.assert_shape([lengths_B, context_lengths_B], (rows,))
    chex.assert_shape(targets_BQC, (rows, columns_BQ.shape[1], None))
    positions_BL = jax.lax.broadcasted_iota(jnp.int32, tokens_BL.shape, 1)
    segments_BL = (positions_BL < lengths_B[:, None]).astype(jnp.int32)
    canvas = CanvasSlice(tokens_BL, positions_BL, segments_BL, positions_BL < context_lengths_B[:, None])
    logits_BQV, _ = guided_logits(logits_fn, canvas, columns_BQ, cfg_scale=cfg_scale, mask_id=mask_id)
    return log_softmax_at(logits_BQV, targets_BQC)


def log_softmax_at(logits_BQV: jax.Array, targets_BQC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log softmax at the targets and its maximum, without saturation and without an array of all log-probabilities.

    With m the largest logit, log p(c) = (z_c - m) - log1p(Σ of the others' exp(z_v - m)): a probability that float32
    rounds to 1 keeps its distance from 1, so that confident positions do not tie.

    Args:
      logits_BQV: float32.
      targets_BQC: int32 ids.

    Returns:
      (float32 [B, Q, C], float32 [B, Q]), natural logarithms.
    """
    max_BQ1 = jnp.max(logits_BQV, axis=-1, keepdims=True)
    is_max_BQV = logits_BQV == max_BQ1
    # One of the largest is m itself; further ones count as others.
    others_BQ = jnp.sum(jnp.where(is_max_BQV, 0.0, jnp.exp(logits_BQV - max_BQ1)), axis=-1)
    others_BQ += jnp.sum(is_max_BQV, axis=-1, dtype=jnp.float32) - 1
    best_BQ = -jnp.log1p(others_BQ)
    return jnp.take_along_axis(logits_BQV, targets_BQC, axis=-1) - max_BQ1 + best_BQ[:, :, None], best_BQ
