"""Bounds on time (compute, memory, interconnect) from a compiled program and the figures of a chip."""

from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from illada_jax.config import Config
from illada_jax.model.flops import forward_flops_per_token, training_flops_per_token
from illada_jax.planning.chips import Topology
from illada_jax.planning.hlo import Work

# Matrix products of size T·S·H per head and call of the attention kernel. Forward: scores and output. Backward: scores
# again, and the gradients of scores, queries, keys and values.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5


def step_bounds(config: Config, mesh: Mesh, topology: Topology, work: Work,
                kernel_efficiency: float) -> dict[str, float]:
    """Bounds on one training step in seconds, from the work of one device.

    Returns:
      model_flops: model FLOPs of one device, by formula; recomputation is not counted.
      compute: model FLOPs at the chip's peak, a bound on any implementation.
      fusions: the compiler's estimated cycles at the clock that gives the peak.
      kernels: attention's matrix products (recomputation counted) at `kernel_efficiency` of the peak.
      kernels_at_peak: the same at the peak.
      hbm: bytes moved at the bandwidth of memory.
      ici: bytes sent at the bandwidth of a chip's links.
      dcn: bytes sent to other slices at the bandwidth of a chip's share of the network.
      best: the step with perfect overlap: the longest of computing, memory and networks.
      without_overlap: the step if no collective overlaps with computing.
      best_with_kernels_at_peak: `best` with `kernels_at_peak`.
    """
    chip, share = topology.chip, 1 / topology.chip.devices
    length = config.data.length
    model_flops = training_flops_per_token(config.model, length) * (config.data.batch_size * length) / mesh.size
    rows = config.data.batch_size // config.train.microbatches // (mesh.shape["data"] * mesh.shape["fsdp"])
    heads = config.model.num_heads // mesh.shape["tensor"]
    products = sum(calls * (FORWARD_PRODUCTS if "fwd" in name else BACKWARD_PRODUCTS)
                   for name, calls in work.kernels.items())
    at_peak = products * (2.0 * length**2 * heads * config.model.head_dim * rows) / (chip.flops * share)
    fusions, kernels = work.cycles / chip.clock, at_peak / kernel_efficiency
    hbm = work.hbm_bytes / (chip.hbm_bandwidth * share)
    ici = work.ici_bytes / (chip.ici_bandwidth * share)
    dcn = work.dcn_bytes / (chip.dcn_bandwidth * share)
    return {
        "model_flops": model_flops, "compute": model_flops / (chip.flops * share), "fusions": fusions,
        "kernels": kernels, "kernels_at_peak": at_peak, "hbm": hbm, "ici": ici, "dcn": dcn,
        "best": max(fusions + kernels, hbm, ici, dcn),
        "without_overlap": max(fusions + kernels, hbm) + ici + dcn,
        "best_with_kernels_at_peak": max(fusions + at_peak, hbm, ici, dcn),
    }


def evaluation_bounds(config: Config, mesh: Mesh, topology: Topology, canvas: int, param_bytes: int,
                      cached: bool) -> dict[str, float]:
    """Bounds on one evaluation of the network in decoding or scoring, in seconds, by formula.

    Rows of `canvas` columns are sharded over data and fsdp, params (`param_bytes` on a device) over fsdp and tensor. If
    `cached`, a block is computed, and keys and values of the whole canvas are read from a cache; else all columns are
    computed. Either way the logits are those of a block of each row.

    Returns:
      compute: FLOPs at the chip's peak (int8 weights are multiplied in bfloat16).
      hbm: reading params and cache once, at the bandwidth of memory.
      ici: all-reduces of every layer over `tensor` and all-gathers of params over `fsdp`, at the links' bandwidth.
      best: the longest of the three.
    """
    model, chip, share = config.model, topology.chip, 1 / topology.chip.devices
    rows = config.decode.batch_size / (mesh.shape["data"] * mesh.shape["fsdp"])
    fsdp, tensor, block = mesh.shape["fsdp"], mesh.shape["tensor"], config.decode.block_length
    columns = min(block, canvas) if cached else canvas
    item = jnp.dtype(model.dtype).itemsize
    head = 2.0 * model.d_model * model.vocab_size
    flops = rows * (columns * (forward_flops_per_token(model, canvas) - head) + block * head) / tensor
    cache = 2 * rows * canvas * model.num_layers * model.num_kv_heads * model.head_dim * item / tensor
    # An all-reduce after attention and one after the feed-forward of each layer; each sends 2 · (n - 1) / n.
    sums = 2 * model.num_layers * rows * columns * model.d_model * item * 2 * (tensor - 1) / tensor
    bounds = {
        "compute": flops / (chip.flops * share),
        "hbm": (param_bytes * fsdp + (cache if cached else 0)) / (chip.hbm_bandwidth * share),
        "ici": (sums + param_bytes * (fsdp - 1)) / (chip.ici_bandwidth * share),
    }
    return bounds | {"best": max(bounds.values())}


def decode_rates(config: Config, whole: float, part: float) -> list[dict[str, Any]]:
    """Best-case tokens per second of the whole mesh: all rows are full, only evaluations take time.

    `exact` computes the whole canvas in every evaluation, in `whole` seconds; `prefix cache` once per block, then the
    block alone, in `part` seconds; `append cache`, behind the prompt, the block alone, once more to keep it. Each
    evaluation reveals 1, 2 or 4 tokens per row; with a threshold the number depends on the model's confidence.
    """
    block, rates = config.decode.block_length, []
    for per_evaluation in (1, 2, 4):
        evaluations = block / per_evaluation
        for name, time in (("exact", evaluations * whole), ("prefix cache", whole + (evaluations - 1) * part),
                           ("append cache", (evaluations + 1) * part)):
            rates.append({"decoding": name, "tokens_per_evaluation": per_evaluation,
                          "tokens_per_second": config.decode.batch_size * block / time})
    return rates
