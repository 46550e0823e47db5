"""The one struct that data hands to training. Numpy only: `data` knows no jax."""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Rows of tokens and what may be done to them (a jax pytree, as every NamedTuple is).

    B is rows, L is positions. Pre-training and fine-tuning share it.

    Attributes:
      tokens_BL: int32 token ids.
      maskable_BL: bool, True where the token may be masked and counts in the loss. False for padding and,
        in LLaDA-style fine-tuning, for the prompt.
      segments_BL: int32, 0 for padding, 1, 2, … for sequences; a token attends within its own segment only.
      positions_BL: int32, restarting at 0 in every segment.
      weights_BL: float32 weight of a position in the loss: 1, or 1 / answer length.
    """

    tokens_BL: np.ndarray
    maskable_BL: np.ndarray
    segments_BL: np.ndarray
    positions_BL: np.ndarray
    weights_BL: np.ndarray
