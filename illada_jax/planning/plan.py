"""A plan: one program compiled for one topology, and all that follows from it, as numbers, as text, as a table."""

import dataclasses
import math
import sys
from typing import Any, Literal

import jax

from illada_jax import model
from illada_jax.config import Config
from illada_jax.parallel.sharding import sharding_report
from illada_jax.planning import checks, hlo, programs, roofline
from illada_jax.planning.chips import GIB, Topology, versions
from illada_jax.training.optimizer import make_optimizer
from illada_jax.training.step import abstract_state

Mode = Literal["train", "decode", "score"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What a plan is made of besides config and topology.

    Attributes:
      mode: the program.
      canvas: columns of decoding and scoring; 0 takes the context.
      quantize: weights of decoding and scoring, `none` (the compute dtype) or `int8`.
      kernel_efficiency: share of the peak that attention kernels are taken to reach; the compiler has no estimate.
      price: per chip and hour, in any currency; 0 leaves the cost out.
      search: also look for the largest batch that fits.
    """

    mode: Mode = "train"
    canvas: int = 0
    quantize: Literal["none", "int8"] = "none"
    kernel_efficiency: float = 0.7
    price: float = 0.0
    search: bool = False


def make_plan(config: Config, topology: Topology, options: Options) -> dict[str, Any]:
    """Compiles and works everything out. Times are seconds, memory is bytes on one device.

    Raises:
      ConfigError: the config does not fit the topology's devices.
      DoesNotFit: it needs more memory than a device has; says how much, and what would help.
    """
    config, mesh, assumed = programs.prepare(config, topology)
    canvas = options.canvas or config.model.max_length
    plan: dict[str, Any] = {
        "mode": options.mode, "topology": topology.name, "num_slices": topology.num_slices, "chips": topology.num_chips,
        "mesh": dict(mesh.shape), "versions": versions(),
        "model": {"parameters": model.num_params(config.model), "remat": config.model.remat,
                  "attention": config.model.attention, "dtype": config.model.dtype},
    }
    print(f"compiling for {topology.num_slices} × {topology.name}, one to two minutes …", file=sys.stderr, flush=True)
    if options.mode == "train":
        plan |= _train_plan(config, mesh, topology, options, assumed)
    else:
        plan |= _inference_plan(config, mesh, topology, options, canvas, assumed)
    return plan | {"assumptions": assumed}


def _memory(compiled: programs.Compiled, topology: Topology) -> dict[str, Any]:
    available = topology.chip.hbm_bytes / topology.chip.devices
    return {"argument_bytes": compiled.argument_bytes, "temporary_bytes": compiled.temporary_bytes,
            "total_bytes": compiled.total_bytes, "peak_bytes": compiled.peak_bytes, "available_bytes": available,
            "headroom_bytes": available - compiled.total_bytes, "fits": compiled.total_bytes <= available,
            "compile_seconds": round(compiled.seconds, 1)}


def _train_plan(config: Config, mesh: jax.sharding.Mesh, topology: Topology, options: Options,
                assumed: list[str]) -> dict[str, Any]:
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    state = abstract_state(config, make_optimizer(config), mesh)
    lowered = programs.lower_train(config, mesh)
    try:
        compiled = programs.compile_for(lowered)
    except programs.DoesNotFit as error:
        raise programs.DoesNotFit(f"{topology.name}: {error}. {_what_would_fit(config, shards)}") from error
    module = hlo.Module(compiled.text)
    chunks = config.data.length // (config.train.logits_chunk or config.data.length)
    work = hlo.work(module, mesh.size, topology.num_slices, otherwise=chunks)
    bounds = roofline.step_bounds(config, mesh, topology, work, options.kernel_efficiency)
    rows = config.data.batch_size // config.train.microbatches // shards
    tokens = config.data.batch_size * config.data.length
    days = config.train.steps * bounds.best / 86_400
    assumed += [
        f"attention kernels reach {options.kernel_efficiency:.0%} of the peak (--kernel_efficiency); the compiler has "
        "no estimate of theirs",
        "fusions take the cycles that the compiler estimates, at the clock that gives the chip's peak",
        "collectives: the least that a device must send, at the full bandwidth of its links, hidden behind computing "
        "in `best`, not at all in `without overlap`",
        f"the loss computes the logits of all its {chunks} chunks; it leaves out those without a masked token",
        "no time for data, checkpoints, evaluation, failures",
    ]
    plan = {
        "batch_size": config.data.batch_size, "length": config.data.length, "rows_per_device": rows,
        "microbatches": config.train.microbatches, "tokens_per_step": tokens, "steps": config.train.steps,
        **_memory(compiled, topology),
        "bounds": {**dataclasses.asdict(bounds), "best": bounds.best, "without_overlap": bounds.without_overlap,
                   "best_with_kernels_at_peak": max(bounds.fusions + bounds.kernels_at_peak, bounds.hbm, bounds.ici,
                                                    bounds.dcn)},
        "work": dataclasses.asdict(work),
        "mfu_bound": bounds.mfu(bounds.best), "mfu_without_overlap": bounds.mfu(bounds.without_overlap),
        "days": days,
        "whole_logits": checks.whole_logits(module, config, rows, mesh.shape["tensor"]),
        "replicated_params": checks.replicated_params(module, state.params),
        "sharding": sharding_report(state.params, model.param_axes(config.model)),
    }
    plan["mfu_bound_with_kernels_at_peak"] = bounds.mfu(plan["bounds"]["best_with_kernels_at_peak"])
    if not config.train.steps:
        assumed.append("how many steps the epochs take is not known without the examples: no days")
    if options.price:
        plan["cost"] = days * 24 * topology.num_chips * options.price
    if options.search:
        plan["largest_rows_per_device"] = _largest(config, topology, shards, rows, compiled.total_bytes)
    return plan


def _with_rows(config: Config, shards: int, rows: int) -> Config:
    """The config with so many rows on a device in a micro-batch, the micro-batches as they are."""
    size = rows * shards * config.train.microbatches
    return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=size))


def _largest(config: Config, topology: Topology, shards: int, rows: int, used: int) -> int:
    """The most rows on a device that fit: memory is linear in them, so two compilations tell where to look."""
    def need(rows: int) -> float:
        _, mesh, _ = programs.prepare(config, topology)
        try:
            return programs.compile_for(programs.lower_train(_with_rows(config, shards, rows), mesh)).total_bytes
        except programs.DoesNotFit:
            return math.inf

    available = topology.chip.hbm_bytes / topology.chip.devices
    other = rows + 1
    second = need(other)
    if second == math.inf:
        return rows
    guess = rows + int((available - used) // max(second - used, 1))
    while guess > other and need(guess) > available:
        guess -= 1
    while guess >= other and need(guess + 1) <= available:
        guess += 1
    return max(guess, other)


def _what_would_fit(config: Config, shards: int) -> str:
    """What to change when a training step does not fit, in the order in which it costs."""
    ways = []
    rows = config.data.batch_size // config.train.microbatches // shards
    if rows > 1:
        ways.append(f"more --config.train.microbatches than {config.train.microbatches} ({rows} rows on a device)")
    if config.model.remat != "full":
        ways.append(f"--config.model.remat=full ({config.model.remat} keeps more)")
    if config.mesh.data != 1:
        ways.append(f"a smaller --config.mesh.data than {config.mesh.data}, the rest to mesh.fsdp")
    if not ways:
        ways.append("--config.mesh.tensor=2 (half of a row's activations on each device), or chips with more memory")
    return f"What would help: {'; '.join(ways)}"


def _inference_plan(config: Config, mesh: jax.sharding.Mesh, topology: Topology, options: Options, canvas: int,
                    assumed: list[str]) -> dict[str, Any]:
    params = programs.inference_params(config, mesh, options.quantize)
    if options.mode == "decode":
        lowered = programs.lower_decode(config, mesh, params, canvas)
    else:
        lowered = programs.lower_score(config, mesh, params, canvas, config.decode.block_length)
    try:
        compiled = programs.compile_for(lowered)
    except programs.DoesNotFit as error:
        quantize = "" if options.quantize == "int8" else "--quantize=int8, "
        ways = f"{quantize}fewer --config.decode.batch_size, a larger --config.mesh.tensor, or a shorter --canvas"
        raise programs.DoesNotFit(f"{topology.name}: {error}. What would help: {ways}") from error
    param_bytes = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(params))
    bounds = {name: roofline.evaluation_bounds(config, mesh, topology, canvas, param_bytes, cached)
              for name, cached in (("canvas", False), ("block", True))}
    assumed += [
        "decoding and scoring: an evaluation takes the longest of its FLOPs at the peak, its bytes (params once, the "
        "cache once) at the bandwidth of memory, and its partial sums over `tensor` at that of the links, by formula",
        "decoding and scoring: all rows are full, nothing but evaluations of the network takes time",
    ]
    plan = {"rows": config.decode.batch_size, "canvas": canvas, "block_length": config.decode.block_length,
            "cache": config.decode.cache, "reveal": config.decode.reveal, "quantize": options.quantize,
            "param_bytes": param_bytes, **_memory(compiled, topology),
            "bounds": {name: {**dataclasses.asdict(b), "best": b.best} for name, b in bounds.items()}}
    if options.mode == "decode":
        plan["rates"] = roofline.decode_rates(config, bounds["canvas"], bounds["block"])
        assumed.append("decoding: a threshold reveals 1, 2 or 4 tokens of each row per evaluation; how many it really "
                       "does depends on the model")
    else:
        del plan["bounds"]["block"]
        plan["rows_per_second"] = config.decode.batch_size / bounds["canvas"].best
    return plan


def gib(size: float) -> str:
    """Bytes as text in GiB."""
    return f"{size / GIB:,.2f} GiB"
