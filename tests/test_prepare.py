"""The command, as a user types it."""

import subprocess
import sys

import pytest


def prepare(*arguments):
    return subprocess.run([sys.executable, "-m", "illada_jax.prepare", *arguments], capture_output=True, text=True,
                          check=False)


def test_prepares_and_says_what_to_type_next(tmp_path):
    (tmp_path / "a.txt").write_text("Some text.\n\n" * 2000)
    done = prepare(f"--source=text:{tmp_path}/a.txt", f"--target={tmp_path}/out", "--vocab_size=300",
                   "--heldout_fraction=0.3")
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout and f"('prepared:{tmp_path}/out',)" in done.stdout
    assert "tokenizer of 300 ids" in done.stderr and "tokenizing" not in done.stderr, "bars are for terminals"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "manifest.json", "tokenizer", "train-000000.array_record", "heldout-000000.array_record"}


@pytest.mark.parametrize(("arguments", "message"), [
    (["--target={}/out"], "--source is required"),
    (["--source=text:{}/none.txt", "--target={}/out"], "none.txt: no such file"),
    (["--source=text:{}/bad.txt", "--target={}/out"], "bad.txt: not UTF-8 at byte 3"),
])
def test_bad_input_is_one_line_and_nothing_is_finished(tmp_path, arguments, message):
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    failed = prepare(*(argument.format(tmp_path) for argument in arguments))
    assert failed.returncode == 2
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0] and "Traceback" not in failed.stderr
    assert not (tmp_path / "out").exists()


def test_help_has_an_example():
    shown = prepare("--help")
    assert "python -m illada_jax.prepare --source=" in shown.stdout and "--heldout_fraction" in shown.stdout
