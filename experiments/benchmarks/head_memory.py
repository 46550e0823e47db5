"""Memory and step time of the chunked loss, against computing all logits at once, by vocabulary size.

Example:
  taskset -c 1 python experiments/benchmarks/head_memory.py --rounds=3

`naive` computes all logits [B, L, V] in float32 and leaves the gradient to autodiff through log_softmax; `chunks` is
the project's loss; `compact` also skips the chunks without a masked position, as the training step does. Half of the
positions are masked. Bytes are XLA's count for loss and gradients of the head alone (hidden states and embedding in,
their gradients out); times are those of loss and gradients of the whole network. Rounds alternate between the variants;
the fastest of each counts, in wall-clock and processor time. `saves` is the share of the naive step's time.
"""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from illada_jax import cli, model
from illada_jax.config import ModelConfig
from illada_jax.diffusion.token_losses import token_losses

ROUNDS = flags.DEFINE_integer("rounds", 3, "rounds of each variant", 1)
SIZES = flags.DEFINE_multi_enum("size", ["32k", "155k", "small"], ["32k", "155k", "small"], "sizes to measure")

MASK = 5


class Size(NamedTuple):
    """A model, its batch, the positions of a row in a chunk, and the steps of a round."""

    model: ModelConfig
    batch_size: int
    length: int
    chunk: int
    steps: int


def _large(vocab_size: int) -> Size:
    config = ModelConfig(vocab_size=vocab_size, d_model=512, num_layers=4, num_heads=8, num_kv_heads=2, head_dim=64,
                         d_ff=1536, max_length=1024)
    return Size(config, 1, 1024, 64, 1)


_SMALL = ModelConfig(vocab_size=4096, d_model=128, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32,
                     d_ff=384, max_length=64, scan_unroll=3)
MODELS = {"32k": _large(32_000), "155k": _large(155_136), "small": Size(_SMALL, 8, 64, 8, 50)}

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def main(_: list[str]) -> None:
    """Prints a table for each size."""
    for name in SIZES.value:
        measure(MODELS[name])


def measure(size: Size) -> None:
    """Compiles and times the variants of one size and prints them beside the naive one."""
    c = size.model
    rng = np.random.default_rng(0)
    tokens_BL = rng.integers(MASK + 1, c.vocab_size, (size.batch_size, size.length), np.int32)
    masked_BL = rng.random(tokens_BL.shape) < 0.5
    weights_BL = (masked_BL / 0.5 / tokens_BL.size).astype(np.float32)
    params = jax.jit(lambda: model.init_params(c, jax.random.key(0)))()
    variants = losses(size, tokens_BL, weights_BL)
    steps = {name: network_step(size, loss, np.where(masked_BL, MASK, tokens_BL)) for name, loss in variants.items()}
    values = {name: jax.block_until_ready(step(params))[0] for name, step in steps.items()}  # compiles
    best = dict.fromkeys(variants, (np.inf, np.inf))
    for _ in range(ROUNDS.value):
        for name, step in steps.items():
            best[name] = tuple(map(min, best[name], timed(step, params, size.steps)))
    print(f"vocabulary {c.vocab_size:,}, d = {c.d_model}, {c.num_layers} layers, batch {size.batch_size} × "
          f"{size.length}, chunks of {size.chunk}, {model.num_params(c):,} parameters")
    print(f"{'':8} {'head, temporary MiB':>20} {'naive is':>9} {'ms/step':>9} {'processor':>10} {'saves':>7} "
          f"{'(processor)':>12}  loss")
    temporary = {name: head_bytes(size, loss) for name, loss in variants.items()}
    for name in variants:
        saved = [1 - x / naive for x, naive in zip(best[name], best["naive"], strict=True)]
        print(f"{name:8} {temporary[name] / 2**20:20.1f} {temporary['naive'] / temporary[name]:8.1f}x "
              f"{1e3 * best[name][0]:9.1f} {1e3 * best[name][1]:10.1f} {saved[0]:7.1%} {saved[1]:12.1%}  "
              f"{values[name]:.6f}", flush=True)


def losses(size: Size, tokens_BL: np.ndarray, weights_BL: np.ndarray) -> dict[str, Loss]:
    """The variants: (hidden states, embedding) → Σ weight · cross-entropy."""
    def head(embedding_VD: jax.Array, hidden_BLD: jax.Array) -> jax.Array:
        return model.head(size.model, {"embedding": embedding_VD}, hidden_BLD)

    def naive(hidden_BLD: jax.Array, embedding_VD: jax.Array) -> jax.Array:
        log_p_BLV = jax.nn.log_softmax(head(embedding_VD, hidden_BLD))
        ce_BL = -jnp.take_along_axis(log_p_BLV, tokens_BL[..., None], axis=-1)[..., 0]
        return jnp.sum(weights_BL * ce_BL)

    def lean(compact: bool, hidden_BLD: jax.Array, embedding_VD: jax.Array) -> jax.Array:
        return token_losses(functools.partial(head, embedding_VD), hidden_BLD, tokens_BL, weights_BL, size.chunk,
                            compact)[0]

    return {"naive": naive, "chunks": functools.partial(lean, False), "compact": functools.partial(lean, True)}


def network_step(size: Size, loss: Loss, noisy_BL: np.ndarray) -> Callable:
    """Loss and gradients of the whole network as a function of its params."""
    positions_BL = np.broadcast_to(np.arange(size.length, dtype=np.int32), noisy_BL.shape)

    def of_params(params):
        hidden_BLD = model.hidden(size.model, params, noisy_BL, positions_BL, np.ones_like(noisy_BL))
        return loss(hidden_BLD, params["embedding"])

    return jax.jit(jax.value_and_grad(of_params))


def head_bytes(size: Size, loss: Loss) -> int:
    """Temporary bytes of loss and gradients of the head alone, as the compiler has planned them."""
    shapes = (size.batch_size, size.length, size.model.d_model), (size.model.vocab_size, size.model.d_model)
    arrays = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arrays).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def timed(step: Callable, params, count: int) -> tuple[float, float]:
    """Seconds a step by the clock and of the processor."""
    started, processor = time.perf_counter(), time.process_time()
    jax.block_until_ready([step(params)[0] for _ in range(count)])
    return (time.perf_counter() - started) / count, (time.process_time() - processor) / count


if __name__ == "__main__":
    cli.run(main)
