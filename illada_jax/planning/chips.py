"""Published figures of TPU chips, and the topologies that can be compiled for.

Sources: https://docs.cloud.google.com/tpu/docs/tpu7x (v5p, v6e, tpu7x: one table), …/tpu/docs/v5e and …/tpu/docs/v4.
Interconnect figures there count both directions; here they are one direction, summed over a chip's links. Peaks are
bfloat16.
"""

import dataclasses
import importlib.util
import os
from importlib import metadata

import jax
from jax.experimental import topologies

from illada_jax.errors import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU chip. Bandwidths are in bytes per second."""

    flops: float  # peak bfloat16 operations per second
    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float  # to its neighbours, all links together
    dcn_bandwidth: float  # to other slices
    flops_per_cycle: int  # of its matrix units: 2 · units · width²
    slices: tuple[str, ...]  # shapes that can be compiled for, in chips
    devices: int = 1  # of JAX per chip

    @property
    def clock(self) -> float:
        """Cycles per second at which the matrix units reach the peak."""
        return self.flops / self.flops_per_cycle


_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1228e9, 300e9, 25e9 / 8, 2 * 8 * 128**2, _CUBES),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9, 25e9 / 8, 2 * 4 * 128**2, _SQUARES),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9, 50e9 / 8, 2 * 8 * 128**2, (*_CUBES, "8x8x16", "8x16x16")),
    "v6e": Chip(918e12, 32 * GIB, 1638e9, 400e9, 100e9 / 8, 2 * 4 * 256**2, _SQUARES),
    "tpu7x": Chip(2307e12, 192 * GIB, 7380e9, 600e9, 100e9 / 8, 2 * 8 * 256**2, _CUBES, devices=2),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """The JAX devices of one or several slices called `name`, such as `v5p:4x4x4`, which need not exist."""

    name: str
    num_slices: int
    chip: Chip
    devices: tuple[jax.Device, ...]

    @property
    def num_chips(self) -> int:
        """Chips over all slices."""
        return len(self.devices) // self.chip.devices

    @property
    def bytes_per_device(self) -> float:
        """HBM of one JAX device."""
        return self.chip.hbm_bytes / self.chip.devices


def versions() -> dict[str, str]:
    """Versions of the installed compilers, by package."""
    return {name: metadata.version(name) for name in ("jax", "libtpu") if importlib.util.find_spec(name)}


def parse(name: str) -> tuple[str, str]:
    """(chip, shape) of a topology's name. Raises InputError that lists the known names."""
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        raise InputError(f"--topology={name}: unknown; known chips: {', '.join(CHIPS)}, for example v5p:4x4x4")
    if shape not in CHIPS[kind].slices:
        raise InputError(f"--topology={name}: unknown; known for {kind}: "
                         f"{', '.join(f'{kind}:{known}' for known in CHIPS[kind].slices)}")
    return kind, shape


def get_topology(name: str, num_slices: int = 1) -> Topology:
    """The devices of slices, from libtpu alone. Raises InputError if the name is unknown or libtpu is not installed."""
    kind, shape = parse(name)
    if num_slices < 1:
        raise InputError(f"--num_slices={num_slices}: must be 1 or more")
    # By default libtpu queries the metadata server of a TPU VM and admits a single process.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options = {"chips_per_host_bounds": (1, 1, 1)} if shape == "1x1" else {}
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # one device per chip, as on TPU VMs
    if num_slices > 1:
        options["num_slices"] = num_slices
    try:
        devices = tuple(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except RuntimeError as error:
        if importlib.util.find_spec("libtpu") is None:
            raise InputError("compiling for TPUs needs libtpu: pip install 'illada_jax[tpu]'") from error
        raise InputError(f"--topology={name}: {str(error).splitlines()[0]}") from error
    return Topology(name, num_slices, CHIPS[kind], devices)
