"""Training, decoding, scoring and loading on the accelerator that JAX finds: one command, no downloads.

Examples:
  python experiments/benchmarks/accelerator.py --json=accelerator.json
  python experiments/benchmarks/accelerator.py --minutes=3

On a TPU or GPU: a training step of 1.2 B parameters in bfloat16, and the 8B model in bfloat16 and int8. On a CPU: small
models in float32 and int8. Weights are random. A row that does not fit the memory says so, and none starts after
`--minutes`. Where PyTorch is installed, with CUDA on a GPU, its training step and the published decoding loop run on
the same device, between the others.

`first s` are the seconds to the first block of tokens, with the prompt; `tokens/s` counts behind it. MFU is the share
of the published peak (dense, bfloat16) that the model's operations take by formula, without rematerialisation.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import itertools
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves PyTorch some memory

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import illada_jax
from illada_jax import cli, model
from illada_jax.config import (
    Config,
    DataConfig,
    DecodeConfig,
    DiffusionConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from illada_jax.decoding import Decoder, SpecialIds
from illada_jax.model.flops import training_flops_per_token
from illada_jax.model.int8 import INPUT_AXES, Int8
from illada_jax.planning.chips import CHIPS
from illada_jax.scoring import ScoreConfig, Scorer

_JSON = flags.DEFINE_string("json", "", "file for the rows, versions and the device")
_MINUTES = flags.DEFINE_float("minutes", 8, "no row starts later")

MASK = 5
# TPUs: planning/chips.py. NVIDIA's data sheets, dense.
GPU_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L4": 121e12}
TPU_KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}


class Size(NamedTuple):
    """The shapes to measure."""

    train: ModelConfig
    train_rows: int
    train_length: int
    decode: ModelConfig
    dtypes: tuple[str, ...]
    prompt: int
    block: int
    context: int
    load_layers: int


def _model(vocab_size: int, d_model: int, num_layers: int, num_heads: int, num_kv_heads: int, head_dim: int, d_ff: int,
           **changes: Any) -> ModelConfig:
    return ModelConfig(vocab_size=vocab_size, d_model=d_model, num_layers=num_layers, num_heads=num_heads,
                       num_kv_heads=num_kv_heads, head_dim=head_dim, d_ff=d_ff, **changes)


FULL = Size(
    train=_model(155_136, 2048, 16, 16, 4, 128, 7168, max_length=2048, tied_head=True, dtype="bfloat16",
                 remat="attention", scan_unroll=1),
    train_rows=8, train_length=2048,
    decode=_model(155_136, 4096, 32, 32, 8, 128, 14_336, max_length=1024, tied_head=True, dtype="bfloat16",
                  scan_unroll=1),
    dtypes=("bfloat16", "int8"), prompt=512, block=32, context=256, load_layers=2)
SMALL = Size(
    train=_model(8192, 256, 4, 4, 2, 64, 768, max_length=256, tied_head=True, scan_unroll=1),
    train_rows=4, train_length=256,
    decode=_model(4096, 256, 4, 4, 1, 64, 768, max_length=512, tied_head=True),
    dtypes=("float32", "int8"), prompt=256, block=32, context=64, load_layers=0)


def main(_: list[str]) -> None:
    """Measures and prints one row after another."""
    device = jax.devices()[0]
    size = SMALL if device.platform == "cpu" else FULL
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "illada_jax")}
    versions |= {name: importlib.metadata.version(name) for name in ("libtpu", "torch", "jax-cuda13-plugin",
                                                                     "jax-cuda12-plugin") if _installed(name)}
    print(f"{device.device_kind} ({device.platform}), {', '.join(f'{k} {v}' for k, v in versions.items())}")
    until, rows = time.monotonic() + 60 * _MINUTES.value, []
    for name, measure in measurements(size, device):
        if time.monotonic() > until:
            row = {"name": name, "note": f"not started: {_MINUTES.value:g} minutes are over"}
        else:
            row = {"name": name, **_measured(measure)}
        rows.append(row)
        print("  ".join(f"{value:<54}" if key == "name" else f"{key} {_text(value)}" for key, value in row.items()),
              flush=True)
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps({
            "device": device.device_kind, "platform": device.platform, "versions": versions,
            "date": datetime.date.today().isoformat(), "rows": rows}, indent=1) + "\n")


def _installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def _text(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _measured(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures of a row, or the reason why there are none."""
    try:
        return measure()
    except Exception as error:  # of a device's memory, JAX and PyTorch raise their own
        if "memory" not in str(error).lower() and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"note": "does not fit the memory"}


