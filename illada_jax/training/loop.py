"""The training loop: the same for pre-training and fine-tuning, on one device and on a pod."""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from illada_jax import config as config_lib
from illada_jax.config import Config
from illada_jax.data.pipeline import Batches
from illada_jax.data.tokenizers import Tokenizer
from illada_jax.errors import InputError
from illada_jax.files import is_remote
from illada_jax.parallel import hosts, sharding
from illada_jax.parallel.mesh import check_divisible, local_rows, use_mesh
from illada_jax.training.checkpoints import Checkpoints
from illada_jax.training.clock import Clock, earlier_seconds, watchdog
from illada_jax.training.faults import FaultCounts, FaultWatch, RollBack
from illada_jax.training.lock import only_trainer
from illada_jax.training.metrics import MetricWriter, curve_over_p, read_lines, sums_of_curve
from illada_jax.training.optimizer import make_schedule
from illada_jax.training.plateau import PlateauWatch, advice
from illada_jax.training.profiler import Profiler
from illada_jax.training.saved_model import LazyModel, check_initial, open_initial
from illada_jax.training.step import (
    StepMetrics,
    TrainState,
    abstract_state,
    fresh_average,
    is_finite,
    make_init,
    make_train_step,
    skip_steps,
)
from illada_jax.training.stop_signals import stop_signals
from illada_jax.training.workdir import prepare_workdir, restore_missing, resume_workdir

# (params, step) → numbers and texts by name.
Evaluator = Callable[[Any, int], dict[str, float | str]]


