"""The programs of this project, compiled for devices that need not be there: the step, the decoder and the scorer.

They are the ones that run, built by the same functions; only the arrays are missing.
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
from illada_jax.decoding.loop import Carry, run_blocks
from illada_jax.errors import ConfigError, InputError
from illada_jax.parallel import sharding
from illada_jax.parallel.mesh import check_divisible, make_mesh, use_mesh
from illada_jax.planning.chips import GIB, Topology
from illada_jax.scoring.log_probs import token_log_probs
from illada_jax.training.optimizer import make_optimizer
from illada_jax.training.saved_model import abstract_params
from illada_jax.training.step import abstract_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of a program for one device.

    Attributes:
      text: the program.
      argument_bytes, output_bytes, alias_bytes, temporary_bytes: memory; alias is what outputs share with arguments.
      peak_bytes: the most that is in use at a time, arguments included; less than is reserved, for temporaries lie in
        places of their own.
      seconds: processor time of the compilation.
    """

    text: str
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    peak_bytes: int
    seconds: float

    @property
    def total_bytes(self) -> int:
        """Memory that a device needs to run it."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temporary_bytes


class DoesNotFit(InputError):
    """The compiler refused: the program needs more memory than a device has."""


def prepare(config: Config, topology: Topology) -> tuple[Config, Mesh, list[str]]:
    """The config with what a corpus and a platform would decide, the mesh, and what was assumed, as lines.

    Raises:
      ConfigError: the vocabulary is not known, or the config does not fit the mesh.
    """
    assumed = []
    if not config.model.vocab_size:
        raise ConfigError("config.model.vocab_size = 0: without a corpus, give its value")
    if config.model.attention == "auto":
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="splash"))
        assumed.append("attention: splash, which `auto` chooses on TPU")
    if config.diffusion.mask_id == -1:
        config = dataclasses.replace(config, diffusion=dataclasses.replace(config.diffusion, mask_id=0))
        assumed.append("the id of MASK is 0 (the tokenizer would say)")
    return config, make_mesh(config.mesh, topology.devices), assumed


def lower_train(config: Config, mesh: Mesh) -> jax.stages.Lowered:
    """The training step. Raises ConfigError where the config does not fit the mesh."""
    check_divisible(config, mesh)
    optimizer = make_optimizer(config)
    state = abstract_state(config, optimizer, mesh)
    shape, rows = (config.data.batch_size, config.data.length), sharding.batch_sharding(mesh)
    array = lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)  # noqa: E731
    batch = Batch(array(jnp.int32), array(jnp.bool_), array(jnp.int32), array(jnp.int32), array(jnp.float32))
    with use_mesh(mesh):
        return make_train_step(config, optimizer, mesh).lower(state, batch)


def inference_params(config: Config, mesh: Mesh, quantize: str) -> Any:
    """Params as they are loaded for decoding and scoring in the compute dtype, as ShapeDtypeStructs.

    Args:
      config: its model.
      mesh: where they lie.
      quantize: `none` or `int8`.
    """
    return abstract_params(config.model, jnp.dtype(config.model.dtype), mesh, quantize == "int8")


def lower_decode(config: Config, mesh: Mesh, params: Any, canvas: int) -> jax.stages.Lowered:
    """The decoder's loop for config.decode.batch_size rows on a canvas of `canvas` columns; `params` are abstract.

    Raises:
      ConfigError: the rows, or the model, do not divide over the mesh.
    """
    rows = _decode_rows(config, mesh)
    mask = config.diffusion.mask_id
    others = [id_ for id_ in range(4) if id_ != mask][:3]
    ids = SpecialIds(mask, *others, vocab_size=config.model.vocab_size)
    init_cache = model.make_init_cache(config.model)
    rules = make_rules(config.decode, ids, init_cache=init_cache)
    of_rows = sharding.batch_sharding(mesh)
    row = lambda *shape: lambda dtype: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=of_rows)  # noqa: E731
    carry = Carry(
        tokens_BL=row(canvas)(jnp.int32), length_B=row()(jnp.int32), prompt_B=row()(jnp.int32),
        limit_B=row()(jnp.int32), done_B=row()(jnp.bool_), keys_B2=row(2)(jnp.uint32), steps_B=row()(jnp.int32),
        reveal_step_BL=row(canvas)(jnp.int32), log_prob_BL=row(canvas)(jnp.float32))
    num_blocks = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    logits_fn = model.make_logits_fn(config.model, params)
    with use_mesh(mesh):
        return run_blocks.lower(logits_fn, carry, num_blocks, rules=rules)


def _decode_rows(config: Config, mesh: Mesh) -> int:
    """Rows that are decoded at the same time, checked against the mesh, as is the model."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = config.decode.batch_size
    if rows % shards:
        raise ConfigError(f"config.decode.batch_size = {rows}: must be divisible by mesh.data × mesh.fsdp = {shards}")
    check_divisible(dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=shards),
                                        train=dataclasses.replace(config.train, microbatches=1)), mesh)
    return rows


def compile_for(lowered: jax.stages.Lowered) -> Compiled:
    """Compiles; takes one to two minutes and 2 GiB for a model of any depth.

    Raises:
      DoesNotFit: saying how much is needed, how much there is.
    """
    started = time.process_time()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        refused = _too_much(" ".join(str(error).split()))
        if refused is None:
            raise
        need, there = refused
        raise DoesNotFit(f"needs {need:.1f} GiB on each device, which has {there:.2f} GiB: {need - there:.1f} GiB too "
                         "much") from error
    memory = compiled.memory_analysis()
    return Compiled(compiled.as_text(), memory.argument_size_in_bytes, memory.output_size_in_bytes,
                    memory.alias_size_in_bytes, memory.temp_size_in_bytes, memory.peak_memory_in_bytes,
                    time.process_time() - started)


# What the compiler says where memory is short: after it has placed everything, or before.
_REFUSALS = (r"Used ([\d.]+)([KMG])i? of ([\d.]+)([KMG])i? hbm",
             r"\(([\d.]+)([KMG])\) exceeds available HBM \(([\d.]+)([KMG])\)")


def _too_much(message: str) -> tuple[float, float] | None:
    """(GiB that a program needs, GiB that there are) if that is what the compiler complains of."""
    found = next(filter(None, (re.search(refusal, message) for refusal in _REFUSALS)), None)
    if found is None:
        return None
    units = {"K": 2**10 / GIB, "M": 2**20 / GIB, "G": 1.0}
    return float(found[1]) * units[found[2]], float(found[3]) * units[found[4]]


def lower_score(config: Config, mesh: Mesh, params: Any, canvas: int, wanted: int) -> jax.stages.Lowered:
    """One evaluation of the scorers: config.decode.batch_size rows of `canvas` columns, `wanted` of them looked at.

    Raises:
      ConfigError: the rows, or the model, do not divide over the mesh.
    """
    rows = _decode_rows(config, mesh)
    array = lambda *shape: jax.ShapeDtypeStruct(  # noqa: E731
        (rows, *shape), jnp.int32, sharding=sharding.batch_sharding(mesh))
    logits_fn = model.make_logits_fn(config.model, params)
    with use_mesh(mesh):
        return token_log_probs.lower(logits_fn, array(canvas), array(), array(), array(wanted), array(wanted, 1),
                          mask_id=config.diffusion.mask_id, cfg_scale=config.decode.cfg_scale)
