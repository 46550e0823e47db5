"""How our params, stacked layers and [in, out], lie in the tensors of a family, a tensor a layer and [out, in].

A param is named by its path, such as `layers/attention/q`.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from illada_jax import model
from illada_jax.config import ModelConfig
from illada_jax.interop.families import Family
from illada_jax.model.int8 import INPUT_AXES


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor and where its content belongs.

    Attributes:
      name: of the tensor.
      path: of the param.
      layer: the row of the stacked param, or None where the param is not stacked.
      inner: shape of the param, without the layers.
      shape: shape of the tensor: `inner`, or [out, in] for a matrix.
    """

    name: str
    path: str
    layer: int | None
    inner: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def input_axes(self) -> int:
        """How many axes of `inner`, the first, are inputs of a matrix; 0 for what is no matrix."""
        return INPUT_AXES.get(self.path, 0)

    def source_index(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """The slice of the tensor that a slice of `inner` is made of."""
        index = tuple(slice(*part.indices(size)) for part, size in zip(index, self.inner, strict=True))
        if not self.input_axes:
            return index
        inputs, outputs = self._split(index)
        return (_flat(outputs, self._split(self.inner)[1]), _flat(inputs, self._split(self.inner)[0]))

    def to_param(self, tensor: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        """The slice of `inner`, from the slice of the tensor at `source_index(index)`."""
        shape = [len(range(*part.indices(size))) for part, size in zip(index, self.inner, strict=True)]
        return (tensor.T if self.input_axes else tensor).reshape(shape)

    def to_tensor(self, param: np.ndarray) -> np.ndarray:
        """The tensor, from the whole of `inner`."""
        return param.reshape(self.shape[::-1]).T if self.input_axes else param

    def _split(self, items: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return items[: self.input_axes], items[self.input_axes :]


def _flat(index: tuple[slice, ...], sizes: tuple[int, ...]) -> slice:
    """A slice of the flattened axes. Only the first of them may be cut: heads are, head_dim never is."""
    rest = math.prod(sizes[1:])
    if any((part.start, part.stop) != (0, size) for part, size in zip(index[1:], sizes[1:], strict=True)):
        raise ValueError(f"an inner axis is sharded: {index} of {sizes}")
    return slice(index[0].start * rest, index[0].stop * rest)


def entries(family: Family, config: ModelConfig) -> Iterator[Entry]:
    """The tensors that a checkpoint of `family` with this model consists of, param by param."""
    for path, shape in param_shapes(config).items():
        stacked = path.startswith("layers/")
        inner = shape[1:] if stacked else shape
        inputs = INPUT_AXES.get(path, 0)
        there = (math.prod(inner[inputs:]), math.prod(inner[:inputs])) if inputs else inner
        for layer in range(shape[0]) if stacked else (None,):
            yield Entry(family.tensors[path].format(layer), path, layer, inner, there)


def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the params by path; nothing is allocated."""
    shapes = jax.eval_shape(functools.partial(model.init_params, config), jax.random.key(0))
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items()}
