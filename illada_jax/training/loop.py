"""The training loop: the same for pre-training and fine-tuning, for one device and for a pod."""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from illada_jax import config as config_lib
from illada_jax.config import Config
from illada_jax.data.batch import Batch
from illada_jax.data.batches import Batches
from illada_jax.data.tokenizers.tokenizer import Tokenizer
from illada_jax.errors import InputError
from illada_jax.parallel import hosts, sharding
from illada_jax.parallel.mesh import check_divisible, local_rows, use_mesh
from illada_jax.training.checkpoints import Checkpoints
from illada_jax.training.clock import Clock, earlier_seconds, watchdog
from illada_jax.training.faults import FaultCounts, FaultWatch, RollBack
from illada_jax.training.lock import only_trainer
from illada_jax.training.metrics import MetricWriter, curve_over_p, read_lines, sums_of_curve
from illada_jax.training.optimizer import make_optimizer, make_schedule
from illada_jax.training.plateau import PlateauWatch, advice
from illada_jax.training.profiler import Profiler
from illada_jax.training.saved_model import LazyModel, check_initial, open_initial
from illada_jax.training.step import (
    StepMetrics,
    TrainState,
    abstract_state,
    fresh_average,
    init_state,
    is_finite,
    make_train_step,
    skip_steps,
)

