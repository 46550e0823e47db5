"""Imports the weights of a family's checkpoint into sharded params, tensor by tensor.

Beside the params of this host's devices, host memory holds the slices of one tensor at a time: those mapped from its
file and one copy of them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from tqdm import tqdm

from illada_jax.config import ModelConfig
from illada_jax.errors import InputError
from illada_jax.interop.families import Family
from illada_jax.interop.layout import TensorMapping, param_shapes, tensor_mappings
from illada_jax.interop.tensors import TensorDirectory
from illada_jax.model.int8 import Int8, quantize
from illada_jax.training.saved_model import model_shardings


def import_params(directory: TensorDirectory, family: Family, config: ModelConfig, dtype: jnp.dtype,
                  mesh: Mesh | None = None, quantized: bool = False) -> Any:
    """Reads the params of a model.

    Args:
      directory: its tensors.
      family: their names and layout.
      config: the model.
      dtype: dtype of the params.
      mesh: devices of the params, sharded by the rules of `parallel/sharding.py`; None uses the first device.
      quantized: matrices become Int8 as they are read.

    Raises:
      InputError: a tensor is missing, unknown, has another shape, or is not finite (also in `dtype`); names it.
    """
    mappings = list(tensor_mappings(family, config))
    directory.check({mapping.name: mapping.shape for mapping in mappings})
    shapes = param_shapes(config)
    shardings = traverse_util.flatten_dict(model_shardings(config, mesh, quantized), sep="/")
    params: dict[str, Any] = {}
    size = sum(tensor.nbytes for tensor in directory.tensors.values())
    with tqdm(total=size, unit="B", unit_scale=True, desc="weights", delay=1, leave=False, disable=None) as progress:
        for mapping in mappings:
            path, sharding, tensor = mapping.path, shardings[mapping.path], directory.tensors[mapping.name]
            x = _read(directory, mapping, sharding)
            if mapping.layer is not None:
                if path not in params:
                    params[path] = _zeros(shapes[path], dtype, sharding, mapping.input_axes)
                write = _layer_writer(sharding, dtype, mapping.input_axes)
                params[path], finite = write(params[path], x, mapping.layer)
            elif isinstance(sharding, Int8) or tensor.dtype != dtype:
                params[path], finite = _converter(sharding, dtype, mapping.input_axes)(x)
            else:
                params[path], finite = x, _is_finite(x)
            if not finite:  # blocks, so that only one tensor is in flight
                raise InputError(f"{tensor.file}: the tensor {mapping.name} has values that are not finite in "
                                 f"{jnp.dtype(dtype).name}")
            progress.update(tensor.nbytes)
    return traverse_util.unflatten_dict(params, sep="/")


def _read(directory: TensorDirectory, mapping: TensorMapping, sharding: Sharding | Int8) -> jax.Array:
    """One layer of the param in the dtype of its tensor, sharded like the param."""
    sharding = sharding.values if isinstance(sharding, Int8) else sharding
    if mapping.layer is not None and isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))

    def read_slice(index: tuple[slice, ...]) -> np.ndarray:
        return mapping.to_param(directory.read(mapping.name, mapping.tensor_index(index)), index)

    return jax.make_array_from_callback(mapping.param_shape, sharding, read_slice,
                                        dtype=directory.tensors[mapping.name].dtype)


def _zeros(shape: tuple[int, ...], dtype: jnp.dtype, sharding: Sharding | Int8, input_axes: int) -> jax.Array | Int8:
    """A stacked param of zeros."""
    if not isinstance(sharding, Int8):
        return jnp.zeros(shape, dtype, device=sharding)
    return Int8(jnp.zeros(shape, jnp.int8, device=sharding.values),
                jnp.zeros((shape[0], *shape[1 + input_axes :]), jnp.float32, device=sharding.scale))


@jax.jit
def _is_finite(x: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(x))


def _convert(x: jax.Array, sharding: Sharding | Int8, dtype: jnp.dtype, input_axes: int) -> tuple[Any, jax.Array]:
    """(param, True if all its values are finite), from one layer of it in the dtype of its tensor."""
    if isinstance(sharding, Int8):
        return quantize(x, input_axes), _is_finite(x)
    x = x.astype(dtype)
    return x, _is_finite(x)


@functools.cache
def _converter(sharding: Sharding | Int8, dtype: jnp.dtype, input_axes: int) -> Callable[..., Any]:
    """`_convert` as a compiled function of `x`."""
    return jax.jit(lambda x: _convert(x, sharding, dtype, input_axes), out_shardings=(sharding, None))


@functools.cache
def _layer_writer(sharding: Sharding | Int8, dtype: jnp.dtype, input_axes: int) -> Callable[..., Any]:
    """A compiled (stacked param, x, layer) → (stacked param, True if x is finite); the param is updated in place."""

    def write(stack: Any, x: jax.Array, layer: jax.Array) -> tuple[Any, jax.Array]:
        new, finite = _convert(x, sharding, dtype, input_axes)
        update = functools.partial(jax.lax.dynamic_update_index_in_dim, index=layer, axis=0)
        return jax.tree.map(update, stack, new), finite

    return jax.jit(write, donate_argnums=0, out_shardings=(sharding, None))
