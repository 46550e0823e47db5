"""A plan: one program compiled for one topology, with the memory, traffic and bounds that follow from it."""

import dataclasses
import math
import sys
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from illada_jax import model
from illada_jax.config import Config
from illada_jax.parallel.sharding import sharding_report
from illada_jax.planning import checks, hlo, programs, roofline
from illada_jax.planning.chips import Topology, versions
from illada_jax.training.optimizer import make_optimizer
from illada_jax.training.saved_model import abstract_params
from illada_jax.training.step import abstract_state

Mode = Literal["train", "decode", "score"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a plan, besides config and topology.

    Attributes:
      mode: the program.
      canvas: columns of decoding and scoring; 0 uses the context length.
      quantize: weights of decoding and scoring, `none` (the compute dtype) or `int8`.
      kernel_efficiency: assumed share of the peak that attention kernels reach; the compiler has no estimate.
      price: per chip and hour, in any currency; 0 omits the cost.
      search: also find the largest batch that fits.
    """

    mode: Mode = "train"
    canvas: int = 0
    quantize: Literal["none", "int8"] = "none"
    kernel_efficiency: float = 0.7
    price: float = 0.0
    search: bool = False


def make_plan(config: Config, topology: Topology, options: Options) -> dict[str, Any]:
    """Compiles the program and derives the plan. Times are in seconds, memory is in bytes per device.

    Raises:
      ConfigError: the config does not fit the topology's devices.
      DoesNotFit: it needs more memory than a device has; says how much, and what would help.
    """
    config, mesh, assumptions = programs.resolve(config, topology)
    plan: dict[str, Any] = {
        "mode": options.mode, "topology": topology.name, "num_slices": topology.num_slices, "chips": topology.num_chips,
        "mesh": dict(mesh.shape), "versions": versions(),
        "model": {"parameters": model.num_params(config.model), "remat": config.model.remat,
                  "attention": config.model.attention, "dtype": config.model.dtype},
    }
    print(f"compiling for {topology.num_slices} × {topology.name}, one to two minutes …", file=sys.stderr, flush=True)
    plan_mode = _plan_training if options.mode == "train" else _plan_inference
    figures, more_assumptions = plan_mode(config, mesh, topology, options)
    return plan | figures | {"assumptions": assumptions + more_assumptions}


def _plan_training(config: Config, mesh: Mesh, topology: Topology,
                   options: Options) -> tuple[dict[str, Any], list[str]]:
    """(figures, assumptions) of the training step."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    params = abstract_state(config, make_optimizer(config), mesh).params
    compiled = _compile(programs.lower_train(config, mesh), topology, _training_advice(config, shards))
    module = hlo.Module(compiled.text)
    chunks = config.data.length // (config.train.logits_chunk or config.data.length)
    work = hlo.work(module, mesh.size, topology.num_slices, default_trip_count=chunks)
    bounds = roofline.step_bounds(config, mesh, topology, work, options.kernel_efficiency)
    at_peak = dataclasses.replace(bounds, kernels=bounds.kernels_at_peak)
    rows = config.data.batch_size // config.train.microbatches // shards
    days = config.train.steps * bounds.best / 86_400
    plan = {
        "batch_size": config.data.batch_size, "length": config.data.length, "rows_per_device": rows,
        "microbatches": config.train.microbatches, "tokens_per_step": config.data.batch_size * config.data.length,
        "steps": config.train.steps,
        **_memory(compiled, topology),
        "bounds": {**dataclasses.asdict(bounds), "best": bounds.best, "without_overlap": bounds.without_overlap,
                   "best_with_kernels_at_peak": at_peak.best},
        "work": dataclasses.asdict(work),
        "mfu_bound": bounds.mfu(bounds.best), "mfu_without_overlap": bounds.mfu(bounds.without_overlap),
        "days": days,
        "whole_logits": checks.whole_logits(module, config, rows, mesh.shape["tensor"]),
        "replicated_params": checks.replicated_params(module, params),
        "sharding": sharding_report(params, model.param_axes(config.model)),
        "mfu_bound_with_kernels_at_peak": bounds.mfu(at_peak.best),
    }
    assumptions = [
        f"attention kernels reach {options.kernel_efficiency:.0%} of the peak (--kernel_efficiency); the compiler has "
        "no estimate of theirs",
        "fusions take the cycles that the compiler estimates, at the clock that gives the chip's peak",
        "collectives: the least that a device must send, at the full bandwidth of its links, hidden behind computing "
        "in `best`, not at all in `without overlap`",
        f"the loss computes the logits of all its {chunks} chunks; it leaves out those without a masked token",
        "no time for data, checkpoints, evaluation, failures",
    ]
    if not config.train.steps:
        assumptions.append("how many steps the epochs take is not known without the examples: no days")
    if options.price:
        plan["cost"] = days * 24 * topology.num_chips * options.price
    if options.search:
        plan["largest_rows_per_device"] = _largest_rows(config, mesh, topology, rows, compiled.total_bytes)
    return plan, assumptions


def _plan_inference(config: Config, mesh: Mesh, topology: Topology,
                    options: Options) -> tuple[dict[str, Any], list[str]]:
    """(figures, assumptions) of the decoder or the scorer."""
    canvas = options.canvas or config.model.max_length
    params = abstract_params(config.model, jnp.dtype(config.model.dtype), mesh, options.quantize == "int8")
    if options.mode == "decode":
        lowered = programs.lower_decode(config, mesh, params, canvas)
    else:
        lowered = programs.lower_score(config, mesh, params, canvas, config.decode.block_length)
    quantize = "" if options.quantize == "int8" else "--quantize=int8, "
    compiled = _compile(lowered, topology, f"{quantize}a smaller --config.decode.batch_size, a larger "
                                           "--config.mesh.tensor, or a shorter --canvas")
    param_bytes = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(params))
    bounds = {name: roofline.evaluation_bounds(config, mesh, topology, canvas, param_bytes, cached)
              for name, cached in (("canvas", False), ("block", True))}
    plan = {"rows": config.decode.batch_size, "canvas": canvas, "block_length": config.decode.block_length,
            "cache": config.decode.cache, "reveal": config.decode.reveal, "quantize": options.quantize,
            "param_bytes": param_bytes, **_memory(compiled, topology),
            "bounds": {name: {**dataclasses.asdict(b), "best": b.best} for name, b in bounds.items()}}
    assumptions = [
        "decoding and scoring: an evaluation takes the longest of its FLOPs at the peak, its bytes (params once, the "
        "cache once) at the bandwidth of memory, and its partial sums over `tensor` at that of the links, by formula",
        "decoding and scoring: all rows are full, nothing but evaluations of the network takes time",
    ]
    if options.mode == "decode":
        plan["rates"] = roofline.decode_rates(config, bounds["canvas"], bounds["block"])
        assumptions.append("decoding: a threshold reveals 1, 2 or 4 tokens of each row per evaluation; how many it "
                           "really does depends on the model")
    else:
        del plan["bounds"]["block"]
        plan["rows_per_second"] = config.decode.batch_size / bounds["canvas"].best
    return plan, assumptions


