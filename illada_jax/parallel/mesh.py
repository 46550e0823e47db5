"""The device mesh: `data` × `fsdp` × `tensor`. One device is a mesh of one."""

import contextlib
import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from illada_jax.config import Config, MeshConfig
from illada_jax.errors import ConfigError
from illada_jax.parallel.sharding import RULES

AXES = ("data", "fsdp", "tensor")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the mesh over `devices` (all of them by default). Several slices lie along `data`.

    Raises:
      ConfigError: the axes do not multiply to the number of devices, or `data` does not divide by the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [config.data, config.fsdp, config.tensor]
    text = " × ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise ConfigError(f"config.mesh = {text}: must multiply to the number of devices, {len(devices)}")
    axis_types = (AxisType.Auto,) * len(AXES)
    num_slices = len({getattr(device, "slice_index", None) for device in devices})
    if num_slices == 1:
        return jax.make_mesh(sizes, AXES, axis_types=axis_types, devices=devices)
    if sizes[0] % num_slices:
        raise ConfigError(f"config.mesh.data = {sizes[0]}: must be divisible by the number of slices, {num_slices}")
    inside = [sizes[0] // num_slices, *sizes[1:]]
    hybrid = mesh_utils.create_hybrid_device_mesh(inside, [num_slices, 1, 1], devices=devices)
    return Mesh(hybrid, AXES, axis_types=axis_types)


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Within it, the logical constraints of the model refer to `mesh` (while tracing)."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(list(RULES.items())):
        yield


def check_divisible(config: Config, mesh: Mesh) -> None:
    """Checks that every sharded dimension divides by its mesh axes.

    Raises:
      ConfigError: naming the key, its value and what must divide it.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = config.data.batch_size // config.train.microbatches
    model = config.model
    checks = [
        ("data.batch_size / train.microbatches", rows, "data × mesh.fsdp", shards),
        ("model.d_model", model.d_model, "fsdp", mesh.shape["fsdp"]),
        ("model.num_heads", model.num_heads, "tensor", mesh.shape["tensor"]),
        ("model.num_kv_heads", model.num_kv_heads, "tensor", mesh.shape["tensor"]),
        ("model.d_ff", model.d_ff, "tensor", mesh.shape["tensor"]),
        ("model.vocab_size", model.vocab_size, "tensor", mesh.shape["tensor"]),
    ]
    for key, value, axis, size in checks:
        if value % size:
            raise ConfigError(f"config.{key} = {value}: must be divisible by mesh.{axis} = {size}")


def local_rows(sharding: jax.sharding.Sharding, batch_size: int) -> np.ndarray:
    """The global rows (ascending, int64) of a batch that this process's devices hold."""
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices]))
