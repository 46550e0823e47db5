"""Plots of runs, and the console command, as typed."""

import json
import subprocess
import sys

import pytest

from illada_jax import plot
from illada_jax.__main__ import COMMANDS
from illada_jax.errors import InputError


def run_command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "illada_jax", *arguments], capture_output=True, text=True, timeout=120)


def write_run(workdir, lines):
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(workdir)


def line(step, loss, **more):
    return {"step": step, "train/loss": loss, "train/learning_rate": 0.1, **more}


def test_accuracy_over_p_weighs_lines_by_their_masked_tokens():
    names = [f"train_by_p/{name}/0.25" for name in ("masked_tokens", "cross_entropy", "accuracy")]
    lines = [line(1, 3.0, **dict(zip(names, (10.0, 2.0, 1.0), strict=True))),
             {"step": 1, "eval/bits_per_byte": 2.0},
             line(2, 3.0, **dict(zip(names, (30.0, 2.0, 0.0), strict=True)))]
    assert plot.accuracy_over_p(lines) == ([0.25], [0.25])
    assert plot.series(lines, "eval/bits_per_byte") == ([1], [2.0])


def test_runs_are_drawn_over_each_other(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    runs = [write_run(tmp_path / name, [line(step, 5.0 / step) for step in (1, 2, 3)]) for name in ("one", "two")]
    result = run_command("plot", *runs, f"--figure={tmp_path / 'runs.svg'}")
    assert result.returncode == 0, result.stderr
    svg = (tmp_path / "runs.svg").read_text()
    # Text is drawn as paths, but each is announced by a comment.
    assert all(f"<!-- {text} -->" in svg for text in ("training loss (nats per token)", "learning rate", *runs))
    assert "<!-- held-out exact match -->" not in svg, "no run recorded it"


@pytest.mark.parametrize("arguments, message", [
    ([], "name at least one workdir"),
    (["nowhere"], "nowhere: contains no metrics.jsonl"),
    (["nowhere", "--figure=a.jpeg"], "must be .png, .svg, .pdf"),
    (["nowhere", "--figure=missing/a.png"], "the directory missing does not exist"),
])
def test_bad_input_is_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = dict(argument[2:].split("=") for argument in arguments if argument.startswith("--"))
    plot.flags.FLAGS(["plot"])
    monkeypatch.setattr(plot.flags.FLAGS["figure"], "value", values.get("figure", "plot.png"))
    with pytest.raises(InputError, match=message):
        plot.main(["plot", *(argument for argument in arguments if not argument.startswith("--"))])


def test_the_console_command_knows_its_commands_and_suggests():
    listed = run_command("--help").stdout
    assert all(name in listed for name in COMMANDS)
    assert run_command("--version").stdout.startswith("illada_jax ")
    mistyped = run_command("trian")
    assert (mistyped.returncode, mistyped.stderr.count("\n")) == (2, 1)
    assert "did you mean train?" in mistyped.stderr


def test_the_console_command_runs_the_module(tmp_path):
    """Bad input of the module itself: its own message and exit code."""
    result = run_command("prepare")
    alone = subprocess.run([sys.executable, "-m", "illada_jax.prepare"], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (alone.returncode, alone.stderr)
    assert result.returncode == 2 and result.stderr.startswith("error: ")
