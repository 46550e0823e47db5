"""Workdirs that others change: files that are removed during a run, half-written lines, files that are no files."""

import errno
import json
import os
import resource
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from illada_jax.errors import InputError, StorageError
from illada_jax.interop import load_model
from illada_jax.training.metrics import MetricWriter, read_lines
from tests.test_files import odd_file

COMMON = {"train__steps": 12, "train__log_every": 1, "checkpoint__every": 3, "checkpoint__keep": 2, "eval__every": 1}


def newest(workdir):
    return max((path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()), key=lambda p: int(p.name))


def remove_tree(path):
    """Removes a directory that others write to, as `rm -r` repeated until it works."""
    while path.exists():
        shutil.rmtree(path, ignore_errors=True)


REMOVALS = {
    "workdir": remove_tree,
    "config.json": lambda workdir: (workdir / "config.json").unlink(),
    "metrics.jsonl": lambda workdir: (workdir / "metrics.jsonl").unlink(),
    "tokenizer": lambda workdir: shutil.rmtree(workdir / "tokenizer"),
    "checkpoints": lambda workdir: remove_tree(workdir / "checkpoints"),
    "newest checkpoint": lambda workdir: remove_tree(newest(workdir)),
    "moved workdir": lambda workdir: workdir.rename(workdir.with_name("elsewhere")),
    "replaced metrics": lambda workdir: os.replace(shutil.copy(__file__, workdir / "x"), workdir / "metrics.jsonl"),
}


def timeless(lines):
    return [{name: value for name, value in line.items()
             if not name.startswith("goodput/") and name != "train/tokens_per_second"} for line in lines]


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """An undisturbed run: outcome, metrics, workdir."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return *run(workdir, evaluators={"nothing": lambda params, step: {}}, **COMMON), workdir


@pytest.mark.parametrize(("removal", "step"), [
    ("workdir", 8), ("newest checkpoint", 12),
    *(pytest.param(removal, step, marks=pytest.mark.slow) for removal in REMOVALS for step in (8, 12)
      if (removal, step) not in (("workdir", 8), ("newest checkpoint", 12)))])
def test_removed_files_are_noticed_and_written_again(run, whole, tmp_path, removal, step):
    """The run ends with an error that names them, and the same command continues as if nothing had happened."""
    workdir = tmp_path / "run"

    def remove(_, now):
        if now == step:
            REMOVALS[removal](workdir)
        return {}

    with pytest.raises(InputError, match=rf"^{workdir}: .* disappeared.* Config, tokenizer, metrics and the state"):
        run(workdir, evaluators={"removal": remove}, **COMMON)
    assert load_model(workdir).step >= step
    lines = read_lines(epath.Path(workdir))
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, load_model(workdir).step + 1))
    outcome, lines = run(workdir, evaluators={"nothing": lambda params, step: {}}, **COMMON)
    assert outcome.status == "finished" and timeless(lines) == timeless(whole[1])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(outcome.state.params),
                 jax.device_get(whole[0].state.params))


def test_a_workdir_that_cannot_be_written_again_is_an_error(run, tmp_path):
    def replace(_, now):
        remove_tree(tmp_path / "run")
        (tmp_path / "run").write_text("a file")
        return {}

    with pytest.raises(StorageError, match=r"run: cannot write config\.json, tokenizer: "):
        run(tmp_path / "run", evaluators={"replace": replace}, **COMMON)


@pytest.mark.parametrize("half", [
    b'{"step": 5, "x": "\xe2\x82', b'{"step": 5', b"\xff\xfe\x00", b"[" * 10**5, b"\x00" * 9, b'{"step": true}',
    b'{"step": 1e999}', b"5", b'{"step": ' + b"9" * 5000 + b"}"])
def test_half_a_line_of_metrics_is_dropped(run, tmp_path, half):
    workdir = epath.Path(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 3, "text": "\xe2\x82\xac \xe2\x80\xa8"}\n{"step": 4}\n' + half)
    assert [line["step"] for line in read_lines(workdir)] == [3, 4]
    with MetricWriter(workdir, 4, tensorboard=False) as writer:
        writer.write(5, {"loss": 1.0})
    lines = (tmp_path / "metrics.jsonl").read_text().split("\n")
    assert [json.loads(line)["step"] for line in lines[:-1]] == [3, 4, 5] and lines[-1] == ""


@pytest.mark.parametrize("kind", ["FIFO", pytest.param("directory", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "trainer.lock", "tokenizer/special_ids.json",
                                  "checkpoints", "checkpoints/12/meta/metadata", "checkpoints/12/params/_METADATA"])
def test_what_is_no_file_is_named_or_has_no_effect(run, whole, tmp_path, name, kind):
    workdir = tmp_path / "run"
    shutil.copytree(whole[2], workdir)
    path = workdir / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    odd_file(path, kind)
    try:
        outcome, _ = run(workdir, **COMMON)
        assert outcome.status == "finished"
    except (InputError, OSError) as error:
        assert str(workdir) in str(error) and "\n" not in str(error)


def limited(size, function):
    """Calls the function while no file may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        function()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_tensorboard_on_a_full_disk_is_one_error(tmp_path, capfd):
    """The events grow faster than the lines."""
    def write():
        with MetricWriter(epath.Path(tmp_path), 0, tensorboard=True) as writer:
            for step in range(1000):
                writer.write(step, {f"x/{i}": 1.0 for i in range(3)})

    with pytest.raises(StorageError, match=rf"metrics\.jsonl: cannot be written: {os.strerror(errno.EFBIG)}"):
        limited(4096, write)
    events, = tmp_path.glob("events.out.tfevents.*")
    assert events.stat().st_size >= 4096 > (tmp_path / "metrics.jsonl").stat().st_size
    output = capfd.readouterr()
    assert output.out == output.err == ""


def test_tensorboard_reads_the_events(tmp_path):
    from tensorboardX.proto import event_pb2

    for start in (0, 2):
        (tmp_path / str(start)).mkdir()
        with MetricWriter(epath.Path(tmp_path / str(start)), start, tensorboard=True) as writer:
            writer.write(start + 1, {"loss": 0.5, "text": "a text"})
        path, = (tmp_path / str(start)).glob("events.out.tfevents.*")
        content, events = path.read_bytes(), []
        while content:
            length = int.from_bytes(content[:8], "little")
            events.append(event_pb2.Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
        assert events[0].file_version == "brain.Event:2"
        assert events[1].session_log.status == event_pb2.SessionLog.START
        assert [value.tag for event in events[2:] for value in event.summary.value] == ["loss", "text/text_summary"]
        assert events[2].step == events[1].step == start + 1 and events[2].summary.value[0].simple_value == 0.5
