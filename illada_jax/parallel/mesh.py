"""The device mesh: `data` × `fsdp` × `tensor`. One device is a mesh of one."""

import contextlib
import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from illada_jax.config import Config, MeshConfig, ModelConfig
from illada_jax.errors import ConfigError, InputError
from illada_jax.parallel.sharding import RULES

AXES = ("data", "fsdp", "tensor")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the mesh over `devices` (default: all). Several slices are arranged along `data`.

    Raises:
      ConfigError: the axes do not multiply to the number of devices, or `data` is not a multiple of the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [config.data, config.fsdp, config.tensor]
    text = " × ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise ConfigError(f"config.mesh = {text}: must multiply to the number of devices, {len(devices)}")
    num_slices = len({getattr(device, "slice_index", None) for device in devices})
    if sizes[0] % num_slices:
        raise ConfigError(f"config.mesh.data = {sizes[0]}: must be divisible by the number of slices, {num_slices}")
    # Unlike jax.make_mesh, this accepts sizes such as 32 × 16 on 8 × 8 × 8 chips.
    options = {"devices": devices, "allow_split_physical_axes": True}
    if num_slices == 1:
        arranged = mesh_utils.create_device_mesh(sizes, **options)
    else:
        inside = [sizes[0] // num_slices, *sizes[1:]]
        arranged = mesh_utils.create_hybrid_device_mesh(inside, [num_slices, 1, 1], **options)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parse_mesh(text: str) -> Mesh | None:
    """The mesh of a flag such as `fsdp=4,tensor=2` over the first devices of this host; None for an empty text.

    Omitted axes have size 1.

    Raises:
      InputError: the text is not of that form.
      ConfigError: there are too few devices.
    """
    if not text:
        return None
    try:
        sizes = {axis: int(size) for axis, size in (part.split("=") for part in text.split(","))}
        config = MeshConfig(**{"fsdp": 1, **sizes})
    except (ValueError, TypeError) as error:
        raise InputError(f"mesh = {text!r}: must look like fsdp=4,tensor=2; axes are {', '.join(AXES)}") from error
    count = math.prod(size for size in (config.data, config.fsdp, config.tensor) if size != -1)
    devices = jax.local_devices()
    return make_mesh(config, devices if -1 in sizes.values() else devices[:count])


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Context in which the logical constraints of the model refer to `mesh` while tracing."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(list(RULES.items())):
        yield


def check_divisible(config: Config, mesh: Mesh) -> None:
    """Checks that every sharded dimension is divisible by its mesh axes.

    Raises:
      ConfigError: names the key, its value and the divisor.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = config.data.batch_size // config.train.microbatches
    _check("data.batch_size / train.microbatches", rows, "data × mesh.fsdp", shards)
    check_model_divisible(config.model, mesh)


def check_model_divisible(model: ModelConfig, mesh: Mesh) -> None:
    """Like `check_divisible`, for the params only."""
    _check("model.d_model", model.d_model, "fsdp", mesh.shape["fsdp"])
    for name in ("num_heads", "num_kv_heads", "d_ff", "vocab_size"):
        _check(f"model.{name}", getattr(model, name), "tensor", mesh.shape["tensor"])


def _check(key: str, value: int, axis: str, size: int) -> None:
    if value % size:
        raise ConfigError(f"config.{key} = {value}: must be divisible by mesh.{axis} = {size}")


def local_rows(sharding: jax.sharding.Sharding, batch_size: int) -> np.ndarray:
    """The rows of the global batch that this process's devices hold: ascending, int64."""
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices]))