def measurements(size: Size, device: jax.Device) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """(Name, measurement) of each row, in order; weights are made when a row needs them, and dropped before others."""
    partial = functools.partial
    yield "train", partial(train, size, device)
    yield "train, PyTorch compiled", partial(torch_train, size)
    for dtype in size.dtypes:
        network = Network(size.decode, dtype)
        for rows, cache, per_step in itertools.product((1, 16), ("append", "prefix", "none"), (4, 1)):
            name = f"decode {dtype}, {rows} rows, {'exact' if cache == 'none' else cache}, {per_step} a step"
            yield name, partial(decode, size, network, cache, rows, per_step)
        for cached in (False, True):
            name = f"score {dtype}, context {size.context}, candidates of 16{', cached' * cached}"
            yield name, partial(score, size, network, cached)
        del network
    yield "decode, published loop in PyTorch, 1 row, 4 a step", partial(torch_decode, size)
    if size.load_layers:
        yield f"load {size.load_layers} layers of full width, bfloat16", partial(load, size)


def peak_flops(device: jax.Device) -> float | None:
    """Published operations per second of a device, or None."""
    if device.device_kind in TPU_KINDS:
        chip = CHIPS[TPU_KINDS[device.device_kind]]
        return chip.flops / chip.devices
    return next((flops for name, flops in GPU_FLOPS.items() if name in device.device_kind), None)


def train_config(size: Size) -> Config:
    """The config of the training step, on one device."""
    return dataclasses.replace(
        Config(), model=size.train, mesh=MeshConfig(data=1), diffusion=DiffusionConfig(mask_id=MASK),
        data=DataConfig(length=size.train_length, batch_size=size.train_rows),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=0), train=TrainConfig(steps=1000, logits_chunk=256))


def train(size: Size, device: jax.Device) -> dict[str, Any]:
    """A training step from random tokens to the new state: the fastest."""
    from train_step import make_batch

    from illada_jax.parallel.mesh import make_mesh, use_mesh
    from illada_jax.training.step import make_init, make_train_step

    config, tokens = train_config(size), size.train_rows * size.train_length
    mesh = make_mesh(config.mesh, [device])
    rng = np.random.default_rng(0)
    shape = (size.train_rows, size.train_length)
    batch = make_batch(rng.integers(MASK + 1, size.train.vocab_size, shape, np.int32))
    with use_mesh(mesh):
        step, state = make_train_step(config, mesh), make_init(config, mesh)()

        def run() -> None:
            nonlocal state
            state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))

        run()  # compiles
        seconds = _seconds(run)
    row = {"parameters": f"{model.num_params(size.train):,}", "step s": seconds, "tokens/s": tokens / seconds}
    peak, stats = peak_flops(device), device.memory_stats() or {}
    if peak:
        row["MFU"] = row["tokens/s"] * training_flops_per_token(size.train, size.train_length) / peak
    if "peak_bytes_in_use" in stats:
        row["memory GiB"] = stats["peak_bytes_in_use"] / 2**30
    return row


class Network:
    """Random weights of a dtype, made on the device at the first use, leaf by leaf."""

    def __init__(self, config: ModelConfig, dtype: str):
        self.config, self._dtype, self._params = config, dtype, None

    @property
    def params(self) -> Any:
        """The params, with Int8 matrices for the dtype int8."""
        if self._params is None:
            abstract, leaves = model.abstract_params(self.config), []
            for number, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(abstract)):
                name = "/".join(part.key for part in path)
                leaves.append(self._leaf(name, leaf.shape, jax.random.key(number)))
            self._params = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
        return self._params

    def _leaf(self, name: str, shape: tuple[int, ...], key: jax.Array) -> Any:
        dtype = self.config.dtype if self._dtype == "int8" else self._dtype
        if name.endswith("scale"):
            return jnp.ones(shape, dtype)
        if self._dtype == "int8" and name in INPUT_AXES:
            first = int(name.startswith("layers/"))
            outputs = (*shape[:first], *shape[first + INPUT_AXES[name]:])
            return Int8(jax.random.randint(key, shape, -127, 128, jnp.int8), jnp.full(outputs, 2e-4, jnp.float32))
        draw = jax.jit(lambda key: 0.02 * jax.random.normal(key, shape, dtype))
        return draw(key)

    @property
    def logits_fn(self) -> Any:
        """The network as decoder and scorer call it."""
        return model.make_logits_fn(self.config, self.params)

    @property
    def ids(self) -> SpecialIds:
        """No id stops a row: EOS lies beyond the vocabulary."""
        return SpecialIds(mask=MASK, eos=self.config.vocab_size, bos=0, pad=1, vocab_size=self.config.vocab_size)


