"""The map between our params (stacked layers, [in, out]) and the tensors of a family (one per layer, [out, in]).

A param is named by its path, such as `layers/attention/q`.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import numpy as np
from flax import traverse_util

from illada_jax import model
from illada_jax.config import ModelConfig
from illada_jax.interop.families import Family
from illada_jax.model.int8 import INPUT_AXES


@dataclasses.dataclass(frozen=True)
class TensorMapping:
    """One tensor of a checkpoint and the part of a param that it holds.

    Attributes:
      name: name of the tensor.
      path: path of the param.
      layer: index into the stacked param; None if the param is not stacked.
      param_shape: shape of the param, without the layer axis.
      shape: shape of the tensor: `param_shape`, or [out, in] for a matrix.
    """

    name: str
    path: str
    layer: int | None
    param_shape: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def input_axes(self) -> int:
        """The number of leading axes of `param_shape` that are inputs of a matrix; 0 if it is not a matrix."""
        return INPUT_AXES.get(self.path, 0)

    def tensor_index(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """The slice of the tensor that corresponds to a slice of the param."""
        index = tuple(slice(*part.indices(size)) for part, size in zip(index, self.param_shape, strict=True))
        if not self.input_axes:
            return index
        inputs, outputs = (_flat(index[part], self.param_shape[part])
                           for part in (slice(self.input_axes), slice(self.input_axes, None)))
        return outputs, inputs

    def to_param(self, tensor: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        """The slice of the param, from the slice of the tensor at `tensor_index(index)`."""
        shape = [len(range(*part.indices(size))) for part, size in zip(index, self.param_shape, strict=True)]
        return (tensor.T if self.input_axes else tensor).reshape(shape)

    def to_tensor(self, param: np.ndarray) -> np.ndarray:
        """The tensor, from the whole param of its layer."""
        return param.reshape(self.shape[::-1]).T if self.input_axes else param


def _flat(index: tuple[slice, ...], sizes: tuple[int, ...]) -> slice:
    """A slice of the flattened axes. Only the first axis may be cut: heads are sharded, head_dim never is."""
    rest = math.prod(sizes[1:])
    if any((part.start, part.stop) != (0, size) for part, size in zip(index[1:], sizes[1:], strict=True)):
        raise ValueError(f"an inner axis is sharded: {index} of {sizes}")
    return slice(index[0].start * rest, index[0].stop * rest)


def tensor_mappings(family: Family, config: ModelConfig) -> Iterator[TensorMapping]:
    """The tensors of a checkpoint of `family` with this model, in the order of the params."""
    for path, shape in param_shapes(config).items():
        stacked = path.startswith("layers/")
        param_shape = shape[1:] if stacked else shape
        inputs = INPUT_AXES.get(path, 0)
        matrix = math.prod(param_shape[inputs:]), math.prod(param_shape[:inputs])
        for layer in range(shape[0]) if stacked else (None,):
            yield TensorMapping(family.tensors[path].format(layer), path, layer, param_shape,
                                matrix if inputs else param_shape)


def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the params by path; allocates nothing."""
    shapes = jax.eval_shape(functools.partial(model.init_params, config), jax.random.key(0))
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items()}
