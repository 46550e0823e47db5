"""Checkpoints: whole (design, law 6), asynchronous, restorable on any mesh.

A checkpoint `WORKDIR/checkpoints/STEP/` holds `params`, `optimizer` (with the step), `meta` (format version, config,
corpus) and `tokenizer` (its files): decoding needs nothing else and reads the params only. Runs that average their
params (config.optimizer.ema_decay) also have `ema`: whoever loads a model for use (decoding, scoring, the start of
another run) gets the average where there is one; only resuming reads both.
"""

import contextlib
import itertools
import logging
import sys
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from illada_jax import config as config_lib
from illada_jax.config import Config
from illada_jax.data.tokenizers.tokenizer import Tokenizer
from illada_jax.errors import InputError, StorageError
from illada_jax.parallel.fingerprints import fingerprints, first_difference
from illada_jax.training.faults import FaultCounts
from illada_jax.training.saved_model import (
    FORMAT_VERSION,
    CorruptCheckpointError,
    absolute_path,
    check_checksum,
    encode_files,
    reading,
    with_checksum,
)
from illada_jax.training.step import TrainState, fresh_average

BEST_METRIC = "eval/bits_per_byte"
_REASON_LENGTH = 200  # characters of what a library says, from the end: there stands the cause


def _is_news(record: logging.LogRecord) -> bool:
    """False for a failed write of Orbax: it logs hundreds of lines about what it then raises too."""
    return record.levelno < logging.ERROR or not (
        "orbax" in record.pathname or record.getMessage().startswith("Future exception was never retrieved"))


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
        if config.faults.action == "rollback":  # whatever a preemption saves must not push out where rollbacks lead
            keep.append(checkpoint_managers.EveryNSteps(interval_steps=config.checkpoint.every, max_to_keep=2))
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_is_news)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep), cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(absolute_path(workdir) / "checkpoints", options=options)
        self._config = config
        self._meta = {
            "format_version": FORMAT_VERSION,
            "config": config_lib.to_dict(config),
            "corpus_fingerprint": corpus_fingerprint,
        }
        self._tokenizer_files = encode_files(tokenizer.files())

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if jax.process_count() > 1 and kind is not None and issubclass(kind, jax.errors.JaxRuntimeError):
            return  # a last save would wait for processes that died
        try:
            with self._writing():
                self._manager.wait_until_finished()
                self._manager.close()
        except StorageError as error:
            if kind is None:
                raise
            if not issubclass(kind, StorageError):  # else it has been said
                print(f"warning: {error}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns what Orbax raises when a checkpoint, or the one before it, cannot be written into StorageError.

        Those are OSErrors and ValueErrors that quote the operating system; what the devices raise is let through.
        """
        try:
            yield
        except (OSError, ValueError) as error:
            text = " ".join(str(error).split())
            text = text if len(text) <= _REASON_LENGTH else f"…{text[-_REASON_LENGTH:]}"
            reason = (isinstance(error, OSError) and error.strerror) or text
            whole = ocp.utils.checkpoint_steps(self._manager.directory)
            newest = f"the newest whole one is that of step {max(whole)}" if whole else "there is no whole one"
            raise StorageError(f"{self._manager.directory}: a checkpoint cannot be written: {reason}; {newest}. When "
                               "that is mended, type the same command again") from error

    @property
    def latest_step(self) -> int | None:
        """The newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def scheduled_before(self, step: int) -> int | None:
        """The newest checkpoint before a step of those every config.checkpoint.every steps, or None."""
        every = self._config.checkpoint.every
        return max((s for s in self._manager.all_steps() if s < step and s % every == 0), default=None)

    def save(self, step: int, state: TrainState, metrics: dict[str, float], faults: FaultCounts) -> None:
        """Starts to save `state` in the background. `metrics` may hold BEST_METRIC, by which the best is kept.

        Raises:
          StorageError: this checkpoint or the one before cannot be written.
        """
        known = {BEST_METRIC: float(metrics[BEST_METRIC])} if BEST_METRIC in metrics else None
        items = {"params": state.params, "optimizer": {"step": state.step, "opt_state": state.opt_state}}
        items |= {} if state.ema is None else {"ema": state.ema}
        meta = with_checksum({**self._meta, "faults": faults._asdict()}, self._tokenizer_files, **items)
        with self._writing():
            self._manager.save(step, metrics=known, args=ocp.args.Composite(
                meta=ocp.args.JsonSave(meta),
                tokenizer=ocp.args.JsonSave(self._tokenizer_files),
                **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
            ))

    def restore(self, abstract: TrainState, before: int | None = None) -> tuple[TrainState, FaultCounts]:
        """Restores the newest whole checkpoint, or that of `scheduled_before`, onto the shardings of `abstract`.

        A damaged one is named on stderr and moved to `WORKDIR/damaged`, and the one before it is taken. An average that
        `abstract` asks for and the checkpoint lacks starts at its params.

        Raises:
          InputError: the workdir was trained on another corpus, or all of its checkpoints are damaged.
        """
        damaged = []
        with self._writing():
            self._manager.wait_until_finished()
        while (step := self.latest_step if before is None else self.scheduled_before(before)) is not None:
            try:
                return self._restore(step, abstract)
            except CorruptCheckpointError as error:
                place = self._set_aside(step)
                damaged.append(str(place))
                print(f"warning: {self._manager.directory / str(step)}: damaged: {error}; moved to {place}",
                      file=sys.stderr, flush=True)
        raise InputError(f"{self._manager.directory}: no checkpoint is left: {', '.join(damaged)}; choose another "
                         "--workdir to start anew")

    def _restore(self, step: int, abstract: TrainState) -> tuple[TrainState, FaultCounts]:
        has_average = abstract.ema is not None and (self._manager.directory / str(step) / "ema").is_dir()
        wanted = {"params": abstract.params, "optimizer": {"step": abstract.step, "opt_state": abstract.opt_state}}
        wanted |= {"ema": abstract.ema} if has_average else {}
        with reading():
            restored = self._manager.restore(step, args=ocp.args.Composite(
                meta=ocp.args.JsonRestore(), tokenizer=ocp.args.JsonRestore(),
                **{name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()},
            ))
            check_checksum(restored.meta, restored.tokenizer)
        for name in wanted:
            recorded = restored.meta.get("fingerprints", {}).get(name)
            different = first_difference(fingerprints(restored[name]), recorded) if recorded else None
            if different is not None:
                raise CorruptCheckpointError(f"{name}/{different} is not what was saved")
        if restored.meta["corpus_fingerprint"] != self._meta["corpus_fingerprint"]:
            raise InputError(
                f"{self._manager.directory}: this run was trained on another corpus or tokenizer (fingerprint "
                f"{restored.meta['corpus_fingerprint']}, now {self._meta['corpus_fingerprint']}); use another workdir")
        ema = restored.ema if has_average else fresh_average(self._config, restored.params)
        state = TrainState(restored.optimizer["step"], restored.params, restored.optimizer["opt_state"], ema)
        return state, FaultCounts(**restored.meta.get("faults", {}))

    def _set_aside(self, step: int) -> epath.Path:
        """Moves a checkpoint out of the way; nothing is deleted."""
        places = self._manager.directory.parent / "damaged"
        place = next(path for number in itertools.count() if not (path := places / f"{step}.{number}").exists())
        if jax.process_index() == 0:
            places.mkdir(exist_ok=True)
            (self._manager.directory / str(step)).rename(place)
        multihost_utils.sync_global_devices(f"set aside {step}")
        self._manager.reload()
        return place
