"""Imports the weights of a family's checkpoint into sharded params, tensor by tensor.

Besides the params of this host's devices, host memory holds the slices of one tensor at a time: those mapped from its
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
from illada_jax.interop.layout import TensorMapping, tensor_mappings
from illada_jax.interop.tensors import PROGRESS, TensorDirectory
from illada_jax.model.int8 import Int8, quantize
from illada_jax.training.saved_model import abstract_params


def import_params(directory: TensorDirectory, family: Family, config: ModelConfig, dtype: jnp.dtype,
                  mesh: Mesh | None = None, quantized: bool = False) -> Any:
    """The params of a model in `dtype`, on the mesh or the first device; with `quantized`, matrices as Int8.

    Raises:
      InputError: a tensor is missing, unknown, has another shape, or is not finite (also in `dtype`); names it.
    """
    mappings = list(tensor_mappings(family, config))
    if config.tied_head:
        directory.tie(family.tensors["embedding"], family.tensors["head"])
    directory.check({mapping.name: mapping.shape for mapping in mappings})
    abstract = traverse_util.flatten_dict(abstract_params(config, dtype, mesh, quantized), sep="/")
    params: dict[str, Any] = {}
    for mapping in tqdm(mappings, **PROGRESS):
        path, shardings = mapping.path, jax.tree.map(lambda x: x.sharding, abstract[mapping.path])
        x = _read(directory, mapping, shardings)
        if mapping.layer is not None and path not in params:
            params[path] = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), abstract[path])
        write = _writer(shardings, dtype, mapping.input_axes)
        params[path], finite = write(params.get(path), x, mapping.layer)
        if not finite:  # blocks, so that only one tensor is in flight
            raise InputError(f"{directory.tensors[mapping.name].file}: the tensor {mapping.name} has values that are "
                             f"not finite in {jnp.dtype(dtype).name}")
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


@functools.cache
def _writer(shardings: Sharding | Int8, dtype: jnp.dtype, input_axes: int) -> Callable[..., Any]:
    """A compiled (stacked param, x, layer) → (param, True if x is finite), which updates the param in place.

    x is one layer in the dtype of its tensor; a param that is not stacked is made of x alone, and `layer` is None.
    """

    def write(stack: Any, x: jax.Array, layer: jax.Array | None) -> tuple[Any, jax.Array]:
        if isinstance(shardings, Int8):
            param = quantize(x, input_axes)
        else:
            param = x = x.astype(dtype)
        if layer is not None:
            update = functools.partial(jax.lax.dynamic_update_index_in_dim, index=layer, axis=0)
            param = jax.tree.map(update, stack, param)
        return param, jnp.all(jnp.isfinite(x))

    return jax.jit(write, donate_argnums=0, out_shardings=(shardings, None))
