"""A checkpoint read without its optimizer: onto any mesh, whole or param by param, rounded to eight bits or not."""

import base64
import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh, PartitionSpec, Sharding

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
_CHUNK_BYTES = 1 << 26  # of converted weights on disk: reading an array of one chunk needs twice its memory


class CorruptCheckpointError(Exception):
    """A checkpoint cannot be read, or its content differs from what was saved."""


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model in memory, as decoding and scoring need it.

    Attributes:
      config: the config it was trained with.
      params: its params.
      tokenizer: its tokenizer.
      step: the training step; 0 for official weights.
    """

    config: Config
    params: Any
    tokenizer: Tokenizer
    step: int


class LazyModel(Protocol):
    """A model whose params have not been read yet: a SavedModel, or an HFModel (`interop/hf_model.py`).

    Attributes:
      config: the config it was trained with.
      tokenizer: its tokenizer.
      step: the training step.
      quantized: True if its matrices are Int8.
    """

    config: Config
    tokenizer: Tokenizer
    step: int
    quantized: bool

    def restore(self, dtype: jnp.dtype, mesh: Mesh | None, quantized: bool = False) -> Any:
        """Returns the params in `dtype`, on the mesh or the first device; with `quantized`, matrices as Int8."""


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """A checkpoint of this package as a LazyModel. Its params are the moving average if the run kept one.

    Attributes:
      directory: `WORKDIR/checkpoints/STEP`, absolute.
      config: the config it was trained with.
      step: the training step.
      quantized: True if its matrices are Int8.
      family: layout that the weights were imported from (`interop/families.py`); empty if they were trained here.
      fingerprints: of the params, by path; see `parallel/fingerprints.py`.
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

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer saved in the checkpoint."""
        files = _read_json(self.directory, "tokenizer")
        return tokenizer_from_files({name: base64.b64decode(content) for name, content in files.items()})

    @functools.cached_property
    def dtype(self) -> jnp.dtype:
        """The saved dtype of the params (of those that are not Int8)."""
        return jnp.dtype(ocp.PyTreeCheckpointHandler().metadata(self._params).tree["embedding"].dtype)

    def restore(self, dtype: jnp.dtype, mesh: Mesh | None, quantized: bool = False) -> Any:
        """Returns the params in `dtype`, on the mesh or the first device; with `quantized`, matrices as Int8.

        Raises:
          InputError: the checkpoint is corrupt.
        """
        with _explain_corruption(self.directory):
            if self.quantized:
                with ocp.StandardCheckpointer() as checkpointer:
                    params = checkpointer.restore(self._params, self._abstract(mesh))
                self._check(params)
                return jax.tree.map(lambda x: x if _is_int8(x) else x.astype(dtype), params, is_leaf=_is_int8)
            shardings = traverse_util.flatten_dict(model_shardings(self.config.model, mesh, quantized), sep="/")
            return traverse_util.unflatten_dict(
                {path: self._restore_param(path, dtype, mesh, target) for path, target in shardings.items()}, sep="/")

    def _restore_param(self, path: str, dtype: jnp.dtype, mesh: Mesh | None, target: Sharding | Int8) -> Any:
        # In the saved dtype, which the fingerprint covers; one at a time, as both dtypes of all may not fit in memory.
        tree = self._abstract(mesh, path)
        saved = self._read(path, tree, ocp.checkpoint_utils.construct_restore_args(tree))
        self._check({path: saved})
        if isinstance(target, Int8):
            return jax.jit(functools.partial(quantize_matrix, path), out_shardings=target)(saved)
        return saved.astype(dtype)

    def read_param(self, path: str) -> np.ndarray:
        """Returns one param by path, not Int8, as saved, in host memory. A jax.Array would hold a second copy."""
        tree = self._abstract(None, path)
        return self._read(path, tree, jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree))

    def _abstract(self, mesh: Mesh | None, path: str | None = None) -> Any:
        """The tree of params as saved, or of one param, as ShapeDtypeStructs."""
        tree = abstract_params(self.config.model, self.dtype, mesh, self.quantized)
        if path is None:
            return tree
        return traverse_util.unflatten_dict({path: traverse_util.flatten_dict(tree, sep="/")[path]}, sep="/")

    def _read(self, path: str, tree: Any, restore_args: Any) -> Any:
        # The handler itself: a Checkpointer warns that an item has no metadata of a checkpoint.
        restored = ocp.PyTreeCheckpointHandler().restore(
            self._params, args=ocp.args.PyTreeRestore(tree, restore_args, partial_restore=True))
        return traverse_util.flatten_dict(restored, sep="/")[path]

    def _check(self, params: Any) -> None:
        found = fingerprints(params)
        different = first_difference(found, {path: self.fingerprints[path] for path in found})
        if different is not None:
            raise CorruptCheckpointError(f"{different} differs from what was saved")


def _is_int8(node: Any) -> bool:
    return isinstance(node, Int8)


@functools.cache
def abstract_params(config: ModelConfig, dtype: jnp.dtype, mesh: Mesh | None, quantized: bool) -> Any:
    """The params in `dtype` (with `quantized`, matrices as Int8) as ShapeDtypeStructs with their shardings."""
    def init() -> Any:
        params = jax.tree.map(lambda x: x.astype(dtype), model.init_params(config, jax.random.key(0)))
        return quantize_params(params) if quantized else params

    return jax.tree.map(lambda x, target: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=target),
                        jax.eval_shape(init), model_shardings(config, mesh, quantized))


def model_shardings(config: ModelConfig, mesh: Mesh | None, quantized: bool = False) -> Any:
    """The sharding of each param: by the rules on the mesh, or the first device.

    Raises:
      ConfigError: the mesh does not divide the model.
    """
    axes = model.param_axes(config)
    axes = quantized_axes(axes) if quantized else axes
    if mesh is None:
        first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda _: first, axes, is_leaf=lambda node: isinstance(node, PartitionSpec))
    check_model_divisible(config, mesh)
    return sharding.param_shardings(mesh, axes)


def open_saved_model(path: str | epath.Path) -> SavedModel:
    """Opens a workdir (its newest checkpoint) or one checkpoint, `WORKDIR/checkpoints/STEP`.

    Raises:
      InputError: there is no checkpoint, it is corrupt, or its format version is not FORMAT_VERSION.
    """
    path = absolute_path(epath.Path(path))
    if (path / "checkpoints").is_dir():
        steps = ocp.utils.checkpoint_steps(path / "checkpoints")
        if not steps:
            raise InputError(f"{path}: no checkpoint has been saved yet")
        path = path / "checkpoints" / str(max(steps))
    if not (path / "params").is_dir() or not (path / "meta").is_dir():
        hint = ("" if path.exists() else "; `python -m illada_jax.main --config=experiments/quickstart.py` trains one, "
                "`demo` comes with the package")
        raise InputError(f"{path}: not a checkpoint: expected a workdir or WORKDIR/checkpoints/STEP{hint}")
    with _explain_corruption(path):
        meta = _read_json(path, "meta")
        check_checksum(meta, _read_json(path, "tokenizer"))
    if meta["format_version"] != FORMAT_VERSION:
        raise InputError(f"{path}: format version {meta['format_version']}; this version reads {FORMAT_VERSION}")
    item = "ema" if (path / "ema").is_dir() else "params"
    return SavedModel(path, config_lib.from_saved(meta["config"]), int(path.name), meta.get("quantized", False),
                      meta.get("family", ""), meta["fingerprints"][item])


def save_model(workdir: epath.PathLike, loaded: LoadedModel, quantized: bool, family: str) -> None:
    """Writes a workdir with one checkpoint, of params only. For the arguments see SavedModel."""
    workdir = absolute_path(epath.Path(workdir))
    tokenizer_files = encode_files(loaded.tokenizer.files())
    meta = with_checksum({"format_version": FORMAT_VERSION, "config": config_lib.to_dict(loaded.config),
                          "corpus_fingerprint": "", "quantized": quantized, "family": family},
                         tokenizer_files, params=loaded.params)
    loaded.tokenizer.save(workdir / "tokenizer")
    in_chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), loaded.params)
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        manager.save(loaded.step, args=ocp.args.Composite(
            params=ocp.args.StandardSave(loaded.params, in_chunks),
            meta=ocp.args.JsonSave(meta),
            tokenizer=ocp.args.JsonSave(tokenizer_files),
        ))
        manager.wait_until_finished()


def with_checksum(meta: dict[str, Any], tokenizer_files: dict[str, str], **items: Any) -> dict[str, Any]:
    """Returns the `meta` of a checkpoint with fingerprints of its arrays, by item, and a checksum of its texts."""
    meta = {**meta, "fingerprints": {name: fingerprints(tree) for name, tree in items.items()}}
    return {**meta, "checksum": checksum(meta, tokenizer_files)}


def checksum(meta: dict[str, Any], tokenizer_files: dict[str, str]) -> str:
    """The checksum of a checkpoint's `meta` (without the key `checksum`) and its encoded tokenizer files."""
    return digest(json.dumps([meta, tokenizer_files], sort_keys=True))


