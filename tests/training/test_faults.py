"""Bad steps: batches, params and learning rates that poison a run, and its reaction."""

import json

import jax
import numpy as np
import pytest
from etils import epath

from illada_jax.errors import InputError
from illada_jax.training import loop as loop_lib
from illada_jax.training.optimizer import make_schedule

COMMON = {"train__steps": 12, "train__log_every": 4, "checkpoint__every": 4, "optimizer__decay_steps": 0}

@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """The runs of this file are the same few programs."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.getbasetemp() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    jax.config.update("jax_compilation_cache_dir", None)


def poisoned(*steps, value=np.nan):
    """Makes the loss of some steps NaN or infinite by a weight in one row of their batches."""
    def poison(pipeline):
        rows_of = pipeline.rows

        def rows(step, rows):
            batch = rows_of(step, rows)
            if step in steps:
                weights_BL = batch.weights_BL.copy()
                weights_BL[0] = value
                batch = batch._replace(weights_BL=weights_BL)
            return batch

        pipeline.rows = rows
        return pipeline

    return poison


def arrays(outcome):
    return jax.device_get(jax.tree.leaves((outcome.state.params, outcome.state.opt_state)))


def assert_same(one, other):
    for a, b in zip(arrays(one), arrays(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_halt_says_what_to_type_and_that_works(run, tmp_path):
    value = np.inf
    with pytest.raises(InputError) as caught:
        run(tmp_path / "w", poison=poisoned(6, value=value), **COMMON)
    message = str(caught.value)
    assert "\n" not in message and "bad numbers at step 6: loss " in message
    assert f"{tmp_path}/w/bad_batches/6.npz; the newest checkpoint is from step 4. " in message
    assert "--config.faults.action=skip" in message and "--config.faults.action=rollback" in message
    assert [path.name for path in (tmp_path / "w" / "checkpoints").iterdir()] == ["4"]

    saved = np.load(tmp_path / "w" / "bad_batches" / "6.npz")
    assert saved["step"] == 6 and saved["rows"].tolist() == list(range(8)) and saved["tokens_BL"].shape == (8, 32)
    np.testing.assert_array_equal(saved["weights_BL"][0], np.full(32, value))
    assert not np.isfinite(saved["loss"])

    resumed, lines = run(tmp_path / "w", poison=poisoned(6, value=value), faults__action="skip", **COMMON)
    whole, _ = run(tmp_path / "whole", poison=poisoned(6, value=value), faults__action="skip", **COMMON)
    assert_same(resumed, whole)
    assert [line["faults/skipped"] for line in lines] == [0, 1, 1]
    assert all(np.isfinite(line["train/loss"]) for line in lines)


def test_a_skipped_step_changes_only_the_counts(run, tmp_path):
    before, _ = run(tmp_path / "w", train__stop_step=6, **COMMON)
    before = jax.device_get(before.state)
    after, lines = run(tmp_path / "w", poison=poisoned(6), faults__action="skip", train__stop_step=7, **COMMON)
    counts = 0
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(jax.device_get(after.state)), strict=True):
        is_count = np.issubdtype(a.dtype, np.integer)
        counts += is_count
        np.testing.assert_array_equal(b, a + is_count)
    assert counts == 3  # of steps, in Adam and in the schedule
    assert "train/loss" not in lines[-1] and lines[-1]["faults/skipped"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [8])
def test_rollback_skips_the_batches_and_lowers_the_rate(run, tmp_path, num_devices):
    """Equal to a run that stopped at step 4, skipped steps 4 to 6 and continued at half the rate."""
    changes = {**COMMON, "faults__rate_scale": 0.5}
    outcome, lines = run(tmp_path / "w", num_devices, poison=poisoned(6), faults__action="rollback", **changes)
    assert outcome.step == 12 and outcome.status == "finished"
    assert [(line["step"], line["faults/rollbacks"], line["faults/rate"]) for line in lines] == [
        (4, 0, 1.0), (7, 1, 0.5), (8, 1, 0.5), (12, 1, 0.5)]
    assert [line.get("train/learning_rate") for line in lines] == pytest.approx([3e-3, None, 1.5e-3, 1.5e-3])

    expected, _ = run(tmp_path / "4", num_devices, train__stop_step=4, **COMMON)
    expected, _ = run(tmp_path / "4", num_devices, poison=poisoned(4, 5, 6), faults__action="skip",
                      train__stop_step=7, **COMMON)
    expected, _ = run(tmp_path / "4", num_devices, allowed=("optimizer",), optimizer__learning_rate=1.5e-3, **COMMON)
    assert_same(outcome, expected)


@pytest.mark.parametrize("stops", [(5, 6, 7, 10)])
@pytest.mark.slow
def test_interrupted_runs_take_the_same_path_through_faults(run, tmp_path, stops):
    """Rollbacks ignore checkpoints that only an interruption wrote; the counts survive."""
    changes = {**COMMON, "poison": poisoned(7, 9), "faults__action": "rollback", "faults__rate_scale": 0.5}
    whole, whole_lines = run(tmp_path / "whole", **changes)
    for stop in stops:
        run(tmp_path / "parts", train__stop_step=stop, **changes)
    parts, lines = run(tmp_path / "parts", **changes)
    assert_same(whole, parts)
    assert whole_lines[-1]["faults/rollbacks"] == lines[-1]["faults/rollbacks"] == 2
    assert lines[-1]["faults/rate"] == 0.25


@pytest.mark.slow
def test_rollback_before_the_first_checkpoint_restarts(run, tmp_path):
    outcome, _ = run(tmp_path / "w", poison=poisoned(1), faults__action="rollback", **COMMON)
    expected, _ = run(tmp_path / "x", poison=poisoned(0, 1), faults__action="skip", **COMMON)
    assert_same(outcome, expected)


@pytest.mark.slow
def test_the_last_step_is_evaluated_after_a_rollback(run, tmp_path):
    outcome, _ = run(tmp_path / "w", poison=poisoned(11), faults__action="rollback",
                     evaluators={"seen": lambda params, step: {"seen": step}}, **COMMON)
    assert outcome.final == {"seen": 12}
    assert (tmp_path / "w" / "checkpoints" / "12").is_dir()


def test_the_number_of_faults_is_limited(run, tmp_path):
    with pytest.raises(InputError, match=r"step 9: .*config\.faults\.max_times = 2: run the same"):
        run(tmp_path / "w", poison=poisoned(2, 5, 9), faults__action="skip", faults__max_times=2, **COMMON)
    assert max(int(path.name) for path in (tmp_path / "w" / "checkpoints").iterdir()) == 8


@pytest.mark.slow
def test_a_learning_rate_of_1000_is_caught_by_the_limit(run, tmp_path):
    wild = {**COMMON, "optimizer__learning_rate": 1e3, "optimizer__warmup_steps": 0, "faults__max_cross_entropy": 10.0}
    with pytest.raises(InputError, match=r"bad numbers at step 1: .*nothing has been saved yet"):
        run(tmp_path / "w", **wild)
    with pytest.raises(InputError, match=r"3 rollbacks reach"):
        run(tmp_path / "x", faults__action="rollback", faults__max_times=3, **wild)
    outcome, lines = run(tmp_path / "y", faults__action="rollback", faults__rate_scale=1e-3, **wild)
    assert outcome.status == "finished" and lines[-1]["faults/rollbacks"] <= 2
    assert lines[-1]["train/loss"] < 10


def test_a_state_that_is_not_finite_is_not_saved(run, tmp_path):
    """A rate that overflows float32: the step's loss and gradients are good, its params are not."""
    wild = {**COMMON, "optimizer__learning_rate": 3e38, "optimizer__weight_decay": 1e9,
            "optimizer__warmup_steps": 0, "checkpoint__every": 1}
    with pytest.raises(InputError, match="not finite; nothing has been saved yet"):
        run(tmp_path / "w", faults__action="skip", **wild)
    assert not list((tmp_path / "w" / "checkpoints").iterdir())


