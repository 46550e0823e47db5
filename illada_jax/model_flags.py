"""Flags of every command that loads a model: a command adopts them, so that its --help shows them."""

import jax
from absl import flags

from illada_jax import api, id_flags
from illada_jax.errors import InputError
from illada_jax.parallel.mesh import parse_mesh

flags.adopt_module_key_flags(id_flags)
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "a workdir, one checkpoint in it, or a Hugging Face directory or Hub id")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "type of params and compute")
QUANTIZE = flags.DEFINE_enum("quantize", "none", ["none", "int8"], "round the matrices to eight bits")
MESH = flags.DEFINE_string(
    "mesh", "", "devices of this host that share the work, such as fsdp=4,tensor=2; default: the first one")


def load() -> api.LanguageModel:
    """The model that the flags name. Raises InputError where there is none."""
    if not CHECKPOINT.value:
        raise InputError("--checkpoint is required, for example --checkpoint=workdirs/quickstart")
    # With several processes the first device of all is another host's.
    mesh = parse_mesh(MESH.value or ("data=1" if jax.process_count() > 1 else ""))
    return api.load(CHECKPOINT.value, DTYPE.value, mesh, QUANTIZE.value, id_flags.special_ids())
