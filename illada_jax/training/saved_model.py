"""Reads checkpoints without its optimizer: onto any mesh, whole or param by param, rounded to eight bits or not."""

import base64
import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh, PartitionSpec

from illada_jax import config as config_lib
from illada_jax import model
from illada_jax.config import Config, ModelConfig
from illada_jax.data.tokenizers import Tokenizer, tokenizer_from_files
from illada_jax.errors import InputError
from illada_jax.model.int8 import Int8, quantize_matrix, quantize_params, quantized_axes
from illada_jax.parallel import sharding
from illada_jax.parallel.fingerprints import digest, fingerprints, first_difference
from illada_jax.parallel.mesh import check_model_divisible

FORMAT_VERSION = 1
_CHUNK_BYTES = 1 << 26  # of converted weights on the disk: an array of one chunk is in memory twice while it is read


class CorruptCheckpointError(Exception):
    """A checkpoint cannot be read, or holds something else than what was saved."""



@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model as decoding and scoring need it.

    Attributes:
      config: the config that made it.
      params: params of the model.
      tokenizer: its tokenizer.
      step: the training step.
    """

    config: Config
    params: Any
    tokenizer: Tokenizer
    step: int


class LazyModel(Protocol):
    """A model whose params are still to be read: a SavedModel, or an official checkpoint (`interop/checkpoint.py`).

    Attributes:
      config: the config that made it.
      tokenizer: its tokenizer.
      step: the training step.
      quantized: its matrices are Int8.
    """

    config: Config
    tokenizer: Tokenizer
    step: int
    quantized: bool

    def restore(self, dtype: jnp.dtype, mesh: Mesh | None, quantized: bool = False) -> Any:
        """The params in `dtype`, on the mesh or the first device; with `quantized`, matrices as Int8."""


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """A checkpoint whose params are still to be read: their moving average where the run has kept one.

    Attributes:
      directory: `WORKDIR/checkpoints/STEP`, absolute.
      config: the config that made it.
      step: the training step.
      quantized: its matrices are Int8.
      family: whose weights they are, where they were converted (`interop/families.py`), else empty.
      fingerprints: of the params by path, see `parallel/fingerprints.py`; empty in checkpoints older than they are.
    """

    directory: epath.Path
    config: Config
    step: int
    quantized: bool
    family: str
    fingerprints: Mapping[str, str]

    @property
    def _params(self) -> epath.Path:
        average = self.directory / "ema"
        return average if average.is_dir() else self.directory / "params"

    def _target(self, dtype: jnp.dtype, mesh: Mesh | None) -> Any:
        return abstract_params(self.config.model, dtype, mesh, self.quantized)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that was saved with it."""
        return tokenizer_from_files(_decode_files(_read_json(self.directory, "tokenizer")))

    @functools.cached_property
    def dtype(self) -> jnp.dtype:
        """The type of the params (of those that are not Int8)."""
        return jnp.dtype(ocp.PyTreeCheckpointHandler().metadata(self._params).tree["embedding"].dtype)

    def restore(self, dtype: jnp.dtype, mesh: Mesh | None, quantized: bool = False) -> Any:
        """The params in `dtype`, on the mesh or the first device; with `quantized`, matrices as Int8.

        Raises:
          InputError: what is read is not what was saved.
        """
        with named_damage(self._params, lambda: way_out(self.directory)):
            if self.quantized:
                with ocp.StandardCheckpointer() as checkpointer:
                    params = checkpointer.restore(self._params, self._target(self.dtype, mesh))
                self._check(fingerprints(params), self.fingerprints)
                is_int8 = lambda x: isinstance(x, Int8)  # noqa: E731
                return jax.tree.map(lambda x: x if is_int8(x) else x.astype(dtype), params, is_leaf=is_int8)
            # One at a time, in the type that they were saved in: they may not all fit beside those in another type,
            # and only as they were saved can they be checked.
            shardings = traverse_util.flatten_dict(param_shardings(self.config.model, mesh, quantized), sep="/")
            params = {}
            for path, sharding_ in shardings.items():
                saved = self.restore_param(path, self.dtype, mesh)
                recorded = {path: self.fingerprints[path]} if path in self.fingerprints else {}
                self._check({path: fingerprints(saved)[""]} if recorded else {}, recorded)
                if isinstance(sharding_, Int8):
                    params[path] = jax.jit(functools.partial(quantize_matrix, path), out_shardings=sharding_)(saved)
                else:
                    params[path] = saved.astype(dtype)
            return traverse_util.unflatten_dict(params, sep="/")

    def _check(self, found: Mapping[str, str], recorded: Mapping[str, str]) -> None:
        damaged = first_difference(found, recorded) if recorded else None
        if damaged is not None:
            raise CorruptCheckpointError(f"{damaged} is not what was saved")

    def restore_param(self, path: str, dtype: jnp.dtype, mesh: Mesh | None) -> jax.Array | Int8:
        """One of the params by path, in `dtype`, on the mesh or the first device; nothing else is read."""
        tree = self._tree_of(path, dtype, mesh)
        return self._read(path, tree, ocp.checkpoint_utils.construct_restore_args(tree))

    def read_param(self, path: str) -> np.ndarray:
        """One of the params by path, not Int8, as it was saved, in host memory: once (an array of jax is copied)."""
        tree = self._tree_of(path, self.dtype, None)
        return self._read(path, tree, jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree))

    def _tree_of(self, path: str, dtype: jnp.dtype, mesh: Mesh | None) -> Any:
        target = traverse_util.flatten_dict(self._target(dtype, mesh), sep="/")[path]
        return traverse_util.unflatten_dict({path: target}, sep="/")

    def _read(self, path: str, tree: Any, how: Any) -> Any:
        # The handler itself: a Checkpointer warns that an item has no metadata of a checkpoint.
        restored = ocp.PyTreeCheckpointHandler().restore(
            self._params, args=ocp.args.PyTreeRestore(tree, how, partial_restore=True))
        return traverse_util.flatten_dict(restored, sep="/")[path]