def test_rollback_discards_bad_params(run, tmp_path, monkeypatch):
    """The params become NaN between two steps, once."""
    make, done = loop_lib.make_train_step, []

    def make_train_step(*arguments):
        step_fn = make(*arguments)

        def step(state, batch):
            if not done and state.step == 6:
                done.append(True)
                state = state.replace(params=jax.tree.map(lambda x: x * np.nan, state.params))
            return step_fn(state, batch)

        return step

    monkeypatch.setattr(loop_lib, "make_train_step", make_train_step)
    outcome, _ = run(tmp_path / "w", faults__action="rollback", **COMMON)
    expected, _ = run(tmp_path / "x", poison=poisoned(4, 5, 6), faults__action="skip", **COMMON)
    assert_same(outcome, expected)


@pytest.mark.slow
def test_a_rate_after_rollbacks_is_the_schedule_times_it(run, tmp_path, text_file):
    workdir = epath.Path(tmp_path / "w")
    run(tmp_path / "w", poison=poisoned(6), faults__action="rollback", faults__rate_scale=0.25,
        **COMMON | {"optimizer__decay_steps": 6})
    config = loop_lib.config_lib.from_saved(json.loads((workdir / "config.json").read_text()))
    schedule = make_schedule(config, config.optimizer.learning_rate)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["train/learning_rate"] for line in lines if "train/learning_rate" in line}
    assert rates == pytest.approx(
        {4: float(schedule(3)), 8: 0.25 * float(schedule(7)), 12: 0.25 * float(schedule(11))}, rel=1e-6)
