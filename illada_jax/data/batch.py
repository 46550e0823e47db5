"""The struct that is passed from data to training. NumPy only: `data` does not import JAX."""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """B rows of L tokens, for pre-training and fine-tuning. As a NamedTuple it is a JAX pytree.

    Attributes:
      tokens_BL: int32 token ids.
      maskable_BL: bool, True where the token may be masked and counts in the loss. False for padding and,
        in LLaDA-style fine-tuning, for the prompt.
      segments_BL: int32, 0 for padding, 1, 2, … for sequences; a token attends only to its own segment.
      positions_BL: int32, from 0 in every segment.
      weights_BL: float32 weight of a position in the loss: 1, or 1 / answer length.
    """

    tokens_BL: np.ndarray
    maskable_BL: np.ndarray
    segments_BL: np.ndarray
    positions_BL: np.ndarray
    weights_BL: np.ndarray
