"""A checkpoint read without its optimizer: onto any mesh, whole or param by param, optionally as int8."""

import base64
import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath, epy
from flax import traverse_util
from jax.sharding import Mesh

from illada_jax import config as config_lib
from illada_jax import model
from illada_jax.config import Config, ModelConfig
from illada_jax.data.tokenizers import Tokenizer, tokenizer_from_files
from illada_jax.errors import InputError, StorageError
from illada_jax.files import is_remote, read_json
from illada_jax.model.int8 import Int8, quantize_matrix, quantize_params, quantized_axes
from illada_jax.parallel import sharding
from illada_jax.parallel.fingerprints import digest, fingerprints, first_difference
from illada_jax.parallel.mesh import check_model_divisible

with epy.lazy_imports():  # half a second, which models of other layouts do not need
    import orbax.checkpoint as ocp

FORMAT_VERSION = 1
_CHUNK_BYTES = 1 << 26  # of converted weights on disk: reading an array of one chunk needs twice its memory


class CorruptCheckpointError(Exception):
    """A checkpoint cannot be read, or its content does not match its checksums."""


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model in memory, as decoding and scoring need it, and the training step: 0 for official weights."""

    config: Config
    params: Any
    tokenizer: Tokenizer
    step: int


class LazyModel(Protocol):
    """A model whose params have not been read yet: a SavedModel, or an HFModel (`interop/hf_model.py`)."""

    config: Config
    tokenizer: Tokenizer
    step: int
    quantized: bool  # its matrices are Int8

    def restore(self, dtype: jnp.dtype, mesh: Mesh | None, quantized: bool = False) -> Any:
        """Returns the params in `dtype`, on the mesh or the first device; with `quantized`, matrices as Int8."""


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """A checkpoint of this package as a LazyModel."""

    directory: epath.Path  # `WORKDIR/checkpoints/STEP`, absolute
    item: str  # of the checkpoint that is its params: `ema`, their moving average, if the run kept one, else `params`
    config: Config
    step: int
    quantized: bool
    family: str  # layout that the weights were imported from (`interop/families.py`); empty if they were trained here
    fingerprints: Mapping[str, str]  # of the params, by path; see `parallel/fingerprints.py`

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer saved in the checkpoint."""
        files = _read_json(self.directory, "tokenizer")
        return tokenizer_from_files({name: base64.b64decode(content) for name, content in files.items()})

    @functools.cached_property
    def dtype(self) -> jnp.dtype:
        """The saved dtype of the params (of those that are not Int8)."""
        return jnp.dtype(ocp.PyTreeCheckpointHandler().metadata(self.directory / self.item).tree["embedding"].dtype)

    def restore(self, dtype: jnp.dtype, mesh: Mesh | None, quantized: bool = False) -> Any:
        """See LazyModel. Raises InputError if the checkpoint is corrupt."""
        with _explain_corruption(self.directory):
            targets = abstract_params(self.config.model, dtype, mesh, quantized or self.quantized)
            params = {path: self._restore_param(path, mesh, target)
                      for path, target in traverse_util.flatten_dict(targets, sep="/").items()}
        return traverse_util.unflatten_dict(params, sep="/")

    def _restore_param(self, path: str, mesh: Mesh | None, target: Any) -> Any:
        # In the saved dtype, which the fingerprint covers; one at a time, as both dtypes of all may not fit in memory.
        saved = self._read(path, mesh, ocp.checkpoint_utils.construct_restore_args)
        found = fingerprints({path: saved})
        different = first_difference(found, {name: self.fingerprints[name] for name in found})
        if different is not None:
            raise CorruptCheckpointError(f"{different} does not match its fingerprint")
        if isinstance(saved, Int8):
            return saved
        if isinstance(target, Int8):
            shardings = jax.tree.map(lambda x: x.sharding, target)
            return jax.jit(functools.partial(quantize_matrix, path), out_shardings=shardings)(saved)
        return saved.astype(target.dtype)

    def read_param(self, path: str) -> np.ndarray:
        """Returns one param by path, not Int8, as saved, in host memory. A jax.Array would hold a second copy."""
        as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
        return self._read(path, None, lambda tree: jax.tree.map(lambda _: as_numpy, tree))

    def _read(self, path: str, mesh: Mesh | None, restore_args: Callable[[Any], Any]) -> Any:
        """One param as saved; `restore_args` are made from its ShapeDtypeStructs."""
        params = abstract_params(self.config.model, self.dtype, mesh, self.quantized)
        tree = traverse_util.unflatten_dict({path: traverse_util.flatten_dict(params, sep="/")[path]}, sep="/")
        # The handler itself: a Checkpointer warns that an item has no metadata of a checkpoint.
        restored = ocp.PyTreeCheckpointHandler().restore(
            self.directory / self.item, args=ocp.args.PyTreeRestore(tree, restore_args(tree), partial_restore=True))
        return traverse_util.flatten_dict(restored, sep="/")[path]


