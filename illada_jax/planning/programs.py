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
from illada_jax.decoding.loop import Carry, run_blocks
from illada_jax.errors import ConfigError, InputError
from illada_jax.parallel import sharding
from illada_jax.parallel.mesh import check_divisible, make_mesh, use_mesh
from illada_jax.planning.chips import GIB, Topology
from illada_jax.scoring.log_probs import token_log_probs
from illada_jax.training.optimizer import make_optimizer
from illada_jax.training.step import abstract_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program compiled for one device.

    Attributes:
      text: the program.
      memory: the compiler's statistics, in bytes; less is in use at the peak than is reserved, as there are gaps.
      seconds: processor time of the compilation.
    """

    text: str
    memory: Any
    seconds: float

    @property
    def total_bytes(self) -> int:
        """Memory that a device needs to run it; aliased outputs share the memory of arguments."""
        return (self.memory.argument_size_in_bytes + self.memory.output_size_in_bytes
                - self.memory.alias_size_in_bytes + self.memory.temp_size_in_bytes)


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
    optimizer = make_optimizer(config)
    dtypes = Batch(jnp.int32, jnp.bool_, jnp.int32, jnp.int32, jnp.float32)
    batch = Batch(*(_rows(mesh, dtype, config.data.batch_size, config.data.length) for dtype in dtypes))
    with use_mesh(mesh):
        return make_train_step(config, optimizer, mesh).lower(abstract_state(config, optimizer, mesh), batch)


def lower_decode(config: Config, mesh: Mesh, params: Any, canvas: int) -> jax.stages.Lowered:
    """Lowers the decoder's loop over config.decode.batch_size rows of `canvas` columns; `params` are abstract.

    Raises:
      ConfigError: the rows or the model do not divide over the mesh.
    """
    _check_decode_rows(config, mesh)
    mask = config.diffusion.mask_id
    others = [id_ for id_ in range(4) if id_ != mask][:3]
    ids = SpecialIds(mask, *others, vocab_size=config.model.vocab_size)
    rules = make_rules(config.decode, ids, init_cache=model.make_init_cache(config.model))

    def array(dtype: jnp.dtype, *shape: int) -> jax.ShapeDtypeStruct:
        return _rows(mesh, dtype, config.decode.batch_size, *shape)

    carry = Carry(
        tokens_BL=array(jnp.int32, canvas), length_B=array(jnp.int32), prompt_B=array(jnp.int32),
        limit_B=array(jnp.int32), done_B=array(jnp.bool_), keys_B2=array(jnp.uint32, 2), steps_B=array(jnp.int32),
        reveal_step_BL=array(jnp.int32, canvas), log_prob_BL=array(jnp.float32, canvas))
    num_blocks = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    with use_mesh(mesh):
        return run_blocks.lower(model.make_logits_fn(config.model, params), carry, num_blocks, rules=rules)


def lower_score(config: Config, mesh: Mesh, params: Any, canvas: int, queries: int) -> jax.stages.Lowered:
    """Lowers one evaluation of the scorers: config.decode.batch_size rows, `queries` of their `canvas` columns queried.

    Raises:
      ConfigError: the rows or the model do not divide over the mesh.
    """
    _check_decode_rows(config, mesh)
    shapes = ((canvas,), (), (), (queries,), (queries, 1))
    arrays = [_rows(mesh, jnp.int32, config.decode.batch_size, *shape) for shape in shapes]
    with use_mesh(mesh):
        return token_log_probs.lower(model.make_logits_fn(config.model, params), *arrays,
                                     mask_id=config.diffusion.mask_id, cfg_scale=config.decode.cfg_scale)


def _rows(mesh: Mesh, dtype: jnp.dtype, *shape: int) -> jax.ShapeDtypeStruct:
    """An abstract array whose first axis is rows."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))


def _check_decode_rows(config: Config, mesh: Mesh) -> None:
    """Raises ConfigError if the rows of decoding, or the model, do not divide over the mesh."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = config.decode.batch_size
    if rows % shards:
        raise ConfigError(f"config.decode.batch_size = {rows}: must be divisible by mesh.data × mesh.fsdp = {shards}")
    check_divisible(dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=shards),
                                        train=dataclasses.replace(config.train, microbatches=1)), mesh)


def compile_lowered(lowered: jax.stages.Lowered) -> Compiled:
    """Compiles in one to two minutes and 2 GiB, for a model of any depth.

    Raises:
      DoesNotFit: the program needs more memory than a device has; says how much of each.
    """
    started = time.process_time()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        refusal = _parse_refusal(" ".join(str(error).split()))
        if refusal is None:
            raise
        needed, available = refusal
        raise DoesNotFit(f"needs {needed:.1f} GiB on each device, which has {available:.2f} GiB: "
                         f"{needed - available:.1f} GiB too much") from error
    return Compiled(compiled.as_text(), compiled.memory_analysis(), time.process_time() - started)


# The compiler's messages when memory is short: after it has placed all buffers, or before.
_REFUSALS = (r"Used ([\d.]+)([KMG])i? of ([\d.]+)([KMG])i? hbm",
             r"\(([\d.]+)([KMG])\) exceeds available HBM \(([\d.]+)([KMG])\)")


def _parse_refusal(message: str) -> tuple[float, float] | None:
    """(GiB needed, GiB available) if the compiler's message says that memory is short, else None."""
    found = next(filter(None, (re.search(refusal, message) for refusal in _REFUSALS)), None)
    if found is None:
        return None
    units = {"K": 2**10 / GIB, "M": 2**20 / GIB, "G": 1.0}
    return float(found[1]) * units[found[2]], float(found[3]) * units[found[4]]