def _compile(lowered: jax.stages.Lowered, topology: Topology, advice: str) -> programs.Compiled:
    try:
        return programs.compile_lowered(lowered)
    except programs.DoesNotFit as error:
        raise programs.DoesNotFit(f"{topology.name}: {error}. What would help: {advice}") from error


def _memory(compiled: programs.Compiled, topology: Topology) -> dict[str, Any]:
    available, memory = topology.bytes_per_device, compiled.memory
    return {"argument_bytes": memory.argument_size_in_bytes, "temporary_bytes": memory.temp_size_in_bytes,
            "total_bytes": compiled.total_bytes, "peak_bytes": memory.peak_memory_in_bytes,
            "available_bytes": available, "headroom_bytes": available - compiled.total_bytes,
            "fits": compiled.total_bytes <= available, "compile_seconds": round(compiled.seconds, 1)}


def _largest_rows(config: Config, mesh: Mesh, topology: Topology, rows: int, used: int) -> int:
    """The most rows per device and micro-batch that fit. Memory is linear in rows: two compilations predict it."""
    def needed(rows: int) -> float:
        batch_size = rows * mesh.shape["data"] * mesh.shape["fsdp"] * config.train.microbatches
        larger = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=batch_size))
        try:
            return programs.compile_lowered(programs.lower_train(larger, mesh)).total_bytes
        except programs.DoesNotFit:
            return math.inf

    available, least = topology.bytes_per_device, rows + 1
    second = needed(least)
    if second == math.inf:
        return rows
    largest = rows + int((available - used) // max(second - used, 1))
    while largest > least and needed(largest) > available:
        largest -= 1
    while largest >= least and needed(largest + 1) <= available:
        largest += 1
    return max(largest, least)


def _training_advice(config: Config, shards: int) -> str:
    """The changes that reduce the memory of a training step, cheapest first."""
    changes = []
    rows = config.data.batch_size // config.train.microbatches // shards
    if rows > 1:
        changes.append(f"more --config.train.microbatches than {config.train.microbatches} ({rows} rows on a device)")
    if config.model.remat != "full":
        changes.append(f"--config.model.remat=full ({config.model.remat} keeps more)")
    if config.mesh.data != 1:
        changes.append(f"a smaller --config.mesh.data than {config.mesh.data}, the rest to mesh.fsdp")
    last = "--config.mesh.tensor=2 (half of a row's activations on each device), or chips with more memory"
    return "; ".join(changes or [last])
