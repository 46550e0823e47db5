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
from illada_jax.errors import ConfigError
from illada_jax.parallel.sharding import sharding_report
from illada_jax.planning import checks, hlo, programs, roofline, saving
from illada_jax.planning.chips import Topology, versions
from illada_jax.training.saved_model import abstract_params
from illada_jax.training.step import abstract_state


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a plan, besides config and topology: see the flags of the `aot` command."""

    mode: Literal["train", "decode", "score"] = "train"
    canvas: int = 0
    quantize: Literal["none", "int8"] = "none"
    kernel_efficiency: float = 0.7
    price: float = 0.0
    search: bool = False
    preemption_hours: float = 6.0
    save_bandwidth: float = 0.5e9


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
    params = abstract_state(config, mesh).params
    rows = config.data.batch_size // config.train.microbatches // (mesh.shape["data"] * mesh.shape["fsdp"])
    text, memory = _compile(programs.lower_train(config, mesh), topology, _training_advice(config, rows))
    module = hlo.Module(text)
    chunks = config.data.length // (config.train.logits_chunk or config.data.length)
    work = hlo.work(module, mesh.size, topology.num_slices, default_trip_count=chunks)
    bounds = roofline.step_bounds(config, mesh, topology, work, options.kernel_efficiency)
    days = config.train.steps * bounds["best"] / 86_400
    plan = {
        "batch_size": config.data.batch_size, "length": config.data.length, "rows_per_device": rows,
        "microbatches": config.train.microbatches, "tokens_per_step": config.data.batch_size * config.data.length,
        "steps": config.train.steps,
        **memory, "bounds": bounds, "work": dataclasses.asdict(work),
        "mfu_bound": bounds["compute"] / bounds["best"],
        "mfu_without_overlap": bounds["compute"] / bounds["without_overlap"],
        "days": days,
        "saving": saving.saving_figures(config.checkpoint.every, bounds["best"], memory["argument_bytes"], topology,
                                        options.preemption_hours, options.save_bandwidth),
        "whole_logits": checks.whole_logits(module, config, rows, mesh.shape["tensor"]),
        "replicated_params": checks.replicated_params(module, params),
        "sharding": sharding_report(params, model.param_axes(config.model)),
        "mfu_bound_with_kernels_at_peak": bounds["compute"] / bounds["best_with_kernels_at_peak"],
    }
    assumptions = [
        f"attention kernels reach {options.kernel_efficiency:.0%} of the peak (--kernel_efficiency); the compiler has "
        "no estimate of theirs",
        "fusions take the cycles that the compiler estimates, at the clock that gives the chip's peak",
        "collectives: the least that a device must send, at the full bandwidth of its links, hidden behind computing "
        "in `best`, not at all in `without overlap`",
        f"the loss computes the logits of all its {chunks} chunks; it leaves out those without a masked token",
        "no time for data, checkpoints, evaluation, failures",
        f"saving: a device copies {saving.HOST_BANDWIDTH / 1e9:.0f} GB/s to its host, a host writes "
        f"{options.save_bandwidth / 1e9:g} GB/s (--save_gbps), an interruption every {options.preemption_hours:g} h "
        f"(--preemption_hours) without time to save; {saving.RESTART_SECONDS:.0f} s until steps are taken again",
    ]
    if not config.train.steps:
        assumptions.append("how many steps the epochs take is not known without the examples: no days")
    if options.price:
        plan["cost"] = days * 24 * topology.num_chips * options.price
    if options.search:
        plan["largest_rows_per_device"] = _largest_rows(config, mesh, topology, rows, memory["total_bytes"])
    return plan, assumptions


def _plan_inference(config: Config, mesh: Mesh, topology: Topology,
                    options: Options) -> tuple[dict[str, Any], list[str]]:
    """(figures, assumptions) of the decoder or the scorer."""
    canvas = options.canvas or config.model.max_length
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.decode.batch_size % shards:
        raise ConfigError(f"config.decode.batch_size = {config.decode.batch_size}: must be divisible by mesh.data × "
                          f"mesh.fsdp = {shards}")
    params = abstract_params(config.model, jnp.dtype(config.model.dtype), mesh, options.quantize == "int8")
    if options.mode == "decode":
        lowered = programs.lower_decode(config, mesh, params, canvas)
    else:
        lowered = programs.lower_score(config, mesh, params, canvas, config.decode.block_length)
    quantize = "" if options.quantize == "int8" else "--quantize=int8, "
    _, memory = _compile(lowered, topology, f"{quantize}a smaller --config.decode.batch_size, a larger "
                                            "--config.mesh.tensor, or a shorter --canvas")
    param_bytes = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(params))
    bounds = {name: roofline.evaluation_bounds(config, mesh, topology, canvas, param_bytes, cached)
              for name, cached in (("canvas", False), ("block", True))}
    plan = {"rows": config.decode.batch_size, "canvas": canvas, "block_length": config.decode.block_length,
            "cache": config.decode.cache, "reveal": config.decode.reveal, "quantize": options.quantize,
            "param_bytes": param_bytes, **memory, "bounds": bounds}
    assumptions = [
        "decoding and scoring: an evaluation takes the longest of its FLOPs at the peak, its bytes (params once, the "
        "cache once) at the bandwidth of memory, and its partial sums over `tensor` at that of the links, by formula",
        "decoding and scoring: all rows are full, nothing but evaluations of the network takes time",
    ]
    if options.mode == "decode":
        plan["rates"] = roofline.decode_rates(config, bounds["canvas"]["best"], bounds["block"]["best"])
        assumptions.append("decoding: a threshold reveals 1, 2 or 4 tokens of each row per evaluation; how many it "
                           "really does depends on the model")
    else:
        del bounds["block"]
        plan["rows_per_second"] = config.decode.batch_size / bounds["canvas"]["best"]
    return plan, assumptions


def _compile(lowered: jax.stages.Lowered, topology: Topology, advice: str) -> tuple[str, dict[str, Any]]:
    """The text of the compiled program, and figures of its memory."""
    try:
        text, figures = programs.compile_lowered(lowered)
    except programs.DoesNotFit as error:
        raise programs.DoesNotFit(f"{topology.name}: {error}. What would help: {advice}") from error
    headroom = topology.bytes_per_device - figures["total_bytes"]
    return text, {**figures, "available_bytes": topology.bytes_per_device, "headroom_bytes": headroom,
                  "fits": headroom >= 0}


def _largest_rows(config: Config, mesh: Mesh, topology: Topology, rows: int, used: int) -> int:
    """The most rows per device and micro-batch that fit. Memory is linear in rows: two compilations predict it."""
    def needed(rows: int) -> float:
        batch_size = rows * mesh.shape["data"] * mesh.shape["fsdp"] * config.train.microbatches
        larger = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=batch_size))
        try:
            return programs.compile_lowered(programs.lower_train(larger, mesh))[1]["total_bytes"]
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


def _training_advice(config: Config, rows: int) -> str:
    """The changes that reduce the memory of a training step, cheapest first."""
    changes = []
    if rows > 1:
        changes.append(f"more --config.train.microbatches than {config.train.microbatches} ({rows} rows on a device)")
    if config.model.remat != "full":
        changes.append(f"--config.model.remat=full ({config.model.remat} keeps more)")
    if config.mesh.data != 1:
        changes.append(f"a smaller --config.mesh.data than {config.mesh.data}, the rest to mesh.fsdp")
    last = "--config.mesh.tensor=2 (half of a row's activations on each device), or chips with more memory"
    return "; ".join(changes or [last])