@functools.cache
def abstract_params(config: ModelConfig, dtype: jnp.dtype, mesh: Mesh | None, quantized: bool) -> Any:
    """The params in `dtype` (with `quantized`, matrices as Int8) as ShapeDtypeStructs with their shardings.

    They are sharded over the mesh by the rules, or placed on the first device.

    Raises:
      ConfigError: the mesh does not divide the model.
    """
    def init() -> Any:
        params = jax.tree.map(lambda x: x.astype(dtype), model.init_params(config, jax.random.key(0)))
        return quantize_params(params) if quantized else params

    params = jax.eval_shape(init)
    if mesh is None:
        first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda x: x.update(sharding=first), params)
    check_model_divisible(config, mesh)
    axes = model.param_axes(config)
    shardings = sharding.param_shardings(mesh, quantized_axes(axes) if quantized else axes)
    return jax.tree.map(lambda x, target: x.update(sharding=target), params, shardings)


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
        check_file_types(path)
        meta = _read_json(path, "meta")
        check_checksum(meta, _read_json(path, "tokenizer"))
    if meta["format_version"] != FORMAT_VERSION:
        raise InputError(f"{path}: format version {meta['format_version']}; this version reads {FORMAT_VERSION}")
    item = "ema" if (path / "ema").is_dir() else "params"
    return SavedModel(path, item, config_lib.from_saved(meta["config"]), int(path.name), meta.get("quantized", False),
                      meta.get("family", ""), meta["fingerprints"][item])


def save_model(workdir: epath.PathLike, loaded: LoadedModel, quantized: bool, family: str) -> None:
    """Writes a workdir with one checkpoint, of params only. `quantized` and `family` are those of SavedModel."""
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
    rest = {key: value for key, value in meta.items() if key != "checksum"}
    return digest(json.dumps([rest, tokenizer_files], sort_keys=True))


def check_checksum(meta: dict[str, Any], tokenizer_files: dict[str, str]) -> None:
    """Raises CorruptCheckpointError if `meta` or the tokenizer files do not match the checksum by `with_checksum`."""
    if meta.get("checksum") != checksum(meta, tokenizer_files):
        raise CorruptCheckpointError("meta or tokenizer does not match the checksum")


def check_file_types(directory: epath.Path) -> None:
    """Raises CorruptCheckpointError if a local checkpoint holds a FIFO or a device: reading one would never end."""
    for path in () if is_remote(directory) else pathlib.Path(directory).rglob("*"):
        if not path.is_file() and not path.is_dir():
            raise CorruptCheckpointError(f"{path.relative_to(directory)} is not a regular file")


@contextlib.contextmanager
def translate_read_errors() -> Iterator[None]:
    """Turns Orbax's errors about missing, truncated or undecodable files into CorruptCheckpointError.

    Some are bare Exceptions, so all exceptions are caught; errors of the devices pass through. What this user may not
    read is a StorageError: it may be whole.
    """
    try:
        yield
    except (CorruptCheckpointError, InputError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        if "ermission denied" in reason:  # of the system, also as TensorStore quotes it
            raise StorageError(f"cannot be read: {reason[-200:]}") from error
        raise CorruptCheckpointError(reason[:200]) from error


@contextlib.contextmanager
def _explain_corruption(directory: epath.Path) -> Iterator[None]:
    """Turns a CorruptCheckpointError into an InputError that names the other checkpoints of the workdir."""
    try:
        with translate_read_errors():
            yield
    except CorruptCheckpointError as error:
        steps = sorted(step for step in ocp.utils.checkpoint_steps(directory.parent) if str(step) != directory.name)
        others = ", ".join(str(directory.parent / str(step)) for step in steps)
        advice = f"other checkpoints: {others}" if others else "there is no other checkpoint in its workdir"
        raise InputError(f"{directory}: corrupt: {error}; {advice}") from error


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
        raise InputError(f"{key}: its weights are int8; start from the model they were quantised from")
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
    try:
        return read_json(directory / item / "metadata")  # as Orbax's JsonSave names it
    except InputError as error:
        raise CorruptCheckpointError(str(error)) from error
