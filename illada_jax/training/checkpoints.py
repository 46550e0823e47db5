"""Checkpoints: self-contained, asynchronous, restorable on any mesh.

A checkpoint `WORKDIR/checkpoints/STEP/` holds `params`, `optimizer` (with the step), `meta` (format version, config,
corpus) and `tokenizer` (its files): decoding needs nothing else and reads the params only. Runs that average their
params (config.optimizer.ema_decay) also save `ema`. Decoding, scoring and runs that start from the checkpoint load the
average if there is one; only resuming reads both.
"""

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from illada_jax import config as config_lib
from illada_jax import console
from illada_jax.config import Config
from illada_jax.data.tokenizers import Tokenizer
from illada_jax.errors import EXIT_BAD_INPUT, InputError, StorageError
from illada_jax.parallel import hosts
from illada_jax.parallel.fingerprints import fingerprints, first_difference
from illada_jax.training.faults import FaultCounts
from illada_jax.training.memory import return_free_memory
from illada_jax.training.saved_model import (
    FORMAT_VERSION,
    CorruptCheckpointError,
    absolute_path,
    check_checksum,
    check_file_types,
    encode_files,
    translate_read_errors,
    with_checksum,
)
from illada_jax.training.step import TrainState, fresh_average

BEST_METRIC = "eval/bits_per_byte"
# Orbax calls this several times per save, for a message about throughput, and each call leaks a list per metric
# (TensorStore 0.1.86).
tensorstore.experimental_collect_matching_metrics = lambda *_, **__: []
_SAVE_THREADS = ("async_save", "save_finalize")  # of Orbax
_REASON_LENGTH = 200  # characters of a library's message, from its end, which holds the cause


def _is_not_a_repetition(record: logging.LogRecord) -> bool:
    """False for Orbax's messages about failed writes: hundreds of lines about an error that it also raises.

    With several processes it raises the error only when it has waited for the others, which wait for this process. So
    this process then ends at once, and JAX aborts the others.
    """
    error = record.exc_info[1] if record.exc_info else None
    if jax.process_count() > 1 and record.threadName in _SAVE_THREADS and isinstance(error, OSError | ValueError):
        console.print_error(f"error: process {jax.process_index()}: cannot write a checkpoint: {_reason(error)}. Fix "
                            "the cause and repeat the command to resume")
        console.hard_exit(EXIT_BAD_INPUT)
    return record.levelno < logging.ERROR or not (
        "orbax" in record.pathname or record.getMessage().startswith("Future exception was never retrieved"))


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return getattr(error, "strerror", None) or (text if len(text) <= _REASON_LENGTH else f"…{text[-_REASON_LENGTH:]}")


def _items(state: TrainState) -> dict[str, Any]:
    items = {"params": state.params, "optimizer": {"step": state.step, "opt_state": state.opt_state}}
    return items if state.ema is None else {**items, "ema": state.ema}


