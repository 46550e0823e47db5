"""The map between our params (stacked layers, [in, out]) and the tensors of a family (one per layer, [out, in])."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from flax import traverse_util

from illada_jax import model
from illada_jax.config import ModelConfig
from illada_jax.interop.families import Family
from illada_jax.model.int8 import INPUT_AXES


@dataclasses.dataclass(frozen=True)
class TensorMapping:
    """One tensor of a checkpoint and the part of a param that it holds."""

    name: str  # of the tensor
    path: str  # of the param, such as `layers/attention/q`
    layer: int | None  # index into the stacked param; None if the param is not stacked
    param_shape: tuple[int, ...]  # without the layer axis
    shape: tuple[int, ...]  # of the tensor: `param_shape`, or [out, in] for a matrix

    @property
    def input_axes(self) -> int:
        """The number of leading axes of `param_shape` that are inputs of a matrix; 0 if it is not a matrix."""
        return INPUT_AXES.get(self.path, 0)

    def tensor_index(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """The slice of the tensor that corresponds to a slice of the param.

        Of the inputs and of the outputs of a matrix only the first axis may be cut: heads are sharded, head_dim is not.
        """
        if not self.input_axes:
            return index
        parts = []
        for axis, size in zip((self.input_axes, 0), self.shape, strict=True):
            start, stop, _ = index[axis].indices(self.param_shape[axis])
            width = size // self.param_shape[axis]
            parts.append(slice(start * width, stop * width))
        return tuple(parts)

    def to_param(self, tensor: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        """The slice of the param, from the slice of the tensor at `tensor_index(index)`."""
        shape = [len(range(*part.indices(size))) for part, size in zip(index, self.param_shape, strict=True)]
        return (tensor.T if self.input_axes else tensor).reshape(shape)

    def to_tensor(self, param: np.ndarray) -> np.ndarray:
        """The tensor, from the whole param of its layer."""
        return param.reshape(self.shape[::-1]).T if self.input_axes else param


def tensor_mappings(family: Family, config: ModelConfig) -> Iterator[TensorMapping]:
    """The tensors of a checkpoint of `family` with this model, in the order of the params."""
    params = model.abstract_params(config)
    for path, param in traverse_util.flatten_dict(params, sep="/").items():
        stacked = path.startswith("layers/")
        shape = param.shape[1:] if stacked else param.shape
        inputs = INPUT_AXES.get(path, 0)
        matrix = math.prod(shape[inputs:]), math.prod(shape[:inputs])
        for layer in range(param.shape[0]) if stacked else (None,):
            yield TensorMapping(family.tensors[path].format(layer), path, layer, shape, matrix if inputs else shape)
