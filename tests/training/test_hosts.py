"""Several processes train as one: same losses, one checkpoint, one exit, also when one of them dies or hangs."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from illada_jax import console
from illada_jax.errors import EXIT_RESUMABLE, InputError, StorageError
from illada_jax.parallel import hosts
from illada_jax.training.checkpoints import Checkpoints
from illada_jax.training.clock import Clock, earlier_seconds, watchdog
from illada_jax.training.profiler import parse_steps
from tests.compilation import FAST_COMPILATION

ROOT = pathlib.Path(__file__).parents[2]
# SIGUSR1 hangs the main thread, while the process keeps sending heartbeats.
CONFIG = """
import signal
import time

from illada_jax import config

signal.signal(signal.SIGUSR1, lambda *_: time.sleep(600))


def get_config():
    c = config.defaults()
    c.data.sources = ("text:{text}",)
    c.data.tokenizer = "bytes"
    c.data.cache_dir = "{cache}"
    c.data.length = 32
    c.data.batch_size = 8
    c.data.heldout_fraction = 0.2
    c.model.update(dict(vocab_size=264, d_model=16, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=8, d_ff=32,
                        max_length=64))
    c.train.update(dict(steps=10, log_every=1, tensorboard=False))
    c.optimizer.update(dict(learning_rate=3e-3, warmup_steps=2, decay_steps=4))
    c.eval.update(dict(evaluators=(), windows=8))
    return c