@functools.cache
def abstract_params(config: ModelConfig, dtype: jnp.dtype, mesh: Mesh | None, quantized: bool) -> Any:
    """Params in `dtype` (with `quantized`, matrices as Int8) as ShapeDtypeStructs with the shardings where they go."""
    def init() -> Any:
        params = jax.tree.map(lambda x: x.astype(dtype), model.init_params(config, jax.random.key(0)))
        return quantize_params(params) if quantized else params

    return jax.tree.map(lambda x, sharding_: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_),
                        jax.eval_shape(init), param_shardings(config, mesh, quantized))


def open_model(path: str | epath.Path) -> SavedModel:
    """Opens a workdir (its newest checkpoint) or one checkpoint, `WORKDIR/checkpoints/STEP`.

    Raises:
      InputError: there is no checkpoint, it is damaged, or it has another format version.
    """
    path = absolute_path(epath.Path(path))
    if (path / "checkpoints").is_dir():
        steps = ocp.utils.checkpoint_steps(path / "checkpoints")
        if not steps:
            raise InputError(f"{path}: no checkpoint has been saved yet")
        path = path / "checkpoints" / str(max(steps))
    if not (path / "params").is_dir() or not (path / "meta").is_dir():
        way = "" if path.exists() else ("; `python -m illada_jax.main --config=experiments/quickstart.py` trains one, "
                                        "`demo` is one in the package")
        raise InputError(f"{path}: not a checkpoint: expected a workdir or WORKDIR/checkpoints/STEP{way}")
    with named_damage(path, lambda: way_out(path)):
        meta, tokenizer = _read_json(path, "meta"), _read_json(path, "tokenizer")
        check_checksum(meta, tokenizer)
    if meta["format_version"] != FORMAT_VERSION:
        raise InputError(f"{path}: format version {meta['format_version']}; this code reads {FORMAT_VERSION}")
    item = "ema" if (path / "ema").is_dir() else "params"
    return SavedModel(path, config_lib.from_saved(meta["config"]), int(path.name), meta.get("quantized", False),
                      meta.get("family", ""), meta.get("fingerprints", {}).get(item, {}))


def with_checksum(meta: dict[str, Any], tokenizer_files: dict[str, str], **items: Any) -> dict[str, Any]:
    """The `meta` of a checkpoint with fingerprints of its arrays by item, and one of its texts."""
    meta = {**meta, "fingerprints": {name: fingerprints(tree) for name, tree in items.items()}}
    return {**meta, "checksum": _checksum(meta, tokenizer_files)}


