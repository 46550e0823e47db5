"""Checkpoints: whole (design, law 6), asynchronous, restorable on any mesh.

A checkpoint `WORKDIR/checkpoints/STEP/` holds `params`, `optimizer` (with the step), `meta` (format version, config,
corpus) and `tokenizer` (its files): decoding needs nothing else and reads the params only. Runs that average their
params (config.optimizer.ema_decay) also have `ema`: whoever loads a model for use (decoding, scoring, the start of
another run) gets the average where there is one; only resuming reads both.
"""

import base64
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers

from illada_jax import config as config_lib
from illada_jax import model
from illada_jax.config import Config
from illada_jax.data.tokenizer import Tokenizer, tokenizer_from_files
from illada_jax.errors import InputError
from illada_jax.parallel import sharding
from illada_jax.training.step import TrainState, fresh_average

FORMAT_VERSION = 1
BEST_METRIC = "eval/bits_per_byte"


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


class Checkpoints:
    """The checkpoints of one workdir. Use as a context manager: leaving it waits for the last save."""

    def __init__(self, workdir: epath.Path, config: Config, tokenizer: Tokenizer, corpus_fingerprint: str):
        """Opens (and makes) `workdir/checkpoints`.

        Args:
          workdir: the working directory, local or remote.
          config: the resolved config, saved with every checkpoint.
          tokenizer: saved with every checkpoint.
          corpus_fingerprint: identifies the training text; a resumed run must have the same.
        """
        keep: list[Any] = [checkpoint_managers.LatestN(config.checkpoint.keep)]
        if config.checkpoint.keep_best:
            keep.append(checkpoint_managers.BestN(
                get_metric_fn=lambda metrics: metrics[BEST_METRIC], reverse=True, n=1,
                keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep), cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(_absolute(workdir) / "checkpoints", options=options)
        self._config = config
        self._meta = {
            "format_version": FORMAT_VERSION,
            "config": config_lib.to_dict(config),
            "corpus_fingerprint": corpus_fingerprint,
        }
        self._tokenizer_files = _encode_files(tokenizer.files())

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, metrics: dict[str, float]) -> None:
        """Starts to save `state` in the background. `metrics` may hold BEST_METRIC, by which the best is kept."""
        known = {BEST_METRIC: float(metrics[BEST_METRIC])} if BEST_METRIC in metrics else None
        average = {} if state.ema is None else {"ema": ocp.args.StandardSave(state.ema)}
        self._manager.save(step, metrics=known, args=ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            optimizer=ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
            meta=ocp.args.JsonSave(self._meta),
            tokenizer=ocp.args.JsonSave(self._tokenizer_files),
            **average,
        ))

    def restore(self, abstract: TrainState) -> TrainState:
        """Restores the newest checkpoint onto the shardings of `abstract`.

        An average that `abstract` asks for and the checkpoint lacks starts at its params.

        Raises:
          InputError: the workdir was trained on another corpus.
        """
        step = self.latest_step
        has_average = abstract.ema is not None and (self._manager.directory / str(step) / "ema").is_dir()
        average = {"ema": ocp.args.StandardRestore(abstract.ema)} if has_average else {}
        restored = self._manager.restore(step, args=ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params),
            optimizer=ocp.args.StandardRestore({"step": abstract.step, "opt_state": abstract.opt_state}),
            meta=ocp.args.JsonRestore(),
            **average,
        ))
        if restored.meta["corpus_fingerprint"] != self._meta["corpus_fingerprint"]:
            raise InputError(
                f"{self._manager.directory}: this run was trained on another corpus or tokenizer (fingerprint "
                f"{restored.meta['corpus_fingerprint']}, now {self._meta['corpus_fingerprint']}); use another workdir")
        ema = restored.ema if has_average else fresh_average(self._config, restored.params)
        return TrainState(restored.optimizer["step"], restored.params, restored.optimizer["opt_state"], ema)


