"""Windows of a token stream as the rows of a Batch. Pure numpy."""

from collections.abc import Sequence

import numpy as np

from illada_jax.data.batch import Batch


def num_windows(num_tokens: int, length: int) -> int:
    """How many windows of `length` cover a stream. The last one may be shorter; no token is left out."""
    return -(-num_tokens // length)


def window_bounds(index: int, num_tokens: int, length: int) -> tuple[int, int]:
    """The tokens [start, stop) of window `index`.

    >>> [window_bounds(index, num_tokens=10, length=4) for index in range(num_windows(10, 4))]
    [(0, 4), (4, 8), (8, 10)]
    """
    return index * length, min((index + 1) * length, num_tokens)


def pack(windows: Sequence[np.ndarray], length: int, pad_id: int, starts: Sequence[Sequence[int]] = ()) -> Batch:
    """Windows as rows.

    Args:
      windows: B arrays of int32 ids, each of at most `length`.
      length: L; what is short is padded: segment 0, not maskable, weight 0.
      pad_id: the id of the padding.
      starts: for each row the columns, beside 0, where a segment begins; empty: rows are single segments.

    Returns:
      A Batch [B, L]: segments are numbered from 1, positions restart in each, weights are 1.
    """
    shape = len(windows), length
    tokens_BL = np.full(shape, pad_id, np.int32)
    used_B = np.array([len(window) for window in windows])
    for row, window in enumerate(windows):
        tokens_BL[row, : len(window)] = window
    column_L = np.arange(length, dtype=np.int32)
    real_BL = column_L < used_B[:, None]
    segments_BL = real_BL.astype(np.int32)
    positions_BL = np.where(real_BL, column_L, 0)
    if any(len(columns) for columns in starts):
        begins_BL = np.zeros(shape, bool)
        for row, columns in enumerate(starts):
            begins_BL[row, columns] = True
        begins_BL[:, 0] = True
        segments_BL *= np.cumsum(begins_BL, axis=1, dtype=np.int32)
        first_BL = np.maximum.accumulate(np.where(begins_BL, column_L, 0), axis=1)
        positions_BL = np.where(real_BL, column_L - first_BL, 0)
    return Batch(tokens_BL, real_BL, segments_BL, positions_BL, real_BL.astype(np.float32))


def document_starts(tokens: np.ndarray, eos_id: int) -> np.ndarray:
    """Columns where another document begins: after every EOS but a last one."""
    return np.flatnonzero(tokens[:-1] == eos_id) + 1
