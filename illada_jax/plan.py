"""What a run needs, before anything is allocated: for `--dry_run`, and to refuse what cannot fit."""

import math
import os

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from illada_jax import model
from illada_jax.config import Config
from illada_jax.errors import InputError
from illada_jax.model.flops import training_flops_per_token
from illada_jax.parallel.mesh import AXES, check_divisible
from illada_jax.training.optimizer import make_optimizer
from illada_jax.training.step import abstract_state, donates

GIB = 2**30


def state_bytes_per_device(config: Config, mesh: Mesh | AbstractMesh, donated: bool = True) -> int:
    """Bytes of params, gradients (as params), average and optimizer state on a device; activations come on top.

    Args:
      config: the experiment.
      mesh: what the state is spread over.
      donated: the new state takes the place of the old one; otherwise both are there.
    """
    state = abstract_state(config, make_optimizer(config), mesh)

    def size(tree) -> int:
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    return size(state.params) + (1 if donated else 2) * size((state.params, state.opt_state, state.ema))


def check_fits(config: Config, mesh: Mesh) -> None:
    """Refuses a run whose state alone exceeds the memory of the devices.

    Raises:
      InputError: says what is needed, what is there and what to do instead.
    """
    local_devices = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    stats, local = local_devices[0].memory_stats() or {}, len(local_devices)
    # CPU devices share the memory of the host.
    available = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local
    needed = state_bytes_per_device(config, mesh, donates(local_devices[0].platform))
    if needed > available:
        raise InputError(
            f"the model does not fit: params, gradients and optimizer need {needed / GIB:,.1f} GiB on each of "
            f"{mesh.size} devices, which have {available / GIB:,.1f} GiB. Type instead: the same command with "
            "--dry_run for the plan; python -m illada_jax.aot --config=… --topology=v5p:4x4x4 to compile it for a pod "
            "that need not be there; a smaller config such as --config=experiments/quickstart.py; or start it on a "
            "pod, see tpu/README.md")


def describe(config: Config) -> str:
    """The plan of a run as text: parameters, tokens, FLOPs, bytes per device. Allocates nothing.

    Raises:
      ConfigError: the config does not fit the mesh that it names.
    """
    tokens = config.data.batch_size * config.data.length
    flops = training_flops_per_token(config.model, config.data.length)
    count = model.num_params(config.model)
    embeddings = config.model.vocab_size * config.model.d_model * (1 if config.model.tied_head else 2)
    lines = [
        f"parameters        {count:,} ({_in_units(count)}), without embedding and head {count - embeddings:,} "
        f"({_in_units(count - embeddings)})",
        f"tokens per step   {tokens:,} ({config.data.batch_size:,} rows of {config.data.length:,})",
        _steps(config, tokens),
        f"FLOPs             {flops:.4g} per token, {flops * tokens:.4g} per step"
        + (f", {flops * tokens * config.train.steps:.4g} in all" if config.train.steps else "")
        + " (attention not halved, recomputation not counted)",
    ]
    for mesh in _meshes(config):
        check_divisible(config, mesh)
        axes = " × ".join(f"{name}={size}" for name, size in mesh.shape.items())
        lines.append(f"state per device  {state_bytes_per_device(config, mesh) / GIB:,.2f} GiB with {axes} (float32 "
                     "params, gradients, optimizer; activations come on top)")
    return "\n".join(lines)


def _steps(config: Config, tokens: int) -> str:
    if not config.train.steps:
        return f"steps             {config.train.epochs} epochs; how many steps that are is known with the examples"
    return (f"steps             {config.train.steps:,} = {_in_units(config.train.steps * tokens)} tokens "
            f"(12 T tokens would be {math.ceil(12e12 / tokens):,} steps)")


def _in_units(number: float) -> str:
    """A number in thousands (K), millions (M), billions (B) or trillions (T)."""
    unit, size = next((pair for pair in (("T", 1e12), ("B", 1e9), ("M", 1e6)) if number >= pair[1]), ("K", 1e3))
    return f"{number / size:.2f} {unit}"


def _meshes(config: Config) -> list[AbstractMesh]:
    """The mesh that the config names; where an axis is left open, that axis on 1, 64 and 256 devices if it divides."""
    sizes = [config.mesh.data, config.mesh.fsdp, config.mesh.tensor]
    if -1 not in sizes:
        return [_abstract_mesh(sizes)]
    meshes = []
    for size in (1, 64, 256):
        filled = [size if s == -1 else s for s in sizes]
        rows = config.data.batch_size // config.train.microbatches
        if rows % (filled[0] * filled[1]) == 0 and config.model.d_model % filled[1] == 0:
            meshes.append(_abstract_mesh(filled))
    return meshes


def _abstract_mesh(sizes: list[int]) -> AbstractMesh:
    return AbstractMesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))
