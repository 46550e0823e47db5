"""Eight-bit weights for decoding and scoring: symmetric, one scale for each output channel, activations as they are.

Embeddings (so also a tied head) and norms stay as they are. An 8B model then fits one chip of 16 GB.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct, traverse_util
from jax.sharding import PartitionSpec

# The matrices among the params, by path: how many of their axes, after `layers`, are inputs; the others are outputs.
INPUT_AXES = {
    "layers/attention/q": 1,
    "layers/attention/k": 1,
    "layers/attention/v": 1,
    "layers/attention/o": 2,
    "layers/mlp/gate": 1,
    "layers/mlp/up": 1,
    "layers/mlp/down": 1,
    "head": 1,
}


@struct.dataclass
class Int8:
    """A matrix, w ≈ values · scale, in the place of the float array among the params; `dense` takes either.

    Attributes:
      values: int8, the shape of w; first, for flax compares its shape with that of the param.
      scale: float32, one for each output channel: the shape of w without its input axes.
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of w."""
        return self.values.shape

    def reshape(self, inputs: int, outputs: int) -> "Int8":
        """The matrix of one layer as [inputs, outputs]; one of them may be -1."""
        return Int8(self.values.reshape(inputs, outputs), self.scale.reshape(-1))


def quantize_params(params: Any) -> Any:
    """The params of a model with every matrix as Int8."""
    return _map_matrices(params, quantize_matrix)


def quantize_matrix(path: str, w: jax.Array) -> Int8:
    """The param called `path`, one of INPUT_AXES, as Int8."""
    return quantize(w, INPUT_AXES[path], first=int(path.startswith("layers/")))


def quantized_axes(axes: Any) -> Any:
    """The logical axis names of `quantize_params(params)`, from those of the params (`model.param_axes`)."""
    def both(path: str, spec: PartitionSpec) -> Int8:
        first = int(path.startswith("layers/"))
        return Int8(spec, PartitionSpec(*spec[:first], *spec[first + INPUT_AXES[path] :]))

    return _map_matrices(axes, both)


def _map_matrices(tree: Any, function: Any) -> Any:
    leaves = traverse_util.flatten_dict(tree, sep="/")
    changed = {path: function(path, leaf) for path, leaf in leaves.items() if path in INPUT_AXES}
    return traverse_util.unflatten_dict({**leaves, **changed}, sep="/")


def quantize(w: jax.Array, input_axes: int, first: int = 0) -> Int8:
    """Rounds a matrix to Int8; a channel of zeros has scale 1.

    Args:
      w: float array; axes before `first` (layers) are neither inputs nor outputs.
      input_axes: number of input axes, from axis `first` on.
      first: the first axis of the matrix.
    """
    axes = tuple(range(first, first + input_axes))
    largest = jnp.max(jnp.abs(w), axis=axes, keepdims=True).astype(jnp.float32)
    scale = jnp.where(largest > 0, largest / 127, 1.0)
    values = jnp.round(w.astype(jnp.float32) / scale).astype(jnp.int8)
    return Int8(values, jnp.squeeze(scale, axes))
