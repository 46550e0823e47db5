"""Flags of every command that loads a model: a command adopts them, so that its --help shows them."""

import jax
from absl import flags

from illada_jax import api, cli, id_flags
from illada_jax.errors import InputError
from illada_jax.parallel.mesh import parse_mesh

flags.adopt_module_key_flags(id_flags)
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "a workdir, one checkpoint in it, a Hugging Face directory or Hub id, demo or demo-chat")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "type of params and compute")
QUANTIZE = flags.DEFINE_enum("quantize", "none", ["none", "int8"], "round the matrices to eight bits")
MESH = flags.DEFINE_string(
    "mesh", "", "devices of this host that share the work, such as fsdp=4,tensor=2; default: the first one")


def load(default: str = "") -> api.LanguageModel:
    """The model that the flags name, or the one named `default`. Raises InputError where there is none."""
    checkpoint = CHECKPOINT.value or default
    if not checkpoint:
        raise InputError("--checkpoint is required, for example --checkpoint=workdirs/quickstart")
    if not CHECKPOINT.value:
        cli.hint(f"the small model {default}; --checkpoint=… takes another")
    # With several processes the first device of all is another host's.
    mesh = parse_mesh(MESH.value or ("data=1" if jax.process_count() > 1 else ""))
    return api.load(checkpoint, DTYPE.value, mesh, QUANTIZE.value, id_flags.special_ids())