@dataclasses.dataclass(frozen=True)
class RunSetup:
    """A run, ready to start."""

    config: Config  # resolved: vocabulary size and mask id are known
    workdir: epath.Path  # for config, metrics, checkpoints and tokenizer
    mesh: Mesh
    batches: Batches  # of every step
    tokenizer: Tokenizer  # saved with the checkpoints
    evaluators: dict[str, Evaluator]  # run every config.eval.every steps and at the end, in order
    allowed_changes: tuple[str, ...] = ()  # config keys that may differ from those of the workdir on resume
    profile_steps: range = range(0)  # steps that the profiler records
    initial: LazyModel | None = None  # the model that config.init.checkpoint names; None opens the workdir of that name


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Result of a run."""

    state: TrainState  # the last
    start: int  # step at which this process began; equal to `step` if nothing was left to do
    step: int  # steps taken
    status: Literal["finished", "stopped", "preempted"]  # all steps, train.stop_step, or SIGTERM or SIGINT; all saved
    final: dict[str, float | str]  # results of the evaluators at the last step


def train(setup: RunSetup) -> Outcome:
    """Trains to the end, to train.stop_step, or until a signal; resumes if the workdir has a checkpoint.

    Raises:
      InputError: config, workdir, corpus or mesh do not fit together.
    """
    config, workdir = setup.config, setup.workdir
    check_divisible(config, setup.mesh)
    initial = setup.initial or open_initial(config)
    if initial is not None:
        check_initial(initial, config, setup.tokenizer)
    hosts.check_same("the config or the corpus", [config_lib.to_dict(config), setup.batches.fingerprint])
    earlier = hosts.broadcast_from_primary(lambda: prepare_workdir(workdir, config, setup.tokenizer))
    with (only_trainer(workdir), use_mesh(setup.mesh),
          Checkpoints(workdir, config, setup.tokenizer, setup.batches.fingerprint) as checkpoints):
        if earlier is not None:
            start = checkpoints.latest_step or 0
            config_lib.check_resumable(config_lib.from_dict(earlier), config, start, setup.allowed_changes)
        abstract = abstract_state(config, setup.mesh)

        def restore(before: int | None = None) -> tuple[TrainState, FaultCounts]:
            """State and fault counts of the newest checkpoint (before a step: the newest scheduled), or a new state."""
            restored = checkpoints.restore(abstract, before)
            return restored or (_new_state(config, setup.mesh, initial), FaultCounts())

        state, counts = restore()
        start = int(state.step)  # of an earlier checkpoint if the newest was corrupt
        stop = config.train.stop_step or config.train.steps
        if start > stop:
            key = "stop_step" if config.train.stop_step else "steps"
            raise InputError(f"config.train.{key} = {stop}: the run in {workdir} is at step {start}; use another "
                             f"workdir, or --config.train.{key}=N with N > {start}")
        if earlier is not None:
            hosts.broadcast_from_primary(lambda: resume_workdir(workdir, config, setup.tokenizer))  # after all checks
        lines = read_lines(workdir) if start else []
        if start == stop:
            return Outcome(state, start, start, _status(config, start), {
                name: value for line in lines if line["step"] == start
                for name, value in line.items() if name.startswith("eval/")})
        if start and hosts.is_primary():
            print(f"Resuming from step {start:,} of {config.train.steps:,}", flush=True)
        clock = Clock(earlier_seconds(lines, start))
        with (MetricWriter(workdir, start, config.train.tensorboard, config.train.wandb) as writer,
              stop_signals() as (told_to_stop, tell_to_stop), watchdog(clock, config.train.watchdog_seconds)):
            recent = [line for line in lines if start - config.train.plateau_window < line["step"] <= start]
            faults = FaultWatch(config, workdir, setup.batches, counts)
            loop = _Loop(setup, restore, checkpoints, writer, clock, faults, recent, tell_to_stop)
            return loop.run(state, start, told_to_stop)


def _status(config: Config, step: int) -> str:
    """The `Outcome.status` of a run that ends at a step."""
    ended = "stopped" if step == config.train.stop_step else "preempted"
    return "finished" if step == config.train.steps else ended


def _say(text: str, file: TextIO) -> None:
    """Prints beside the bar, at once: the output may be a file that somebody follows."""
    if hosts.is_primary():
        tqdm.write(text, file=file)
        file.flush()


def _new_state(config: Config, mesh: Mesh, initial: LazyModel | None) -> TrainState:
    """The state at step 0, with random params or those of `initial`."""
    state = make_init(config, mesh)()
    if initial is None:
        return state
    params = initial.restore(jnp.dtype("float32"), mesh)
    return dataclasses.replace(state, params=params, ema=fresh_average(config, params))


class _Loop:
    """State of `train` between steps: steps dispatched, logged, evaluated and saved."""

    def __init__(self, setup: RunSetup, restore: Callable[[int], tuple[TrainState, FaultCounts]],
                 checkpoints: Checkpoints, writer: MetricWriter, clock: Clock, faults: FaultWatch,
                 recent: list[dict[str, Any]], tell_to_stop: Callable[[], None]):
        self._setup = setup
        self._config = setup.config
        self._restore = restore
        self._checkpoints = checkpoints
        self._writer = writer
        self._clock = clock
        self._faults = faults
        self._tell_to_stop = tell_to_stop
        self._problems: list[str] = []  # of the workdir, such as files that others removed
        self._profiler = Profiler(setup.workdir, setup.profile_steps)
        self._plateau = PlateauWatch.of(setup.config)
        self._plateau_reported = False
        for line in recent:  # of metrics, written before the restart
            if "train/loss" in line:
                self._plateau.add(line["step"], *sums_of_curve(line))
        self._log_started = time.perf_counter()
        self._first_ended = self._log_started, 0  # time and number of the first step of this process
        self._unlogged_tokens = 0
        self._set_rate(faults.counts.rate)

    def _set_rate(self, rate: float) -> None:
        """Makes the step and the schedule for `rate` times the configured learning rate."""
        self._step_fn = make_train_step(self._config, self._setup.mesh, rate)
        self._schedule = make_schedule(self._config, self._config.optimizer.learning_rate * rate)

    def run(self, state: TrainState, start: int, told_to_stop: Callable[[int], bool]) -> Outcome:
        """Trains from step `start`, see `train`."""
        first = saved = start
        while True:
            try:
                return dataclasses.replace(self._run(state, start, saved, told_to_stop), start=first)
            except RollBack as fault:
                bad = fault.step
            # Outside the handler: the exception holds a reference to the discarded state.
            state = None
            start = bad + 1
            state, saved = self._roll_back(bad)

    def _roll_back(self, bad: int) -> tuple[TrainState, int]:
        """(State for the step after a bad one, with the arrays of an earlier checkpoint; the checkpoint's step)."""
        step = bad + 1
        self._clock.enter("checkpoint", step)
        # The checkpoint before, after which at least one step was good; after a younger one none was.
        state, _ = self._restore(bad)
        saved = int(state.step)
        self._set_rate(self._faults.counts.rate)
        self._writer.write(step, self._faults.counts.metrics())
        self._log_started, self._unlogged_tokens = time.perf_counter(), 0
        _say(f"step {step}: continuing with the state of step {saved}, learning rate × {self._faults.counts.rate:g}",
             sys.stderr)
        return skip_steps(state, step - saved), saved

    def _run(self, state: TrainState, start: int, saved: int, told_to_stop: Callable[[int], bool]) -> Outcome:
        """Trains from step `start`, with a state whose arrays were saved at step `saved`."""
        c = self._config
        stop = c.train.stop_step or c.train.steps
        rows_sharding = sharding.batch_sharding(self._setup.mesh)
        batches = self._setup.batches.iterate(start, local_rows(rows_sharding, c.data.batch_size))
        unlogged: list[StepMetrics] = []
        results: dict[str, float | str] = {}
        step = start
        with tqdm(total=c.train.steps, initial=start, unit="step", desc="train",
                  disable=None if hosts.is_primary() else True) as bar:
            while step < stop and not told_to_stop(step):
                self._profiler.before(step, state)
                if step > start:  # until then the phase is start-up, which includes compiling the step
                    self._clock.enter("data", step)
                rows = next(batches)
                if step > start:
                    self._clock.enter("step", step)
                batch = jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows_sharding, x), rows)
                state, metrics = self._step_fn(state, batch)
                self._clock.enter("step", step)
                if step == start:
                    self._first_ended = time.perf_counter(), step
                # Dispatch runs ahead of the device: metrics are fetched only once the next step is under way.
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
        if step > saved:  # told to stop, or a rollback led to the last step
            results = self._evaluate(step, state, bar) if step == stop else {}
            self._save(step, state, results)
        self._check_workdir(self._checkpoints.problems())
        problems, latest = hosts.broadcast_from_primary(lambda: (self._problems, self._checkpoints.latest_step))
        if problems:
            if latest != step:
                self._save(step, state, results)
                self._checkpoints.wait()
            raise InputError(f"{self._setup.workdir}: {'; '.join(problems)}. Config, tokenizer, metrics and the state "
                             f"of step {step} are saved; run the same command to continue")
        return Outcome(state, start, step, _status(c, step), results)

    def _save(self, step: int, state: TrainState, results: dict[str, float | str]) -> None:
        self._clock.enter("checkpoint", step)
        self._faults.judge_state(step - 1, bool(is_finite(state)), self._checkpoints.latest_step)
        self._check_workdir(self._checkpoints.problems())
        self._writer.publish()
        self._checkpoints.save(step, state, results, self._faults.counts)

    def _check_workdir(self, problems: Sequence[str] = ()) -> None:
        """Writes missing files of the workdir again, and stops the run if there are problems."""
        setup = self._setup
        if hosts.is_primary():
            gone = [*restore_missing(setup.workdir, setup.config, setup.tokenizer), *self._writer.restore_missing()]
            if gone:
                problems = [f"{', '.join(gone)} disappeared", *problems]
            self._problems += problems
            if problems:
                self._tell_to_stop()

    def _log(self, step: int, unlogged: list[StepMetrics], bar: tqdm) -> None:
        """Fetches and writes the means over the good steps since the last line, which ended with `step`."""
        fetched: list[StepMetrics] = jax.device_get(unlogged)
        self._faults.judge(step - len(fetched), fetched, self._checkpoints.latest_step)
        good = [metrics for metrics in fetched if not metrics.bad]
        now = time.perf_counter()
        metrics = {
            "train/learning_rate": float(self._schedule(step - 1)),
            "train/tokens_per_second": self._unlogged_tokens / (now - self._log_started),
            **{f"data_epochs/{name}": count for name, count in self._setup.batches.epochs(step).items()},
            **self._clock.metrics(),
            **self._faults.counts.metrics(),
        }
        self._log_started = now
        self._unlogged_tokens = 0
        if good:
            metrics |= self._means(step, good)
        self._writer.write(step, metrics)
        loss = f"loss {metrics['train/loss']:.3f}" if good else "no good step"
        words = f"{loss}, {metrics['train/tokens_per_second']:,.0f} tokens/s"
        bar.set_postfix_str(words)
        if bar.disable:  # not a terminal
            began, first = self._first_ended
            stop = self._config.train.stop_step or self._config.train.steps
            left = (stop - step) * (now - began) / max(step - 1 - first, 1)
            _say(f"step {step:,} of {stop:,}: {words}, {metrics['goodput/share']:.0%} of the time in training, "
                 f"{tqdm.format_interval(left)} left", sys.stderr)
        if not is_remote(self._setup.workdir):  # buckets are checked when the state is saved
            self._check_workdir()

    def _means(self, step: int, steps: list[StepMetrics]) -> dict[str, float]:
        """Metrics of some steps up to `step`, averaged."""
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
            if trend.stopped and not self._plateau_reported:
                _say(advice(step, trend), sys.stdout)
            self._plateau_reported = trend.stopped
        return metrics

    def _evaluate(self, step: int, state: TrainState, bar: tqdm) -> dict[str, float | str]:
        results: dict[str, float | str] = {}
        self._clock.enter("evaluation", step)
        for name, evaluator in self._setup.evaluators.items():
            bar.set_postfix_str(f"evaluating {name}")
            results |= evaluator(state.eval_params, step)
        if results:
            self._writer.write(step, results)
        for name, value in results.items():
            text = f"{name}:\n{value}" if isinstance(value, str) else f"{name} = {value:.4g}"
            _say(f"step {step}: {text}", sys.stdout)
        return results
