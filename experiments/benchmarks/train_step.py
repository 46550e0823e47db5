"""Speed of a training step beside a plain PyTorch implementation of the same model, eager and compiled.

Example:
  taskset -c 1 python experiments/benchmarks/train_step.py --rounds=5

Both start from the same weights, get the same tokens, masks and masking probabilities, clip, and take the same AdamW
steps; the losses are printed beside each other. Our step also draws the masks, which PyTorch is given. Rounds alternate
between the implementations, and the fastest of each counts, in wall-clock time and in processor time, which is the one
to compare on a busy machine. Without PyTorch our step is timed alone.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from illada_jax import cli
from illada_jax.config import Config, DataConfig, DiffusionConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from illada_jax.data.batch import Batch
from illada_jax.diffusion.process import corrupt
from illada_jax.keys import Purpose, key_for
from illada_jax.model import num_params
from illada_jax.parallel.mesh import make_mesh, use_mesh
from illada_jax.training.step import init_state, make_init, make_train_step

ROUNDS = flags.DEFINE_integer("rounds", 3, "rounds of each implementation", 1)
STEPS = flags.DEFINE_integer("steps", 0, "steps of a round; 0: 50 of the small and 2 of the large model", 0)
SIZES = flags.DEFINE_multi_enum("size", ["small", "large"], ["small", "large"], "models to time")
COMPILE = flags.DEFINE_bool("torch_compile", True, "also time torch.compile (half a minute to compile)")

LEARNING_RATE = 1e-3


class Size(NamedTuple):
    """A model, its batch, and the steps of a round."""

    model: ModelConfig
    batch_size: int
    length: int
    steps: int
    logits_chunk: int


def _model(vocab_size: int, d_model: int, num_layers: int, head_dim: int, length: int,
           scan_unroll: int = 1) -> ModelConfig:
    return ModelConfig(vocab_size=vocab_size, d_model=d_model, num_layers=num_layers, num_heads=d_model // head_dim,
                       num_kv_heads=d_model // head_dim // 2, head_dim=head_dim, d_ff=3 * d_model, max_length=length,
                       scan_unroll=scan_unroll)


MODELS = {
    "small": Size(_model(4096, 128, 3, 32, 64, scan_unroll=3), 8, 64, 50, 8),
    "large": Size(_model(32_000, 640, 10, 64, 256), 4, 256, 2, 32),
}


class Timed(NamedTuple):
    """Wall-clock and processor seconds a step, and the losses of the steps."""

    seconds: float
    processor: float
    losses: list[float]


def main(argv: list[str]) -> None:
    """Prints a table for each size."""
    del argv
    for name in SIZES.value:
        compare(MODELS[name])


def compare(size: Size) -> None:
    """Times all implementations of one size and prints their ratios."""
    config = dataclasses.replace(
        Config(), model=size.model, mesh=MeshConfig(data=1), diffusion=DiffusionConfig(mask_id=5),
        data=DataConfig(length=size.length, batch_size=size.batch_size),
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, warmup_steps=0),
        train=TrainConfig(steps=1_000, logits_chunk=size.logits_chunk))
    steps = STEPS.value or size.steps
    rng = np.random.default_rng(0)
    shape = (size.batch_size, size.length)
    batches = [make_batch(rng.integers(6, size.model.vocab_size, shape, np.int32)) for _ in range(steps)]
    print(f"{num_params(size.model):,} parameters, vocabulary {size.model.vocab_size}, batches of {shape[0]} × "
          f"{shape[1]} tokens, {steps} steps a round")
    rounds = {"illada_jax": ours(config, batches)} | in_torch(config, batches)
    timed: dict[str, list[Timed]] = {name: [] for name in rounds}
    for run in rounds.values():
        run()  # compiles
    for _ in range(ROUNDS.value):
        for name, run in rounds.items():
            timed[name].append(run())
    print(f"{'':16} {'ms/step':>9} {'processor':>10} {'ours is':>9} {'(processor)':>12}  losses of the first steps")
    best = {name: (min(t.seconds for t in many), min(t.processor for t in many)) for name, many in timed.items()}
    for name, (seconds, processor) in best.items():
        ratios = seconds / best["illada_jax"][0], processor / best["illada_jax"][1]
        losses = " ".join(f"{loss:.5f}" for loss in timed[name][0].losses[:3])
        print(f"{name:16} {1e3 * seconds:9.1f} {1e3 * processor:10.1f} {ratios[0]:8.2f}x {ratios[1]:11.2f}x  {losses}",
              flush=True)


def make_batch(tokens_BL: np.ndarray) -> Batch:
    """A batch of unpadded rows, one segment each."""
    ones_BL = np.ones_like(tokens_BL)
    positions_BL = np.broadcast_to(np.arange(tokens_BL.shape[1], dtype=np.int32), tokens_BL.shape)
    return Batch(tokens_BL, ones_BL.astype(bool), ones_BL, positions_BL, ones_BL.astype(np.float32))


def timed_steps(step: Callable[[int], object], count: int, losses: Callable[[list], list[float]]) -> Timed:
    """Takes `count` steps; `losses` fetches their results, which waits for them."""
    start, start_processor = time.perf_counter(), time.process_time()
    fetched = losses([step(i) for i in range(count)])
    return Timed((time.perf_counter() - start) / count, (time.process_time() - start_processor) / count, fetched)


def ours(config: Config, batches: list[Batch]) -> Callable[[], Timed]:
    """A round of our steps, each from the initial state."""
    mesh = make_mesh(config.mesh)
    with use_mesh(mesh):
        step_fn = make_train_step(config, mesh)
        init = make_init(config, mesh)

    def run() -> Timed:
        with use_mesh(mesh):
            state = jax.block_until_ready(init())

            def step(i: int) -> object:
                nonlocal state
                state, metrics = step_fn(state, batches[i])
                return metrics

            return timed_steps(step, len(batches), lambda all_: [
                float(m.sums.loss / m.sums.weight) for m in jax.device_get(all_)])

    return run


def in_torch(config: Config, batches: list[Batch]) -> dict[str, Callable[[], Timed]]:
    """Rounds of PyTorch steps, eager and compiled; none without PyTorch."""
    try:
        import torch
        from torch_training import Trainer
    except ImportError:
        print("PyTorch is not installed: no comparison")
        return {}
    inputs = []
    for i, batch in enumerate(batches):
        key = key_for(config.seed, Purpose.CORRUPTION, jnp.int32(i))
        c = jax.jit(corrupt, static_argnums=2)(key, batch, config.diffusion)
        weights_BL = np.where(c.masked_BL, 1 / np.asarray(c.p_BL), 0.0) / batch.tokens_BL.size
        inputs.append(tuple(torch.from_numpy(np.array(x, dtype)) for x, dtype in (
            (c.noisy_BL, np.int64), (batch.tokens_BL, np.int64), (weights_BL, np.float32))))
    params = jax.device_get(jax.jit(lambda: init_state(config).params)())

    def runner(compiled: bool) -> Callable[[], Timed]:
        trainer = Trainer(params, config, compiled)

        def run() -> Timed:
            trainer.reset()
            return timed_steps(lambda i: trainer.step(*inputs[i]), len(inputs), lambda all_: [float(x) for x in all_])

        return run

    return {"PyTorch eager": runner(False)} | ({"torch.compile": runner(True)} if COMPILE.value else {})


if __name__ == "__main__":
    cli.run(main)