def decode(size: Size, network: Network, cache: str, rows: int, per_step: int) -> dict[str, Any]:
    """Two blocks after random prompts, greedily; the first alone is timed, too."""
    settings = DecodeConfig(max_new_tokens=2 * size.block, block_length=size.block, batch_size=rows, cache=cache,
                            steps_per_block=size.block // per_step)
    canvas = size.prompt + settings.max_new_tokens
    decoder = Decoder(network.logits_fn, settings, network.ids, size.decode.max_length,
                      model.make_init_cache(size.decode), buckets=[canvas])
    prompts = np.random.default_rng(0).integers(MASK + 1, size.decode.vocab_size, (rows, size.prompt)).tolist()
    one_block = [dataclasses.replace(decoder.settings, max_new_tokens=size.block)] * rows
    decoder.generate(prompts, row_settings=one_block)  # compiles
    first = _seconds(lambda: decoder.generate(prompts, row_settings=one_block))
    whole = _seconds(lambda: decoder.generate(prompts))
    return {"first s": first, "tokens/s": rows * size.block / max(whole - first, 1e-9)}


def score(size: Size, network: Network, cached: bool) -> dict[str, Any]:
    """Two questions of four candidates, by confidence."""
    rng = np.random.default_rng(0)
    draw = lambda count: rng.integers(MASK + 1, size.decode.vocab_size, count).tolist()  # noqa: E731
    pairs = [(context, draw(16)) for context in (draw(size.context), draw(size.context)) for _ in range(4)]

    def run() -> None:
        settings = ScoreConfig(batch_size=8, context_cache=cached)
        Scorer(network.logits_fn, settings, network.ids, size.context + 16,
               init_cache=model.make_init_cache(size.decode)).score(pairs)

    run()  # compiles
    return {"candidates/s": len(pairs) / _seconds(run)}


def _seconds(run: Callable[[], object]) -> float:
    """The fastest of some runs: five, or as many as begin within three seconds."""
    seconds: list[float] = []
    while not seconds or (len(seconds) < 5 and sum(seconds) < 3):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def load(size: Size) -> dict[str, Any]:
    """A checkpoint in the published layout, from the disk to the device."""
    from full_width import run_apart, write_checkpoint

    with tempfile.TemporaryDirectory() as made:
        sizes = run_apart(write_checkpoint, pathlib.Path(made) / "source", size.load_layers, False, 600_000_000)
        seconds = _seconds(lambda: jax.block_until_ready(illada_jax.load(f"{made}/source", dtype="bfloat16").params))
    return {"GB": sizes.tensors / 1e9, "seconds": seconds, "GB/s": sizes.tensors / 1e9 / seconds}


def _torch_device() -> str | None:
    """Where PyTorch would compute as JAX does, or None."""
    try:
        import torch
    except ImportError:
        return None
    if jax.default_backend() == "cpu":
        return "cpu"
    return "cuda" if torch.cuda.is_available() else None


def torch_train(size: Size) -> dict[str, Any]:
    """The same training step in PyTorch with torch.compile, on the same device: the fastest."""
    device = _torch_device()
    if device is None:
        return {"note": "no PyTorch for this device"}
    import torch
    from torch_training import Trainer

    config = train_config(size)
    params = jax.device_get(Network(size.train, "float32").params)
    trainer = Trainer(params, config, compiled=True, device=device, bfloat16=size.train.dtype == "bfloat16")
    rng = np.random.default_rng(0)
    shape = (size.train_rows, size.train_length)
    targets = torch.from_numpy(rng.integers(MASK + 1, size.train.vocab_size, shape)).to(device)
    masked = torch.from_numpy(rng.random(shape) < 0.5).to(device)
    inputs = torch.where(masked, MASK, targets), targets, 2.0 * masked.float() / targets.numel()
    trainer.step(*inputs)  # compiles
    seconds = _seconds(lambda: trainer.step(*inputs).item())
    return {"step s": seconds, "tokens/s": targets.numel() / seconds}


def torch_decode(size: Size) -> dict[str, Any]:
    """The published loop: the whole canvas at every step, for the first and the second block of one prompt."""
    device = _torch_device()
    if device is None:
        return {"note": "no PyTorch for this device"}
    import torch
    from torch_llada import Network as TorchNetwork
    from torch_llada import variable_length

    dtype = torch.bfloat16 if size.decode.dtype == "bfloat16" else torch.float32
    abstract = jax.tree_util.tree_leaves_with_path(model.abstract_params(size.decode))
    prompt = np.random.default_rng(0).integers(MASK + 1, size.decode.vocab_size, size.prompt).tolist()
    with torch.device(device):
        weights = {"/".join(part.key for part in path): (torch.ones if path[-1].key == "scale" else torch.randn)(
            leaf.shape, dtype=dtype) * (1 if path[-1].key == "scale" else 0.02) for path, leaf in abstract}
        network = TorchNetwork(weights, size.decode.num_layers, size.decode.rope_theta, size.decode.norm_eps)

        def run(blocks: int) -> float:
            return _seconds(lambda: variable_length(
                network, prompt, {"mask": MASK, "eos": -1}, blocks * size.block, size.block, size.block // 4))

        run(1)
        first = run(1)
        return {"first s": first, "tokens/s": size.block / max(run(2) - first, 1e-9)}


if __name__ == "__main__":
    cli.run(main)