def load_inference(path: str | epath.Path, dtype: str | None = None, mesh: Mesh | None = None) -> Loaded:
    """Loads params, config and tokenizer of a workdir (its newest checkpoint) or of one checkpoint; no optimizer.

    The params are the moving average where the run has kept one.

    Args:
      path: the workdir or `WORKDIR/checkpoints/STEP`.
      dtype: type of params and compute, `float32` or `bfloat16`; None keeps float32 params and the config's compute.
      mesh: where the params go; None puts them on the first device.

    Raises:
      InputError: there is no checkpoint, or it has another format version.
    """
    directory, config, step = _open(epath.Path(path))
    if dtype is not None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    params = _restore_params(directory, config, jnp.dtype(dtype or "float32"), mesh)
    tokenizer = tokenizer_from_files(_decode_files(_read_json(directory, "tokenizer")))
    return Loaded(config, params, tokenizer, step)


def check_initial(path: str, config: Config, tokenizer: Tokenizer) -> None:
    """Checks that a run may start from the params of `path` (`config.init.checkpoint`).

    Raises:
      InputError: it is no checkpoint, or its architecture or its tokenizer is another.
    """
    _, theirs, _ = _open(epath.Path(path))
    ours, other = (config_lib.architecture(c.model) for c in (config, theirs))
    if ours != other:
        differences = "; ".join(config_lib.differences(other, ours, "model."))
        raise InputError(f"config.init.checkpoint = {path}: another architecture: {differences}")
    their_tokenizer = checkpoint_tokenizer(path)
    if their_tokenizer.fingerprint != tokenizer.fingerprint:
        raise InputError(f"config.init.checkpoint = {path}: it was trained with another tokenizer (fingerprint "
                         f"{their_tokenizer.fingerprint}, the corpus has {tokenizer.fingerprint})")


def checkpoint_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a workdir or checkpoint. Raises InputError if it is none."""
    directory, _, _ = _open(epath.Path(path))
    return tokenizer_from_files(_decode_files(_read_json(directory, "tokenizer")))


def initial_params(path: str, mesh: Mesh) -> Any:
    """Params of another run to start from (its average if it has one), float32, on `mesh`; see `check_initial`."""
    directory, theirs, _ = _open(epath.Path(path))
    return _restore_params(directory, theirs, jnp.dtype("float32"), mesh)


def _absolute(path: epath.Path) -> epath.Path:
    """Orbax asks for absolute paths; `gs://…` is one, which `Path.absolute` does not know."""
    return path if path.is_absolute() else path.absolute()


def _open(path: epath.Path) -> tuple[epath.Path, Config, int]:
    """Finds the newest whole checkpoint at or below `path`: its (absolute) directory, config and step."""
    path = _absolute(path)
    if (path / "checkpoints").is_dir():
        steps = ocp.utils.checkpoint_steps(path / "checkpoints")
        if not steps:
            raise InputError(f"{path}: no checkpoint has been saved yet")
        path = path / "checkpoints" / str(max(steps))
    if not (path / "params").is_dir() or not (path / "meta").is_dir():
        raise InputError(f"{path}: not a checkpoint: expected a workdir or WORKDIR/checkpoints/STEP")
    meta = _read_json(path, "meta")
    if meta["format_version"] != FORMAT_VERSION:
        raise InputError(f"{path}: format version {meta['format_version']}; this code reads {FORMAT_VERSION}")
    return path, config_lib.from_saved(meta["config"]), int(path.name)


def _restore_params(directory: epath.Path, config: Config, dtype: jnp.dtype, mesh: Mesh | None) -> Any:
    shapes = jax.eval_shape(lambda: model.init_params(config.model, jax.random.key(0)))
    if mesh is None:
        shardings = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes)
    else:
        shardings = sharding.param_shardings(mesh, model.param_axes(config.model))
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s), shapes, shardings)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(directory / ("ema" if (directory / "ema").is_dir() else "params"), target)


def _read_json(directory: epath.Path, item: str) -> Any:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        return checkpointer.restore(directory / item)


def _encode_files(files: dict[str, bytes]) -> dict[str, str]:
    return {name: base64.b64encode(content).decode("ascii") for name, content in files.items()}


def _decode_files(files: dict[str, str]) -> dict[str, bytes]:
    return {name: base64.b64decode(content) for name, content in files.items()}
