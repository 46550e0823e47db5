"""Converts models: official weights to a workdir, a workdir to the official layout, either one to int8.

    python -m illada_jax.convert --source=GSAI-ML/LLaDA-8B-Instruct --target=workdirs/llada_8b_instruct
    python -m illada_jax.convert --source=GSAI-ML/iLLaDA-8B-Base --target=workdirs/illada_8b --quantize=int8
    python -m illada_jax.convert --source=workdirs/quickstart --target=exported/quickstart --dtype=bfloat16

The source sets the direction: a Hugging Face directory or Hub id (safetensors of LLaDA or iLLaDA) becomes a workdir
for generate, evaluate and `--config.init.checkpoint`; a workdir becomes a Hugging Face directory, or a smaller workdir
with `--quantize=int8`. The target appears whole or, after an error or Ctrl-C, not at all. JAX_PLATFORMS=cpu converts in
host memory.
"""

import shlex

from absl import flags

from illada_jax import cli
from illada_jax.interop.conversion import DEFAULT_SHARD_GIGABYTES, Conversion
from illada_jax.interop.families import FAMILIES
from illada_jax.interop.tensors import DTYPES

_SPECIAL_IDS = cli.special_id_flags()
_CHAT_TEMPLATE = cli.chat_template_flag()
_SOURCE = flags.DEFINE_string("source", None, "a workdir, one checkpoint in it, or a Hugging Face directory or Hub id",
                              required=True)
_TARGET = flags.DEFINE_string("target", None, "the directory to write; must not exist, or be empty", required=True)
_DTYPE = flags.DEFINE_enum("dtype", None, [dtype.name for dtype in DTYPES.values()],
                           "dtype of the weights written; default: unchanged (float16 becomes float32 in a workdir)")
_QUANTIZE = flags.DEFINE_enum("quantize", "none", ["none", "int8"], "write a workdir with int8 matrices")
_MESH = flags.DEFINE_string("mesh", "", "devices to hold the weights while converting, as fsdp=8; default: the first")
_SHARD_GIGABYTES = flags.DEFINE_float(
    "shard_gigabytes", None, f"size of an exported file; default: {DEFAULT_SHARD_GIGABYTES}", lower_bound=1e-6)
_FAMILY = flags.DEFINE_enum("family", None, list(FAMILIES),
                            "layout of an export; default: the one the weights came from, else illada")

def main(argv: list[str]) -> None:
    """Converts and prints a line that describes the result."""
    del argv
    print(Conversion(_SOURCE.value, _TARGET.value, _DTYPE.value, _QUANTIZE.value, _MESH.value, _SHARD_GIGABYTES.value,
                     _FAMILY.value, cli.given_ids(_SPECIAL_IDS), _CHAT_TEMPLATE.value).run())
    cli.hint(f"next: python -m illada_jax.generate --checkpoint={shlex.quote(_TARGET.value)} --prompt=…")


if __name__ == "__main__":
    cli.run(main)
