"""Weight-only int8 quantisation for decoding and scoring: symmetric, one scale per output channel.

Activations, embeddings (hence a tied head) and norms are not quantised. An 8B model then fits one chip of 16 GB.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct, traverse_util
from jax.sharding import PartitionSpec

# Number of input axes, after `layers`, of each matrix param by path; the other axes are outputs.
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
    """A quantised matrix, w ≈ values · scale, which replaces the float array among the params.

    Attributes:
      values: int8 [shape of w]. The first field, as flax compares its shape with that of the param.
      scale: float32 [shape of w without its input axes], one per output channel.
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of w."""
        return self.values.shape

    def reshape(self, inputs: int, outputs: int) -> "Int8":
        """The matrix of one layer as [inputs, outputs], of which one may be -1."""
        return Int8(self.values.reshape(inputs, outputs), self.scale.reshape(-1))


def quantize_params(params: Any) -> Any:
    """Params with every matrix as Int8."""
    return _map_matrices(params, quantize_matrix)


def quantize_matrix(path: str, w: jax.Array) -> Int8:
    """The param at `path`, one of INPUT_AXES, as Int8."""
    return quantize(w, INPUT_AXES[path], first=int(path.startswith("layers/")))


def quantized_axes(axes: Any) -> Any:
    """Logical axis names of `quantize_params(params)`, from those of the params (`model.param_axes`)."""
    def axes_of(path: str, spec: PartitionSpec) -> Int8:
        first = int(path.startswith("layers/"))
        return Int8(spec, PartitionSpec(*spec[:first], *spec[first + INPUT_AXES[path] :]))

    return _map_matrices(axes, axes_of)


def _map_matrices(tree: Any, function: Any) -> Any:
    leaves = traverse_util.flatten_dict(tree, sep="/")
    changed = {path: function(path, leaf) for path, leaf in leaves.items() if path in INPUT_AXES}
    return traverse_util.unflatten_dict({**leaves, **changed}, sep="/")


def quantize(w: jax.Array, input_axes: int, first: int = 0) -> Int8:
    """Rounds a matrix to Int8; a channel of zeros has scale 1.

    The input axes begin at axis `first`; axes before it (layers) are neither inputs nor outputs.
    """
    axes = tuple(range(first, first + input_axes))
    largest = jnp.max(jnp.abs(w), axis=axes, keepdims=True).astype(jnp.float32)
    scale = jnp.where(largest > 0, largest / 127, 1.0)
    values = jnp.round(w.astype(jnp.float32) / scale).astype(jnp.int8)
    return Int8(values, jnp.squeeze(scale, axes))
