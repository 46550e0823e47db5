"""A subset of the faults of `python -m tests.faults`."""

import json
import signal

import pytest

from tests.faults import kills, programs, signals, storage


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with text, a corpus, and an undisturbed run (`short`)."""
    place = tmp_path_factory.mktemp("faults")
    programs.write_text(place / "text")
    programs.must(programs.prepare_command(place, place / "prepared"))
    programs.must(programs.train_command(place, place / "short", *storage.SHORT))
    return place


def test_killed_runs_end_like_unkilled_ones(place, tmp_path):
    killed, wrong = kills.killed_training(place / "short", tmp_path / "killed", 4, place, storage.SHORT)
    assert not wrong and sum(killed.values()) >= 2, (killed, wrong)
    last = tmp_path / "killed" / "metrics.jsonl"
    last.write_text(last.read_text().replace('"train/loss": ', '"train/loss": 1'))
    assert kills.differences(place / "short", tmp_path / "killed"), "the comparison detects a change"


def test_killed_preparations_end_like_unkilled_ones(place):
    _, wrong = kills.killed_preparation(place, 2)
    assert not wrong


def test_an_interrupted_run_loses_no_step(place, tmp_path):
    assert signals.told_to_stop(place, tmp_path / "run", signal.SIGINT) == ""


def test_a_full_disk_is_named_and_nothing_is_lost(place):
    """With a limit on file sizes; the full set mounts a small file system."""
    faults = storage.limited_files(place, 1)
    assert [fault for fault, wrong in faults if wrong] == [], json.dumps(faults, indent=1)


def test_a_workdir_without_a_config_is_restarted(place, tmp_path):
    """A kill may leave such a directory between its creation and the config."""
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    (tmp_path / "run" / "config.json.tmp-host-1").write_text('{"mod')
    command = programs.train_command(place, tmp_path / "run", *storage.SHORT, "--config.train.stop_step=1")
    code, output = programs.run(command)
    assert code == 0, output