# Evaluators see params and step and return numbers and texts by name.
Evaluator = Callable[[Any, int], dict[str, float | str]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      state: the last state.
      step: steps taken.
      status: `finished` (all steps), `stopped` (train.stop_step) or `preempted` (SIGTERM or SIGINT; saved).
      final: what the evaluators returned at the last step.
    """

    state: TrainState
    step: int
    status: Literal["finished", "stopped", "preempted"]
    final: dict[str, float | str]


def prepare_workdir(workdir: epath.Path, config: Config, tokenizer: Tokenizer) -> Config | None:
    """Makes the workdir, or recognises the one of an earlier life of this run. One process does it.

    Returns:
      The config that the workdir was made with, None for a new one.

    Raises:
      InputError: the workdir cannot be written, or holds something else.
    """
    path = workdir / "config.json"
    if path.exists():
        try:
            return config_lib.from_saved(json.loads(path.read_text()))
        except (ValueError, AttributeError) as error:
            raise InputError(f"{path}: not a config of a run: {error}") from error
    try:
        # What a process that was killed here, before there was a config, may have left is written anew.
        if workdir.exists() and {path.name for path in workdir.iterdir()} - {"tokenizer", "config.json.partial"}:
            raise InputError(f"{workdir}: neither empty nor a workdir (no config.json in it)")
        workdir.mkdir(parents=True, exist_ok=True)
        tokenizer.save(workdir / "tokenizer")
        write_config(workdir, config)
    except OSError as error:
        raise InputError(f"{workdir}: the workdir cannot be written: {error.strerror or error}") from error
    return None


def write_config(workdir: epath.Path, config: Config) -> None:
    """Writes `workdir/config.json`: last, whole or not at all, as it is what makes a directory a workdir."""
    partial = workdir / "config.json.partial"
    partial.write_text(json.dumps(config_lib.to_dict(config), indent=2) + "\n")
    partial.replace(workdir / "config.json")


def train(
    config: Config,
    workdir: epath.Path,
    mesh: Mesh,
    pipeline: Batches,
    tokenizer: Tokenizer,
    evaluators: dict[str, Evaluator],
    allowed_changes: tuple[str, ...] = (),
    profiler: Profiler | None = None,
    initial: LazyModel | None = None,
) -> Outcome:
    """Trains to the end, to train.stop_step, or until told to stop; resumes where the workdir has a checkpoint.

    Args:
      config: the resolved config (vocabulary and mask id known).
      workdir: where config, metrics, checkpoints and tokenizer live.
      mesh: the devices.
      pipeline: gives the batch of every step.
      tokenizer: saved with the checkpoints.
      evaluators: run every config.eval.every steps and at the end, in order.
      allowed_changes: config keys that may differ from those of the workdir when it is resumed.
      profiler: records some of the steps.
      initial: what config.init.checkpoint names; None opens the workdir of that name.

    Raises:
      InputError: config, workdir, corpus or mesh do not fit together.
    """
    check_divisible(config, mesh)
    initial = initial or open_initial(config)
    if initial is not None:
        check_initial(initial, config, tokenizer)
    hosts.check_same("the config or the corpus", [config_lib.to_dict(config), pipeline.fingerprint])
    earlier = hosts.broadcast_from_primary(lambda: _dict_or_none(prepare_workdir(workdir, config, tokenizer)))
    optimizer = make_optimizer(config)
    with (only_trainer(workdir), use_mesh(mesh),
          Checkpoints(workdir, config, tokenizer, pipeline.fingerprint) as checkpoints):
        start = checkpoints.latest_step or 0
        if earlier is not None:
            config_lib.check_resumable(config_lib.from_dict(earlier), config, start, allowed_changes)
        abstract = abstract_state(config, optimizer, mesh)

        def first_state() -> TrainState:
            shardings = jax.tree.map(lambda x: x.sharding, abstract)
            state = jax.jit(lambda: init_state(config, optimizer), out_shardings=shardings)()
            if initial is None:
                return state
            params = initial.restore(jnp.dtype("float32"), mesh)
            return dataclasses.replace(state, params=params, ema=fresh_average(config, params))

        def state_before(step: int) -> TrainState:
            if checkpoints.scheduled_before(step) is None:
                return first_state()
            return checkpoints.restore(abstract, before=step)[0]

        if start:
            state, counts = checkpoints.restore(abstract)
            start = int(state.step)  # of an earlier checkpoint where the newest is damaged
        else:
            state, counts = first_state(), FaultCounts()
        if earlier is not None:
            hosts.broadcast_from_primary(lambda: write_config(workdir, config))  # now that nothing has been refused
        lines = read_lines(workdir) if start else []
        clock = Clock(earlier_seconds(lines, start))
        with (MetricWriter(workdir, start, config.train.tensorboard) as writer, _stop_signals() as told_to_stop,
              watchdog(clock, config.train.watchdog_seconds)):
            loop = _Loop(config, mesh, pipeline, checkpoints, writer, evaluators, clock,
                         profiler or Profiler(workdir, range(0)), FaultWatch(config, workdir, pipeline, counts),
                         state_before)
            loop.remember([line for line in lines if start - config.train.plateau_window < line["step"] <= start])
            return loop.run(state, start, told_to_stop)


def _dict_or_none(config: Config | None) -> dict[str, Any] | None:
    return None if config is None else config_lib.to_dict(config)


class _Loop:
    """The state of `train` between steps: what has been dispatched, logged, evaluated and saved."""

    def __init__(self, config: Config, mesh: Mesh, pipeline: Batches, checkpoints: Checkpoints, writer: MetricWriter,
                 evaluators: dict[str, Evaluator], clock: Clock, profiler: Profiler, faults: FaultWatch,
                 state_before: Callable[[int], TrainState]):
        self._config = config
        self._mesh = mesh
        self._pipeline = pipeline
        self._faults = faults
        self._state_before = state_before
        self._checkpoints = checkpoints
        self._writer = writer
        self._evaluators = evaluators
        self._clock = clock
        self._profiler = profiler
        self._plateau = PlateauWatch.of(config)
        self._told = False
        self._log_started = time.perf_counter()
        self._unlogged_tokens = 0
        self._set_rate(faults.counts.rate)

    def _set_rate(self, rate: float) -> None:
        """Makes the step and the schedule of the learning rate times `rate`."""
        self._step_fn = make_train_step(self._config, make_optimizer(self._config, rate), self._mesh)
        self._schedule = make_schedule(self._config, self._config.optimizer.learning_rate * rate)

    def remember(self, lines: list[dict[str, Any]]) -> None:
        """Takes in the lines of metrics that an earlier life of the run has written."""
        for line in lines:
            if "train/loss" in line:
                self._plateau.add(line["step"], *sums_of_curve(line))

    def run(self, state: TrainState, start: int, told_to_stop: Callable[[int], bool]) -> Outcome:
        """Trains from step `start` on, see `train`."""
        saved = start
        while True:
            try:
                return self._run(state, start, saved, told_to_stop)
            except RollBack as fault:
                bad = fault.step
            # Behind the handler: the exception holds on to the state that is given up.
            state = None
            start = bad + 1
            state, saved = self._roll_back(bad)

    def _roll_back(self, bad: int) -> tuple[TrainState, int]:
        """(A state for the step after a bad one, with the numbers of an earlier checkpoint; the step of that)."""
        step = bad + 1
        self._clock.enter("checkpoint", step)
        # Of the checkpoint before, with which at least one step was good: with a younger one none was.
        state = self._state_before(bad)
        saved = int(state.step)
        self._set_rate(self._faults.counts.rate)
        self._writer.write(step, self._faults.counts.metrics())
        self._log_started, self._unlogged_tokens = time.perf_counter(), 0
        if hosts.is_primary():
            print(f"step {step}: going on with the state of step {saved}, learning rate × "
                  f"{self._faults.counts.rate:g}", file=sys.stderr, flush=True)
        return skip_steps(state, step - saved), saved

    def _run(self, state: TrainState, start: int, saved: int, told_to_stop: Callable[[int], bool]) -> Outcome:
        """From step `start` on, with a state whose numbers have been saved at step `saved`."""
        c = self._config
        stop = c.train.stop_step or c.train.steps
        rows_sharding = sharding.batch_sharding(self._mesh)
        batches = self._pipeline.iterate(start, local_rows(rows_sharding, c.data.batch_size))
        unlogged: list[StepMetrics] = []
        results: dict[str, float | str] = {}
        step = start
        with tqdm(total=c.train.steps, initial=start, unit="step", desc="train",
                  disable=None if hosts.is_primary() else True) as bar:
            while step < stop and not told_to_stop(step):
                self._profiler.before(step, state)
                if step > start:  # what comes before is the start-up, with the compilation of the step
                    self._clock.enter("data", step)
                rows = next(batches)
                if step > start:
                    self._clock.enter("step", step)
                batch = _put(rows, rows_sharding)
                state, metrics = self._step_fn(state, batch)
                self._clock.enter("step", step)
                # Dispatch runs ahead of the device: only now, with the next step under way, is the last one fetched.
                if len(unlogged) == c.train.log_every or (unlogged and step % c.train.log_every == 0):
                    self._log(step, unlogged, bar)
                    unlogged = []
                unlogged.append(metrics)
                self._unlogged_tokens += batch.tokens_BL.size
                step += 1
                bar.update()
                last = step == stop
                if last or step % c.eval.every == 0 or step % c.checkpoint.every == 0:
                    self._log(step, unlogged, bar)
                    unlogged = []
                    results = self._evaluate(step, state, bar) if last or step % c.eval.every == 0 else {}
                    if last or step % c.checkpoint.every == 0:
                        self._save(step, state, results)
                        saved = step
                    self._clock.enter("step", step)
                    self._log_started = time.perf_counter()
        self._profiler.close(state)
        if unlogged:
            self._log(step, unlogged, bar)
        if step > saved:  # told to stop, or there is nothing behind the step that a rollback led to
            results = self._evaluate(step, state, bar) if step == stop else {}
            self._save(step, state, results)
        status = "finished" if step == c.train.steps else "stopped" if step == stop else "preempted"
        return Outcome(state, step, status, results)

    def _save(self, step: int, state: TrainState, results: dict[str, float | str]) -> None:
        self._clock.enter("checkpoint", step)
        self._faults.judge_state(step - 1, bool(is_finite(state)), self._checkpoints.latest_step)
        self._writer.publish()
        self._checkpoints.save(step, state, results, self._faults.counts)

    def _log(self, step: int, unlogged: list[StepMetrics], bar: tqdm) -> None:
        """Fetches and writes the means over the good steps since the last line, which ended with `step`."""
        fetched: list[StepMetrics] = jax.device_get(unlogged)
        self._faults.judge(step - len(fetched), fetched, self._checkpoints.latest_step)
        good = [metrics for metrics in fetched if not metrics.bad]
        now = time.perf_counter()
        metrics = {
            "train/learning_rate": float(self._schedule(step - 1)),
            "train/tokens_per_second": self._unlogged_tokens / (now - self._log_started),
            **{f"data_epochs/{name}": count for name, count in self._pipeline.epochs(step).items()},
            **self._clock.metrics(),
            **self._faults.counts.metrics(),
        }
        self._log_started = now
        self._unlogged_tokens = 0
        if good:
            metrics |= self._means(step, good)
            bar.set_postfix_str(
                f"loss {metrics['train/loss']:.3f}, {metrics['train/tokens_per_second']:,.0f} tokens/s")
        self._writer.write(step, metrics)

    def _means(self, step: int, steps: list[StepMetrics]) -> dict[str, float]:
        """What some steps up to `step` report, as metrics."""
        sums = jax.tree.map(lambda *values: np.sum(values, axis=0, dtype=np.float64), *(m.sums for m in steps))
        metrics = {
            "train/loss": float(sums.loss / max(sums.weight, 1e-30)),
            "train/accuracy": float(sums.correct / max(sums.masked, 1.0)),
            "train/mask_fraction": float(sums.masked / max(sums.maskable, 1.0)),
            "train/gradient_norm": float(np.mean([m.gradient_norm for m in steps])),
            **curve_over_p(sums),
        }
        trend = self._plateau.add(step, sums.masked_K, sums.ce_K)
        if trend is not None:
            metrics |= {f"trend/{name}": value for name, value in trend._asdict().items()}
            if trend.stopped and not self._told and hosts.is_primary():
                tqdm.write(advice(step, trend))
            self._told = trend.stopped
        return metrics

    def _evaluate(self, step: int, state: TrainState, bar: tqdm) -> dict[str, float | str]:
        results: dict[str, float | str] = {}
        self._clock.enter("evaluation", step)
        for name, evaluator in self._evaluators.items():
            bar.set_postfix_str(f"evaluating {name}")
            results |= evaluator(state.eval_params, step)
        if results:
            self._writer.write(step, results)
        for name, value in results.items():
            text = f"{name}:\n{value}" if isinstance(value, str) else f"{name} = {value:.4g}"
            if hosts.is_primary():
                tqdm.write(f"step {step}: {text}")
        return results


def _put(batch: Batch, rows_sharding: jax.sharding.NamedSharding) -> Batch:
    """Makes global arrays of the rows that this process holds."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows_sharding, x), batch)


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[int], bool]]:
    """Turns the first SIGTERM (preemption) or SIGINT (Ctrl-C) into a clean stop; a second one kills as usual.

    Yields:
      A function of the step that says whether to stop before it: on all processes at the same step, whichever of them
      was told. With several, jax.distributed listens for SIGTERM and finds that step.
    """
    received = []
    alone = jax.process_count() == 1

    def note(number: int, _: Any) -> None:
        received.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)
        if not alone:
            os.kill(os.getpid(), signal.SIGTERM)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *([signal.SIGTERM] if alone else []))}
    for number in before:
        signal.signal(number, note)
    try:
        yield lambda step: bool(received) if alone else multihost_utils.reached_preemption_sync_point(step)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