"""


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.fixture
def start(text_file, tmp_path_factory, tmp_path):
    """start(processes, workdir, *flags, last=()) starts the training command in processes of one device each.

    `last` are additional flags of the last process.
    """
    running = []
    path = tmp_path / "config.py"
    path.write_text(CONFIG.format(text=text_file, cache=tmp_path_factory.getbasetemp() / "cache"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
                   "XLA_FLAGS": FAST_COMPILATION}

    def start(processes, workdir, *flags, last=()):
        port = free_port()
        command = [sys.executable, "-m", "illada_jax.main", f"--config={path}", f"--workdir={workdir}", *flags]
        started = [
            subprocess.Popen([*command, f"--processes=localhost:{port},{processes},{number}",
                              *(last if number == processes - 1 else [])], env=environment,
                             text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for number in range(processes)]
        running.extend(started)
        return started

    yield start
    for process in running:
        process.kill()
        process.wait()


def finish(started):
    """(exit code, stdout, stderr) of each."""
    outputs = [process.communicate(timeout=600) for process in started]
    return [(process.returncode, *output) for process, output in zip(started, outputs, strict=True)]


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def wait_for_steps(workdir, steps, started):
    while not (workdir / "metrics.jsonl").exists() or max(losses(workdir), default=0) < steps:
        assert all(process.poll() is None for process in started), finish(started)
        time.sleep(0.1)


@pytest.mark.slow
def test_two_and_four_processes_train_like_one_and_any_number_goes_on(run, start, tmp_path):
    _, lines = run(tmp_path / "one", train__log_every=1, eval__evaluators=("bits_per_byte",))
    expected = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    assert sorted(expected) == list(range(1, 11))
    evaluated = ["--config.eval.evaluators=('bits_per_byte','samples')", "--config.eval.every=10",
                 "--config.decode.max_new_tokens=4", "--config.decode.block_length=4",
                 "--config.decode.steps_per_block=4", "--profile_steps=3:5"]
    for processes, flags in ((4, []), (2, ["--config.checkpoint.every=5", *evaluated])):
        workdir = tmp_path / str(processes)
        results = finish(start(processes, workdir, *flags))
        for code, _, error in results:
            assert code == 0, error
        assert ["workdir" in output for _, output, _ in results] == [True] + [False] * (processes - 1), "one prints"
        got = losses(workdir)
        np.testing.assert_allclose([got[s] for s in expected], list(expected.values()), rtol=1e-5)
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval/bits_per_byte"] == pytest.approx(lines[-1]["eval/bits_per_byte"], rel=1e-5)
    assert last["eval/samples"]
    assert list((workdir / "profile").rglob("*.xplane.pb")), "one for each host"
    shutil.rmtree(workdir / "checkpoints" / "10")
    shutil.copytree(workdir, tmp_path / "four")
    for code, _, error in finish(start(4, tmp_path / "four", "--config.checkpoint.every=5")):
        assert code == 0, error
    resumed = losses(tmp_path / "four")
    np.testing.assert_allclose([resumed[s] for s in expected], list(expected.values()), rtol=1e-5)
    _, lines = run(workdir, num_devices=1, allowed=("data",), train__log_every=1)
    resumed = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    np.testing.assert_allclose([resumed[s] for s in expected], list(expected.values()), rtol=1e-5)


LONG = ["--config.train.steps=500000", "--config.checkpoint.every=20", "--config.optimizer.decay_steps=0"]
RESUMABLE = (EXIT_RESUMABLE, -signal.SIGABRT)


@pytest.mark.slow
def test_sigterm_to_one_saves_on_all_and_a_killed_run_resumes(run, start, tmp_path):
    workdir = tmp_path / "run"
    started = start(2, workdir, *LONG)
    wait_for_steps(workdir, 25, started)
    (code, _, error), = finish(start(1, workdir, *LONG))
    assert code == 2 and f"process {started[0].pid} on " in error and "is training in this workdir; stop it" in error
    started[1].send_signal(signal.SIGTERM)
    results = finish(started)
    for code, _, error in results:
        assert code == 75, error
    saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert f"Stopped and saved at step {saved}" in results[0][1]

    started = start(2, workdir, *LONG)
    wait_for_steps(workdir, saved + 45, started)
    started[1].kill()
    (code, _, error), _ = finish(started)
    assert code in RESUMABLE, error

    newest = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    assert newest > saved
    _, lines = run(workdir, allowed=("data", "optimizer"), train__steps=500000, train__stop_step=newest + 3,
                   train__log_every=1, optimizer__decay_steps=0)
    assert [line["step"] for line in lines] == list(range(1, newest + 4))
    assert lines[-1]["goodput/lost_seconds"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("number", "victim"), [(signal.SIGKILL, 0), (signal.SIGSTOP, 0), (signal.SIGSTOP, 1)])
def test_the_other_process_ends_when_one_is_killed_or_stopped(start, tmp_path, number, victim):
    started = start(2, tmp_path / "run", *LONG)
    wait_for_steps(tmp_path / "run", 5, started)
    began = time.monotonic()
    started[victim].send_signal(number)
    error = started[1 - victim].communicate(timeout=300)[1]
    assert started[1 - victim].returncode in RESUMABLE, error
    assert time.monotonic() - began < 3 * hosts.HEARTBEAT_TIMEOUT_SECONDS
    started[victim].send_signal(signal.SIGCONT)
    started[victim].communicate(timeout=60)
    assert started[victim].returncode in (*RESUMABLE, -signal.SIGKILL)


@pytest.mark.slow
def test_the_watchdog_ends_a_hung_process_that_sends_heartbeats(start, tmp_path):
    started = start(2, tmp_path / "run", *LONG, "--config.train.watchdog_seconds=45")
    wait_for_steps(tmp_path / "run", 5, started)
    started[1].send_signal(signal.SIGUSR1)
    results = finish(started)
    assert all(code in RESUMABLE for code, *_ in results), results
    messages = [error for _, _, error in results if "no progress for" in error]
    assert messages and "restart all processes. Its stacks:" in messages[0] and "File " in messages[0]


SLOW_PRIMARY = """
import sys, time
from illada_jax.parallel import hosts
hosts.join(sys.argv[1])
print(hosts.broadcast_from_primary(lambda: time.sleep(35) or "ready"))
"""


@pytest.mark.slow
def test_the_others_wait_for_a_slow_primary():
    """Collectives alone would not: the first one of a program must connect within 30 seconds."""
    address = f"localhost:{free_port()}"
    started = [subprocess.Popen([sys.executable, "-c", SLOW_PRIMARY, f"{address},2,{number}"], text=True,
                                env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for number in range(2)]
    for code, output, error in finish(started):
        assert code == 0 and output.endswith("ready\n"), error


@pytest.mark.slow
def test_an_input_error_of_one_process_is_the_error_of_all(start, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "something").write_text("else")
    results = finish(start(2, tmp_path / "run"))
    assert [code for code, *_ in results] == [2, 2]
    for _, _, error in results:
        assert "neither empty nor a workdir" in error
    results = finish(start(2, tmp_path / "other", last=["--config.seed=7"]))
    assert [code for code, *_ in results] == [2, 2]
    for _, _, error in results:
        assert "process 1: the config or the corpus differs from that of process 0" in error


def test_the_watchdog_allows_ten_times_as_long_for_other_phases(monkeypatch, capfd):
    exits = []
    monkeypatch.setattr(console, "hard_exit", exits.append)
    clock = Clock({})
    for phase, expected in (("evaluation", []), ("step", [EXIT_RESUMABLE])):
        clock.enter(phase, 7)
        with watchdog(clock, 0.4):
            time.sleep(0.6)
        assert exits[:1] == expected
    error = capfd.readouterr().err
    assert "in phase step of step 7 (config.train.watchdog_seconds = 0.4)" in error and "test_hosts.py" in error


@pytest.mark.parametrize(("error", "waits"), [(None, True), (InputError, True), (StorageError, False),
                                              (RuntimeError, False)])
def test_one_of_several_processes_does_not_wait_after_an_error_of_its_own(monkeypatch, error, waits):
    """The others know nothing of it: they would be waited for at the end of a save that they do not end."""
    waited = []
    checkpoints = Checkpoints.__new__(Checkpoints)
    checkpoints._manager = types.SimpleNamespace(wait_until_finished=lambda: waited.append(1), close=lambda: None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    checkpoints.__exit__(error, error, None)
    assert bool(waited) == waits


@pytest.mark.parametrize("processes", ["two", "localhost:1", "localhost:1,2,2", "localhost:1,2,x", "localhost,2,0"])
def test_bad_processes_are_refused(processes):
    with pytest.raises(InputError, match="--processes="):
        hosts.join(processes)


@pytest.mark.parametrize("text", ["5", "5:5", "a:b", "7:3"])
def test_bad_profile_steps_are_refused(text):
    with pytest.raises(InputError, match="--profile_steps="):
        parse_steps(text)


def test_time_adds_up_over_the_processes_of_a_run():
    clock = Clock({"step": 100.0, "lost": 7.0})
    clock.enter("data", 1)
    clock.enter("step", 1)
    metrics = clock.metrics()
    assert metrics["goodput/step_seconds"] >= 100 and metrics["goodput/lost_seconds"] == 7
    total = sum(value for name, value in metrics.items() if name.endswith("_seconds"))
    assert metrics["goodput/share"] == pytest.approx(metrics["goodput/step_seconds"] / total)
    lines = [{"step": step, "goodput/step_seconds": 10.0 * step, "goodput/data_seconds": 1.0} for step in (1, 2, 3)]
    lines.append({"step": 3, "eval/bits_per_byte": 2.0})
    assert earlier_seconds(lines, 2) == {**dict.fromkeys(("startup", "evaluation", "checkpoint"), 0.0), "data": 1.0,
                                         "step": 20.0, "lost": 10.0}