def check_checksum(meta: dict[str, Any], tokenizer_files: dict[str, str]) -> None:
    """Raises CorruptCheckpointError if `meta` or the tokenizer of the checkpoint are not what `with_checksum` saw."""
    rest = {key: value for key, value in meta.items() if key != "checksum"}
    if "checksum" in meta and meta["checksum"] != _checksum(rest, tokenizer_files):
        raise CorruptCheckpointError("its meta or tokenizer is not what was saved")


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Turns whatever Orbax raises for files that are missing, cut off or no longer decode into CorruptCheckpointError.

    For a part of them that is a bare Exception, so that all must be caught; what the devices raise is let through.
    """
    try:
        yield
    except (CorruptCheckpointError, InputError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        raise CorruptCheckpointError(" ".join(str(error).split())[:200]) from error


@contextlib.contextmanager
def named_damage(path: epath.Path, advice: Callable[[], str]) -> Iterator[None]:
    """Turns damage into an InputError that names the checkpoint and ends with `advice()`."""
    try:
        with reading():
            yield
    except CorruptCheckpointError as error:
        raise InputError(f"{path}: damaged: {error}; {advice()}") from error


def way_out(path: epath.Path) -> str:
    """The checkpoints that may be taken instead of a damaged one, as a clause of a message."""
    steps = sorted(step for step in ocp.utils.checkpoint_steps(path.parent) if str(step) != path.name)
    if not steps:
        return "there is no other checkpoint in its workdir"
    return f"other checkpoints: {', '.join(str(path.parent / str(step)) for step in steps)}"


def _checksum(meta: dict[str, Any], tokenizer_files: dict[str, str]) -> str:
    return digest(json.dumps([meta, tokenizer_files], sort_keys=True))


def load_inference(source: LazyModel | str | os.PathLike, dtype: str | None = None, mesh: Mesh | None = None,
                   quantized: bool = False) -> Loaded:
    """Loads params, config and tokenizer; no optimizer.

    Args:
      source: a model, or a workdir (its newest checkpoint) or `WORKDIR/checkpoints/STEP`.
      dtype: type of params and compute, `float32` or `bfloat16`; None keeps float32 params and the config's compute.
      mesh: where the params go; None puts them on the first device.
      quantized: matrices as Int8, as they also are if they were saved so.

    Raises:
      InputError: there is no checkpoint, or it has another format version.
    """
    source = open_model(source) if isinstance(source, str | os.PathLike) else source
    config = source.config
    if dtype is not None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    params = source.restore(jnp.dtype(dtype or "float32"), mesh, quantized)
    return Loaded(config, params, source.tokenizer, source.step)


def save_model(workdir: epath.PathLike, loaded: Loaded, quantized: bool, family: str) -> None:
    """Writes a workdir with a checkpoint of params alone. For the arguments see SavedModel."""
    workdir = absolute_path(epath.Path(workdir))
    tokenizer_files = encode_files(loaded.tokenizer.files())
    meta = with_checksum({"format_version": FORMAT_VERSION, "config": config_lib.to_dict(loaded.config),
                   "corpus_fingerprint": "", "quantized": quantized, "family": family}, tokenizer_files,
                  params=loaded.params)
    loaded.tokenizer.save(workdir / "tokenizer")
    in_chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), loaded.params)
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        manager.save(loaded.step, args=ocp.args.Composite(
            params=ocp.args.StandardSave(loaded.params, in_chunks),
            meta=ocp.args.JsonSave(meta),
            tokenizer=ocp.args.JsonSave(tokenizer_files),
        ))
        manager.wait_until_finished()


def open_initial(config: Config) -> LazyModel | None:
    """The workdir or checkpoint that `config.init.checkpoint` names, or None. Raises InputError if it is none."""
    return open_model(config.init.checkpoint) if config.init.checkpoint else None


def check_initial(source: LazyModel, config: Config, tokenizer: Tokenizer) -> None:
    """Checks that a run may start from the params of `source`, which is `config.init.checkpoint`.

    Raises:
      InputError: its architecture or its tokenizer is another, or its weights are Int8.
    """
    key = f"config.init.checkpoint = {config.init.checkpoint}"
    if source.quantized:
        raise InputError(f"{key}: its weights have eight bits; start from what it was made of")
    ours, other = (config_lib.architecture(c.model) for c in (config, source.config))
    if ours != other:
        differences = "; ".join(config_lib.differences(other, ours, "model."))
        raise InputError(f"{key}: another architecture: {differences}")
    if source.tokenizer.fingerprint != tokenizer.fingerprint:
        raise InputError(f"{key}: it was trained with another tokenizer (fingerprint {source.tokenizer.fingerprint}, "
                         f"the corpus has {tokenizer.fingerprint})")


def param_shardings(config: ModelConfig, mesh: Mesh | None, quantized: bool = False) -> Any:
    """Where each param goes: by the rules on the mesh, or on the first device.

    Raises:
      ConfigError: the mesh does not divide the model.
    """
    axes = model.param_axes(config)
    axes = quantized_axes(axes) if quantized else axes
    if mesh is None:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda _: here, axes, is_leaf=lambda node: isinstance(node, PartitionSpec))
    check_model_divisible(config, mesh)
    return sharding.param_shardings(mesh, axes)


def absolute_path(path: epath.Path) -> epath.Path:
    """Orbax asks for absolute paths; `gs://…` is one, which `Path.absolute` does not know."""
    return path if path.is_absolute() else path.absolute()


def _read_json(directory: epath.Path, item: str) -> Any:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        return checkpointer.restore(directory / item)


def encode_files(files: dict[str, bytes]) -> dict[str, str]:
    """Files as JSON can hold them."""
    return {name: base64.b64encode(content).decode("ascii") for name, content in files.items()}


def _decode_files(files: dict[str, str]) -> dict[str, bytes]:
    return {name: base64.b64decode(content) for name, content in files.items()}