def check_checksum(meta: dict[str, Any], tokenizer_files: dict[str, str]) -> None:
    """Raises CorruptCheckpointError if `meta` or the tokenizer files differ from what `with_checksum` saw."""
    rest = {key: value for key, value in meta.items() if key != "checksum"}
    if meta.get("checksum") != checksum(rest, tokenizer_files):
        raise CorruptCheckpointError("meta or tokenizer differs from what was saved")


@contextlib.contextmanager
def translate_read_errors() -> Iterator[None]:
    """Turns what Orbax raises for missing, truncated or undecodable files into CorruptCheckpointError.

    Some of it is a bare Exception, so all exceptions are caught; errors of the devices pass through.
    """
    try:
        yield
    except (CorruptCheckpointError, InputError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        raise CorruptCheckpointError(" ".join(str(error).split())[:200]) from error


@contextlib.contextmanager
def _explain_corruption(directory: epath.Path) -> Iterator[None]:
    """Turns corruption into an InputError that names the checkpoint and the others of its workdir."""
    try:
        with translate_read_errors():
            yield
    except CorruptCheckpointError as error:
        steps = sorted(step for step in ocp.utils.checkpoint_steps(directory.parent) if str(step) != directory.name)
        others = ", ".join(str(directory.parent / str(step)) for step in steps)
        advice = f"other checkpoints: {others}" if others else "there is no other checkpoint in its workdir"
        raise InputError(f"{directory}: damaged: {error}; {advice}") from error


def open_initial(config: Config) -> SavedModel | None:
    """Opens the workdir or checkpoint named by config.init.checkpoint; None if it is empty."""
    return open_saved_model(config.init.checkpoint) if config.init.checkpoint else None


def check_initial(initial: LazyModel, config: Config, tokenizer: Tokenizer) -> None:
    """Checks that a run may start from the params of `initial`, the model named by config.init.checkpoint.

    Raises:
      InputError: its architecture or tokenizer differs from the run's, or its weights are Int8.
    """
    key = f"config.init.checkpoint = {config.init.checkpoint}"
    if initial.quantized:
        raise InputError(f"{key}: its weights have eight bits; start from the model they were made from")
    ours, other = (config_lib.architecture(c.model) for c in (config, initial.config))
    if ours != other:
        differences = "; ".join(config_lib.differences(other, ours, "model."))
        raise InputError(f"{key}: another architecture: {differences}")
    if initial.tokenizer.fingerprint != tokenizer.fingerprint:
        raise InputError(f"{key}: trained with another tokenizer (fingerprint {initial.tokenizer.fingerprint}, the "
                         f"corpus has {tokenizer.fingerprint})")


def absolute_path(path: epath.Path) -> epath.Path:
    """An absolute path, as Orbax requires; `gs://…` is absolute already, which `Path.absolute` does not know."""
    return path if path.is_absolute() else path.absolute()


def encode_files(files: dict[str, bytes]) -> dict[str, str]:
    """Files in base64, as JSON can hold them."""
    return {name: base64.b64encode(content).decode("ascii") for name, content in files.items()}


def _read_json(directory: epath.Path, item: str) -> Any:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        return checkpointer.restore(directory / item)