class Checkpoints:
    """Checkpoints of one workdir. A context manager, which waits for the last save when it is left."""

    def __init__(self, workdir: epath.Path, config: Config, tokenizer: Tokenizer, corpus_fingerprint: str):
        """Opens `workdir/checkpoints`, local or remote, and creates it if needed.

        The resolved config and the tokenizer are saved with every checkpoint, and so is `corpus_fingerprint`, which
        identifies the training text: a resumed run must have the same.
        """
        keep: list[Any] = [checkpoint_managers.LatestN(config.checkpoint.keep)]
        if config.checkpoint.keep_best:
            keep.append(checkpoint_managers.BestN(
                get_metric_fn=lambda metrics: metrics[BEST_METRIC], reverse=True, n=1,
                keep_checkpoints_without_metrics=False))
        if config.faults.action == "rollback":  # checkpoints saved on preemption must not displace those
            keep.append(checkpoint_managers.EveryNSteps(interval_steps=config.checkpoint.every, max_to_keep=2))
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_is_not_a_repetition)
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
        common = kind is None or (issubclass(kind, InputError) and not issubclass(kind, StorageError))
        if jax.process_count() > 1 and not common:
            return  # waiting for a save could mean waiting for processes that are dead or know of no error
        try:
            self.wait()
            with self._writing():
                self._manager.close()
        except StorageError as error:
            if kind is None:
                raise
            if not issubclass(kind, StorageError):  # else the user has seen it
                console.print_error(f"warning: {error}")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns Orbax's errors about a checkpoint that cannot be written, this or the previous one, into StorageError.

        They are OSErrors and ValueErrors that quote the operating system. Errors of the devices pass.
        """
        try:
            yield
        except (OSError, ValueError) as error:
            complete = self._steps_on_disk()
            newest = f"the newest complete one is from step {max(complete)}" if complete else "there is no complete one"
            raise StorageError(f"{self._manager.directory}: cannot write a checkpoint: {_reason(error)}; {newest}. "
                               "Fix the cause and repeat the command to resume") from error

    def _steps_on_disk(self) -> list[int]:
        directory = self._manager.directory
        return ocp.utils.checkpoint_steps(directory) if directory.exists() else []

    def wait(self) -> None:
        """Waits for the save in progress. Raises StorageError if it failed."""
        with self._writing():
            self._manager.wait_until_finished()

    def problems(self) -> list[str]:
        """Waits for the save in progress; describes its failure, and checkpoints that others have removed.

        After a failure the next save may succeed. With several processes, which wait for each other during a save, a
        failure is a StorageError.
        """
        found = []
        try:
            self.wait()
            return_free_memory()
        except StorageError as error:
            if jax.process_count() > 1:
                raise
            found.append(f"a checkpoint could not be written ({_reason(error.__cause__)})")
        complete = self._steps_on_disk()
        gone = [f"checkpoints/{step}" for step in self._manager.all_steps() if step not in complete]
        if gone:
            found.append(f"{', '.join(gone)} disappeared")
        self._manager.directory.mkdir(parents=True, exist_ok=True)
        if found:
            self._manager.reload()
        return found

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def _scheduled_before(self, step: int) -> int | None:
        every = self._config.checkpoint.every
        return max((s for s in self._manager.all_steps() if s < step and s % every == 0), default=None)

    def save(self, step: int, state: TrainState, metrics: dict[str, float], faults: FaultCounts) -> None:
        """Starts to save `state` in the background. `metrics` may hold BEST_METRIC, by which the best is kept.

        Raises:
          StorageError: this checkpoint or the previous one cannot be written.
        """
        known = {BEST_METRIC: float(metrics[BEST_METRIC])} if BEST_METRIC in metrics else None
        items = _items(state)
        meta = with_checksum({**self._meta, "faults": faults._asdict()}, self._tokenizer_files, **items)
        with self._writing():
            self._manager.save(step, metrics=known, args=ocp.args.Composite(
                meta=ocp.args.JsonSave(meta),
                tokenizer=ocp.args.JsonSave(self._tokenizer_files),
                **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
            ))

    def restore(self, abstract: TrainState, before: int | None = None) -> tuple[TrainState, FaultCounts] | None:
        """Restores the newest complete checkpoint onto the shardings of `abstract`; None if there is none.

        With `before`, restores the newest checkpoint before that step that the schedule (checkpoint.every) wrote. A
        corrupt checkpoint is reported on stderr and moved to `WORKDIR/corrupt`, and the previous one is tried. A
        moving average that `abstract` has and the checkpoint lacks starts at its params.

        Raises:
          InputError: the workdir was trained on another corpus, or all of its checkpoints are corrupt.
        """
        corrupt = []
        self.wait()
        while (step := self.latest_step if before is None else self._scheduled_before(before)) is not None:
            restored, problem = None, None
            try:
                restored = self._restore(step, abstract)
            except CorruptCheckpointError as error:
                problem = str(error)
            problems = [each for each in hosts.gather(problem) if each]  # each process reads its own part
            if not problems:
                return restored
            moved_to = self._set_aside(step)
            corrupt.append(str(moved_to))
            console.print_error(f"warning: {self._manager.directory / str(step)}: corrupt: {problems[0]}; moved to "
                                f"{moved_to}")
        if not corrupt:
            return None
        raise InputError(f"{self._manager.directory}: all checkpoints are corrupt and were moved to "
                         f"{', '.join(corrupt)}; use another --workdir to start from the beginning")

    def _restore(self, step: int, abstract: TrainState) -> tuple[TrainState, FaultCounts]:
        has_average = abstract.ema is not None and (self._manager.directory / str(step) / "ema").is_dir()
        items = _items(abstract if has_average else dataclasses.replace(abstract, ema=None))
        with translate_read_errors():
            check_file_types(self._manager.directory / str(step))
            restored = self._manager.restore(step, args=ocp.args.Composite(
                meta=ocp.args.JsonRestore(), tokenizer=ocp.args.JsonRestore(),
                **{name: ocp.args.StandardRestore(tree) for name, tree in items.items()},
            ))
            check_checksum(restored.meta, restored.tokenizer)
        for name in items:
            recorded = restored.meta.get("fingerprints", {}).get(name)
            different = first_difference(fingerprints(restored[name]), recorded) if recorded else None
            if different is not None:
                raise CorruptCheckpointError(f"{name}/{different} does not match its fingerprint")
        if restored.meta["corpus_fingerprint"] != self._meta["corpus_fingerprint"]:
            raise InputError(
                f"{self._manager.directory}: this run was trained on another corpus or tokenizer (fingerprint "
                f"{restored.meta['corpus_fingerprint']}, now {self._meta['corpus_fingerprint']}); use another workdir")
        ema = restored.ema if has_average else fresh_average(self._config, restored.params)
        state = TrainState(restored.optimizer["step"], restored.params, restored.optimizer["opt_state"], ema)
        return state, FaultCounts(**restored.meta.get("faults", {}))

    def _set_aside(self, step: int) -> epath.Path:
        """Moves a checkpoint to `WORKDIR/corrupt`; nothing is deleted."""
        directory = self._manager.directory.parent / "corrupt"
        target = next(path for number in itertools.count() if not (path := directory / f"{step}.{number}").exists())
        if hosts.is_primary():
            directory.mkdir(exist_ok=True)
            (self._manager.directory / str(step)).rename(target)
        multihost_utils.sync_global_devices(f"set aside {step}")
        self._manager.reload()
        return target
