"""Trains a masked diffusion language model: pre-training and fine-tuning, on one device or on a pod.

    python -m illada_jax.main --config=experiments/quickstart.py --workdir=workdirs/quickstart
    python -m illada_jax.main --config=experiments/quickstart.py --config.train.steps=100 --workdir=workdirs/short
    python -m illada_jax.main --config=experiments/quickstart.py --config.model.num_layers=2 --workdir=workdirs/shallow

The same command resumes a workdir that has a checkpoint. On several hosts start it on each with `--processes`.

Exit codes of this and all other commands:

    0    success
    1    an unexpected error, with a traceback
    2    invalid input, a full or read-only disk, or bad numbers (config.faults): one line says what to change
    75   the run can be resumed by the same command on all hosts: SIGTERM or SIGINT arrived and the state was saved,
         another process died, or no step ended for config.train.watchdog_seconds
    130  a second SIGINT (Ctrl-C)
    141  stdout was closed early, as by `| head`

When a process of several dies, JAX aborts the others (SIGABRT, 134 in a shell); such runs can be resumed too.
"""

import sys

import jax
from absl import flags
from etils import epath

from illada_jax import cli, console
from illada_jax.config import Config
from illada_jax.errors import EXIT_RESUMABLE, ConfigError, InputError, StorageError
from illada_jax.evaluation.evaluators import check_evaluation, make_evaluators
from illada_jax.interop import open_model
from illada_jax.interop.families import ILLADA, write_model_config
from illada_jax.parallel import hosts
from illada_jax.parallel.mesh import make_mesh
from illada_jax.training import run as run_setup
from illada_jax.training.loop import RunSetup, train
from illada_jax.training.memory import limit_arenas
from illada_jax.training.profiler import parse_steps

_SHOWN_ROWS, _SHOWN_TOKENS = 8, 48  # of the first batch, printed by --dry_run

_PROCESSES = cli.processes_flag()
_CONFIG = cli.ConfigFlag("experiments/quickstart.py")
_WORKDIR = flags.DEFINE_string("workdir", None, "directory of all outputs; default: workdirs/NAME_OF_CONFIG")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "check the config and print the plan without training; needs no corpus")
_ALLOW = flags.DEFINE_list("allow_config_change", [], "config keys that may differ from the workdir's on resume")
_PROFILE = flags.DEFINE_string("profile_steps", "", "FIRST:END, steps to profile into WORKDIR/profile")
_COMPILED = flags.DEFINE_string("compilation_cache", "",
                                "directory, or gs://…, for compiled programs; default: in $XDG_CACHE_HOME/illada_jax")


def dry_run(config: Config) -> None:
    """Prints the plan and, if the corpus exists, the start of each row of the first batch. Allocates no model."""
    try:
        # A plan must not need the network, so a Hub id is not opened.
        local = config.init.checkpoint and epath.Path(config.init.checkpoint).is_dir()
        resolved, corpus, batches = run_setup.open_data(config, open_model(config.init.checkpoint) if local else None)
    except ConfigError:
        raise
    except InputError as error:
        if config.model.vocab_size == 0:
            raise ConfigError("config.model.vocab_size = 0: without a corpus, give its value") from error
        check_evaluation(config, None)
        print(run_setup.describe_plan(config))
        print(f"corpus            missing: {error}")
        print_reason_not_to_export(config)
        return
    check_evaluation(resolved, corpus.tokenizer)
    print(run_setup.describe_plan(resolved))
    print(f"corpus            {corpus.train.num_tokens:,} tokens, held out {corpus.heldout.num_tokens:,}")
    rows = range(min(config.data.batch_size, _SHOWN_ROWS))
    print_reason_not_to_export(resolved)
    print(f"first batch       the start of {len(rows)} of {config.data.batch_size:,} rows")
    for row, tokens_L in zip(rows, batches.rows(0, rows).tokens_BL, strict=True):
        print(f"  row {row}: {corpus.tokenizer.decode(tokens_L[:_SHOWN_TOKENS])!r}")


def print_reason_not_to_export(config: Config) -> None:
    """Prints a line if the model could be trained and used here, but not exported."""
    try:
        write_model_config(ILLADA, config.model)
    except InputError as error:
        print(f"note: this model cannot be exported to a public layout by illada_jax.convert: {error}", flush=True)


def main(_: list[str]) -> int:
    """Wires config, corpus, mesh, evaluators and the loop together."""
    config, name = _CONFIG.read()
    workdir = epath.Path(_WORKDIR.value or f"workdirs/{name}")
    if _DRY_RUN.value:
        dry_run(config)
        return 0
    profile_steps = parse_steps(_PROFILE.value)
    limit_arenas()
    cli.use_compilation_cache(_COMPILED.value)
    hosts.join(_PROCESSES.value)
    try:
        return run(config, workdir, profile_steps)
    except Exception as error:
        # All processes raise an InputError together, unless it comes from their own storage.
        if jax.process_count() == 1 or (isinstance(error, InputError) and not isinstance(error, StorageError)):
            raise
        console.hard_exit(report_failure(error))


def report_failure(error: Exception) -> int:
    """Prints an error that other processes of the run may not have; returns the exit code."""
    code = cli.report(error)
    while code == 1 and error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            print("error: a device or collective operation failed, perhaps because another process died; restart all "
                  "processes", file=sys.stderr)
            return EXIT_RESUMABLE
        error = error.__cause__ or error.__context__
    return code


def run(config: Config, workdir: epath.Path, profile_steps: range) -> int:
    """Trains, evaluates and prints the results; every process calls it. Returns the exit code."""
    mesh = make_mesh(config.mesh)
    if config.model.vocab_size:
        run_setup.check_memory(config, mesh)
    initial = open_model(config.init.checkpoint) if config.init.checkpoint else None
    config, corpus, pipeline = hosts.run_on_all_hosts(lambda: run_setup.open_data(config, initial))
    evaluators, final = hosts.run_on_all_hosts(
        lambda: [make_evaluators(names, config, corpus, pipeline, mesh)
                 for names in (config.eval.evaluators, config.eval.final)])
    run_setup.check_memory(config, mesh)
    if hosts.is_primary():
        run_setup.print_start(config, workdir, mesh, corpus)
        print_reason_not_to_export(config)
    outcome = train(RunSetup(config, workdir, mesh, pipeline, corpus.tokenizer, evaluators, tuple(_ALLOW.value),
                             profile_steps, initial))
    if outcome.status == "preempted":
        if hosts.is_primary():
            print(f"Stopped and saved at step {outcome.step}; run the same command to continue.")
        return EXIT_RESUMABLE
    results = dict(outcome.final)
    if outcome.start < outcome.step:
        for evaluator in final.values():
            results |= evaluator(outcome.state.eval_params, outcome.step)
    if hosts.is_primary():
        run_setup.print_end(config, outcome, results, workdir, corpus)
    return 0


if __name__ == "__main__":
    cli.run(main)
