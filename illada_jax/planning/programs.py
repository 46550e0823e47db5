"""The training step, the decoder and the scorer, compiled for devices that need not exist.

They are the programs that run, built by the same functions from abstract arrays.
"""

import dataclasses
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from illada_jax import model
from illada_jax.config import Config
from illada_jax.data.batch import Batch
from illada_jax.decoding import SpecialIds
from illada_jax.decoding.decoder import make_rules
from illada_jax.decoding.kept import abstract_cache
from illada_jax.decoding.loop import Carry, run_blocks
from illada_jax.decoding.sampling import RowSettings
from illada_jax.errors import ConfigError, InputError
from illada_jax.parallel import sharding
from illada_jax.parallel.mesh import check_divisible, make_mesh, use_mesh
from illada_jax.planning.chips import Topology
from illada_jax.scoring.log_probs import token_log_probs
from illada_jax.training.step import abstract_state, make_train_step

# The compiler's two messages: "Used 20.25G of 15.75G hbm", "(20.25G) exceeds available HBM (15.75G)".
_REFUSAL = re.compile(r"([\d.]+)([KMG])i?\)? (?:of|exceeds available HBM) \(?([\d.]+)([KMG])i?(?: hbm|\))")
_UNITS = {"K": 2**-20, "M": 2**-10, "G": 1.0}  # in GiB


class DoesNotFit(InputError):
    """The compiler refused the program: it needs more memory than a device has."""


def resolve(config: Config, topology: Topology) -> tuple[Config, Mesh, list[str]]:
    """(config, mesh, assumptions): the config completed by what a corpus and a TPU would decide.

    Raises:
      ConfigError: the vocabulary size is unknown, or the config does not fit the mesh.
    """
    assumptions = []
    if not config.model.vocab_size:
        raise ConfigError("config.model.vocab_size = 0: without a corpus, give its value")
    if config.model.attention == "auto":
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="splash"))
        assumptions.append("attention: splash, which `auto` chooses on TPU")
    if config.diffusion.mask_id == -1:
        config = dataclasses.replace(config, diffusion=dataclasses.replace(config.diffusion, mask_id=0))
        assumptions.append("the id of MASK is 0 (the tokenizer would say)")
    return config, make_mesh(config.mesh, topology.devices), assumptions


def lower_train(config: Config, mesh: Mesh) -> jax.stages.Lowered:
    """Lowers the training step. Raises ConfigError if the config does not fit the mesh."""
    check_divisible(config, mesh)
    dtypes = Batch(jnp.int32, jnp.bool_, jnp.int32, jnp.int32, jnp.float32)
    batch = Batch(*(_rows(mesh, dtype, config.data.batch_size, config.data.length) for dtype in dtypes))
    with use_mesh(mesh):
        return make_train_step(config, mesh).lower(abstract_state(config, mesh), batch)


def lower_decode(config: Config, mesh: Mesh, params: Any, canvas: int) -> jax.stages.Lowered:
    """Lowers the decoder's loop over config.decode.batch_size rows of `canvas` columns; `params` are abstract."""
    mask = config.diffusion.mask_id
    others = [id_ for id_ in range(4) if id_ != mask][:3]
    ids = SpecialIds(mask, *others, vocab_size=config.model.vocab_size)
    rules = make_rules(config.decode, ids, init_cache=model.make_init_cache(config.model))

    def array(dtype: jnp.dtype, *shape: int) -> jax.ShapeDtypeStruct:
        return _rows(mesh, dtype, config.decode.batch_size, *shape)

    carry = Carry(
        tokens_BL=array(jnp.int32, canvas), length_B=array(jnp.int32), prompt_B=array(jnp.int32),
        limit_B=array(jnp.int32), done_B=array(jnp.bool_), keys_B2=array(jnp.uint32, 2), steps_B=array(jnp.int32),
        reveal_step_BL=array(jnp.int32, canvas), log_prob_BL=array(jnp.float32, canvas),
        settings=jax.tree.map(lambda x: array(x.dtype, *x.shape[1:]), RowSettings.of(config.decode)))
    cache = None
    if rules.appends:
        cache = abstract_cache(rules.init_cache, rules.passes * config.decode.batch_size, canvas, mesh)
    num_blocks = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    with use_mesh(mesh):
        return run_blocks.lower(model.make_logits_fn(config.model, params), carry, num_blocks, cache, rules=rules)


def lower_score(config: Config, mesh: Mesh, params: Any, canvas: int, queries: int) -> jax.stages.Lowered:
    """Lowers one evaluation of the scorers, of config.decode.batch_size rows: `queries` of `canvas` columns each."""
    shapes = ((canvas,), (), (), (queries,), (queries, 1))
    arrays = [_rows(mesh, jnp.int32, config.decode.batch_size, *shape) for shape in shapes]
    with use_mesh(mesh):
        return token_log_probs.lower(model.make_logits_fn(config.model, params), *arrays,
                                     mask_id=config.diffusion.mask_id, cfg_scale=config.decode.cfg_scale)


def _rows(mesh: Mesh, dtype: jnp.dtype, *shape: int) -> jax.ShapeDtypeStruct:
    """An abstract array whose first axis is rows."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))


def compile_lowered(lowered: jax.stages.Lowered) -> tuple[str, dict[str, Any]]:
    """Compiles in one to two minutes and 2 GiB, for a model of any depth.

    Returns:
      The text of the program, and figures of one device: its memory in bytes (the peak use is below the reserved total,
      because there are gaps between arrays), and the CPU time of the compilation.

    Raises:
      DoesNotFit: the program needs more memory than a device has; says how much of each.
    """
    started = time.process_time()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        refusal = _REFUSAL.search(" ".join(str(error).split()))
        if refusal is None:
            raise
        needed, available = (float(refusal[i]) * _UNITS[refusal[i + 1]] for i in (1, 3))
        raise DoesNotFit(f"needs {needed:.1f} GiB on each device, which has {available:.2f} GiB: "
                         f"{needed - available:.1f} GiB too much") from error
    memory = compiled.memory_analysis()
    total = (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
             + memory.temp_size_in_bytes)  # aliased outputs share the memory of arguments
    return compiled.as_text(), {
        "argument_bytes": memory.argument_size_in_bytes, "temporary_bytes": memory.temp_size_in_bytes,
        "total_bytes": total, "peak_bytes": memory.peak_memory_in_bytes,
        "compile_seconds": round(time.process_time() - started, 1)}
