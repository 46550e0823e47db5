"""A subset of the faults of `python -m tests.faults`."""

import json
import signal

import pytest

from tests.faults import kills, programs, signals, storage


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory with text, a corpus, and an undisturbed run (`short`)."""
    directory = tmp_path_factory.mktemp("faults")
    programs.write_text(directory / "text")
    programs.must(programs.prepare_command(directory, directory / "prepared"))
    programs.must(programs.train_command(directory, directory / "short", *storage.SHORT))
    return directory


@pytest.mark.slow
def test_killed_runs_end_like_unkilled_ones(directory, tmp_path):
    killed, wrong = kills.killed_training(directory / "short", tmp_path / "killed", 4, directory, storage.SHORT)
    assert not wrong and sum(killed.values()) >= 2, (killed, wrong)
    last = tmp_path / "killed" / "metrics.jsonl"
    last.write_text(last.read_text().replace('"train/loss": ', '"train/loss": 1'))
    assert kills.differences(directory / "short", tmp_path / "killed"), "the comparison detects a change"


@pytest.mark.slow
def test_killed_preparations_end_like_unkilled_ones(directory):
    _, wrong = kills.killed_preparation(directory, 2)
    assert not wrong


@pytest.mark.slow
def test_an_interrupted_run_loses_no_step(directory, tmp_path):
    assert signals.told_to_stop(directory, tmp_path / "run", signal.SIGINT) == ""


@pytest.mark.slow
def test_a_full_disk_is_named_and_nothing_is_lost(directory):
    """With a limit on file sizes; the full set mounts a small file system."""
    faults = storage.limited_files(directory, 1)
    assert [fault for fault, wrong in faults if wrong] == [], json.dumps(faults, indent=1)


@pytest.mark.slow
def test_a_workdir_without_a_config_is_restarted(directory, tmp_path):
    """A kill may leave such a directory between its creation and the config."""
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    (tmp_path / "run" / "config.json.tmp-host-1").write_text('{"mod')
    command = programs.train_command(directory, tmp_path / "run", *storage.SHORT, "--config.train.stop_step=1")
    code, output = programs.run(command)
    assert code == 0, output
