"""Memory and time of importing, loading, decoding and exporting weights at iLLaDA's full width.

Example:
  python experiments/benchmarks/full_width.py

Writes a random checkpoint in iLLaDA's layout, with its widths and vocabulary but few layers, in several bfloat16
shards. Then imports it (`convert`), loads it from the shards (`illada_jax.load`, in bfloat16 and rounded to int8),
decodes from them (`generate`) and exports it again (`convert`), each in a process of its own. Prints the peak resident
memory above that of the same process with a tiny model, beside its bound (the arrays to hold, and twice the largest
tensor of the source), and the seconds beyond the tiny model's, per GB of bfloat16 weights. The export is compared with
the source, bit by bit. Decoding is in float32: from other types XLA makes float32 copies on a CPU, unrelated to reading
the weights.
"""

import dataclasses
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from absl import flags

from illada_jax import cli

_LAYERS = flags.DEFINE_integer("layers", 2, "layers (iLLaDA has 32)")
_SHARD_GIGABYTES = flags.DEFINE_float("shard_gigabytes", 0.6, "size of a weights file")
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 32, "tokens to decode, one a step")
_DIRECTORY = flags.DEFINE_string("directory", None, "directory for the files; default: the temporary directory")

GB = 1e9
NUM_IDS = 260  # of the tokenizer of bytes; the vocabulary has more rows
PROMPT = "The capital of France is"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes of a model: all tensors in bfloat16, the largest of them, and all with int8 matrices."""

    tensors: int
    largest: int
    int8: int


def write_checkpoint(directory: pathlib.Path, layers: int, tiny: bool, shard_bytes: int) -> Sizes:
    """Writes random weights with a tokenizer of bytes, so that most rows of the vocabulary are padding."""
    import ml_dtypes
    import numpy as np

    from illada_jax.config import ModelConfig
    from illada_jax.data.tokenizers import ByteTokenizer
    from illada_jax.interop.families import ILLADA, write_model_config
    from illada_jax.interop.layout import tensor_mappings
    from illada_jax.interop.tensors import TensorInfo, write_tensors

    model = ModelConfig(vocab_size=155_136, d_model=4096, num_layers=layers, num_heads=32, num_kv_heads=8, head_dim=128,
                        d_ff=14_336, max_length=8192)
    if tiny:
        model = dataclasses.replace(model, vocab_size=264, d_model=64, head_dim=2, d_ff=224)
    mappings, bfloat16 = list(tensor_mappings(ILLADA, model)), np.dtype(ml_dtypes.bfloat16)
    tensors = {mapping.name: TensorInfo(mapping.shape, bfloat16) for mapping in mappings}
    rng = np.random.default_rng(0)

    def draw(mapping):
        x = rng.standard_normal(mapping.shape, np.float32)
        x *= model.d_model**-0.5 if len(mapping.shape) > 1 else 0.1
        return (x + (len(mapping.shape) == 1)).astype(bfloat16)

    directory.mkdir()
    write_tensors(directory, tensors, map(draw, mappings), shard_bytes)
    tokenizer = ByteTokenizer()
    assert tokenizer.vocab_size == NUM_IDS
    tokenizer.save(directory)
    ids = {f"{name}_token_id": id_ for name, id_ in tokenizer.special_ids.items()}
    (directory / "config.json").write_text(json.dumps(write_model_config(ILLADA, model) | ids))
    matrices = sum(tensors[mapping.name].nbytes for mapping in mappings if mapping.input_axes)
    scales = sum(4 * mapping.shape[0] for mapping in mappings if mapping.input_axes)
    total = sum(tensor.nbytes for tensor in tensors.values())
    return Sizes(total, max(tensor.nbytes for tensor in tensors.values()), total - matrices // 2 + scales)


def equal(one: pathlib.Path, other: pathlib.Path) -> bool:
    """True if two directories hold the same tensors, bit by bit."""
    import numpy as np

    from illada_jax.interop.tensors import TensorDirectory

    a, b = TensorDirectory(one), TensorDirectory(other)
    return a.tensors.keys() == b.tensors.keys() and all(
        np.array_equal(a.read(name, whole).view(np.uint16), b.read(name, whole).view(np.uint16))
        for name, tensor in a.tensors.items() for whole in [(slice(None),) * len(tensor.shape)])


def run_apart(function, *arguments):
    """Calls a function in a separate process: a child's peak memory is at least its parent's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def run(*arguments: str) -> tuple[float, int, str]:
    """Runs Python; (seconds, peak resident memory in bytes, standard output)."""
    started = time.monotonic()
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True) as process:
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}")
    return time.monotonic() - started, usage.ru_maxrss * 1024, printed


def commands(directory: pathlib.Path) -> dict[str, list[str]]:
    """The commands to run on the checkpoint in `directory`, in this order, by name."""
    source, workdir, new = directory / "source", directory / "workdir", _NEW_TOKENS.value
    load = "import illada_jax; illada_jax.load({!r}, dtype='bfloat16', quantize={!r})"
    return {
        "import": ["-m", "illada_jax.convert", f"--source={source}", f"--target={workdir}"],
        "load": ["-c", load.format(str(source), "none")],
        "load as int8": ["-c", load.format(str(source), "int8")],
        f"decode {new} tokens": [
            "-m", "illada_jax.generate", f"--checkpoint={source}", f"--prompt={PROMPT}", "--output=json",
            f"--max_new_tokens={new}", f"--block_length={new}"],
        "export": ["-m", "illada_jax.convert", f"--source={workdir}", f"--target={directory / 'back'}",
                   f"--shard_gigabytes={_SHARD_GIGABYTES.value}"],
    }


def main(_: list[str]) -> None:
    """Writes checkpoints, measures the commands, compares the export with the source."""
    with tempfile.TemporaryDirectory(dir=_DIRECTORY.value) as made:
        places = {tiny: pathlib.Path(made) / ("tiny" if tiny else "full") for tiny in (True, False)}
        sizes = {}
        for tiny, directory in places.items():
            directory.mkdir()
            sizes[tiny] = run_apart(write_checkpoint, directory / "source", _LAYERS.value, tiny,
                                    int(_SHARD_GIGABYTES.value * GB))
        full, files = sizes[False], len(list((places[False] / "source").glob("*.safetensors")))
        print(f"{full.tensors / GB:.2f} GB in {files} files, the largest tensor {full.largest / GB:.2f} GB\n")
        print(f"{'':18} {'held GB':>8} {'peak GB':>8} {'bound GB':>9} {'seconds':>8} {'s per GB':>9}", flush=True)
        for name, tiny_command in commands(places[True]).items():
            base_seconds, base_peak, _ = run(*tiny_command)
            seconds, peak, printed = run(*commands(places[False])[name])
            held = {"load as int8": full.int8, "export": 0}.get(name, full.tensors) * (2 if "decode" in name else 1)
            bound, rise, extra = held + 2 * full.largest, peak - base_peak, seconds - base_seconds
            print(f"{name:18} {held / GB:8.2f} {rise / GB:8.2f} {bound / GB:9.2f} {extra:8.1f} "
                  f"{extra / (full.tensors / GB):9.1f}" + (" above the bound" if rise > bound else ""), flush=True)
            if name.startswith("decode"):
                tokens = json.loads(printed)["tokens"]
                assert max(tokens, default=0) < NUM_IDS, "a padding id was generated"
                print(f"{'':18} {len(tokens)} tokens, none of them padding of the vocabulary", flush=True)
        assert run_apart(equal, places[False] / "source", places[False] / "back"), "export and source differ"
        print("\nthe export equals the source, bit by bit")


if __name__ == "__main__":
    cli.run(main)
