"""Weights of a family's checkpoint, tensor by tensor into the sharded params of our model.

Beside the params that this host's devices hold, host memory has the slices of one tensor at a time: those mapped from
its file and one copy of them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from tqdm import tqdm

from illada_jax.config import ModelConfig
from illada_jax.errors import InputError
from illada_jax.interop.families import Family
from illada_jax.interop.layout import Entry, entries, param_shapes
from illada_jax.interop.tensors import TensorDirectory
from illada_jax.model.int8 import Int8, quantize
from illada_jax.training.saved_model import param_shardings


def import_params(directory: TensorDirectory, family: Family, config: ModelConfig, dtype: jnp.dtype,
                  mesh: Mesh | None = None, quantized: bool = False) -> Any:
    """Reads the params of a model.

    Args:
      directory: its tensors.
      family: their names.
      config: the model.
      dtype: type of the params.
      mesh: where they go, by the rules of `parallel/sharding.py`; None puts them on the first device.
      quantized: matrices become Int8 as they are read.

    Returns:
      The params; no optimizer, nothing else.

    Raises:
      InputError: a tensor is missing, unknown, of another shape, or not finite (also in `dtype`); names it.
    """
    wanted = list(entries(family, config))
    directory.check({entry.name: entry.shape for entry in wanted})
    shapes = param_shapes(config)
    places = traverse_util.flatten_dict(param_shardings(config, mesh, quantized), sep="/")
    params: dict[str, Any] = {}
    size = sum(tensor.nbytes for tensor in directory.tensors.values())
    with tqdm(total=size, unit="B", unit_scale=True, desc="weights", delay=1, leave=False, disable=None) as progress:
        for entry in wanted:
            place, tensor = places[entry.path], directory.tensors[entry.name]
            x = _read(directory, entry, place)
            if entry.layer is not None:
                if entry.path not in params:
                    params[entry.path] = _empty(shapes[entry.path], dtype, place, entry.input_axes)
                params[entry.path], finite = _writer(place, dtype, entry.input_axes)(
                    params[entry.path], x, entry.layer)
            elif isinstance(place, Int8) or tensor.dtype != dtype:
                params[entry.path], finite = _converter(place, dtype, entry.input_axes)(x)
            else:
                params[entry.path], finite = x, _is_finite(x)
            if not finite:  # waits, so that one tensor at a time is on its way
                raise InputError(f"{tensor.file}: the tensor {entry.name} has values that are not finite in "
                                 f"{jnp.dtype(dtype).name}")
            progress.update(tensor.nbytes)
    return traverse_util.unflatten_dict(params, sep="/")


def _read(directory: TensorDirectory, entry: Entry, place: Sharding | Int8) -> jax.Array:
    """The tensor as `entry.inner`, sharded like the param without its layers, in its own dtype."""
    place = place.values if isinstance(place, Int8) else place
    if entry.layer is not None and isinstance(place, NamedSharding):
        place = NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))
    read = lambda index: entry.to_param(directory.read(entry.name, entry.source_index(index)), index)  # noqa: E731
    return jax.make_array_from_callback(entry.inner, place, read, dtype=directory.tensors[entry.name].dtype)


def _empty(shape: tuple[int, ...], dtype: jnp.dtype, place: Sharding | Int8, input_axes: int) -> jax.Array | Int8:
    """Zeros of a stacked param."""
    if not isinstance(place, Int8):
        return jnp.zeros(shape, dtype, device=place)
    return Int8(jnp.zeros(shape, jnp.int8, device=place.values),
                jnp.zeros((shape[0], *shape[1 + input_axes :]), jnp.float32, device=place.scale))


@jax.jit
def _is_finite(x: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(x))


def _convert(x: jax.Array, place: Sharding | Int8, dtype: jnp.dtype, input_axes: int) -> tuple[Any, jax.Array]:
    """The param that a tensor becomes, and whether it is finite."""
    if isinstance(place, Int8):
        return quantize(x, input_axes), _is_finite(x)
    x = x.astype(dtype)
    return x, _is_finite(x)


@functools.cache
def _converter(place: Sharding | Int8, dtype: jnp.dtype, input_axes: int) -> Callable[..., Any]:
    """A compiled `tensor -> (param, whether it is finite)`."""
    return jax.jit(lambda x: _convert(x, place, dtype, input_axes), out_shardings=(place, None))


@functools.cache
def _writer(place: Sharding | Int8, dtype: jnp.dtype, input_axes: int) -> Callable[..., Any]:
    """A compiled `(stacked param, tensor, layer) -> (stacked param, whether the tensor is finite)`, in place."""

    def write(stack: Any, x: jax.Array, layer: jax.Array) -> tuple[Any, jax.Array]:
        new, finite = _convert(x, place, dtype, input_axes)
        put = lambda old, value: jax.lax.dynamic_update_index_in_dim(old, value, layer, axis=0)  # noqa: E731
        return jax.tree.map(put, stack, new), finite

    return jax.jit(write, donate_argnums=0, out_shardings=(place, None))
