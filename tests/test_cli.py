"""Commands behave as shells expect: help, version, exit codes, closed pipes, no hints outside terminals."""

import os
import re
import subprocess
import sys

import pytest

from illada_jax import __version__, api
from illada_jax.__main__ import COMMANDS
from illada_jax.errors import InputError

IDS = {f"{token}_id" for token in ("mask", "bos", "eos", "pad", "eot")}
MODEL = {"checkpoint", "dtype", "quantize", "mesh"} | IDS
SHARED_FLAGS = MODEL | {"processes"}
SHARED_BY = {"train": {"processes"}, "generate": MODEL, "evaluate": SHARED_FLAGS, "aot": {"quantize"},
             "prepare": {"processes"}, "convert": {"dtype", "quantize", "mesh"} | IDS}
OWN_FLAG = {"train": "workdir", "generate": "prompt", "evaluate": "tasks", "prepare": "source", "convert": "family",
            "aot": "topology", "plot": "figure"}
SCRIPT = "from illada_jax import cli; cli.run(lambda argv: print({}))"


def shell(*arguments, **options):
    """Runs `illada ARGUMENTS`."""
    return subprocess.run([sys.executable, "-m", "illada_jax", *arguments], capture_output=True, text=True, timeout=300,
                          **options)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_examples_and_all_flags_of_the_command(name):
    """Its own, those that it shares with other commands, and none of theirs."""
    shown = shell("help", name)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"\n    python -m illada_jax.{COMMANDS[name][0]} " in shown.stdout and "flags:" in shown.stdout
    listed = set(re.findall(r"^  --(?:\[no\])?(\w+):", shown.stdout, re.MULTILINE))
    assert OWN_FLAG[name] in listed and listed & SHARED_FLAGS == SHARED_BY.get(name, set())


def test_the_console_command():
    assert shell("--version").stdout == f"illada_jax {__version__}\n"
    for arguments in ((), ("--help",), ("-h",), ("help",)):
        shown = shell(*arguments)
        assert shown.returncode == 0 and all(f"\n  {name} " in shown.stdout for name in COMMANDS)
        assert "\n  illada generate --prompt=" in shown.stdout
    wrong = shell("genrate")
    assert wrong.returncode == 2 and wrong.stdout == "" and "did you mean generate?" in wrong.stderr


def test_bash_completion_works():
    lines = shell("--completion").stdout + "compgen -W \"$(complete -p illada | cut -d\\' -f2)\" g\n"
    assert subprocess.run(["bash", "-c", lines], capture_output=True, text=True).stdout == "generate\n"


@pytest.mark.parametrize("what", ["'x' * 10**6", "'x'"])
def test_a_closed_pipe_is_no_traceback(what):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        done = subprocess.run([sys.executable, "-c", SCRIPT.format(what)], stdout=closed, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (141, b"")


def test_an_interrupt_is_one_line():
    code = "from illada_jax import cli; import signal; cli.run(lambda argv: signal.raise_signal(signal.SIGINT))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


HANGS = """
import threading, time
from illada_jax import cli
from illada_jax.errors import InputError

def main(_):
    threading.Thread(target=time.sleep, args=(600,)).start()  # as Orbax's, which an ordinary exit waits for
    print("before")
    raise {}

cli.run(main)
"""


@pytest.mark.parametrize(("error", "code", "line"), [
    ("InputError('x: wrong')", 2, "error: x: wrong"), ("OSError(28, 'full')", 2, "error: a file: full"),
    ("IsADirectoryError(21, 'is a directory', 'x')", 2, "error: x: is a directory"),
    ("KeyboardInterrupt", 130, "interrupted"), ("RuntimeError('x')", 1, "RuntimeError: x"),
    ("OSError(12, 'other')", 1, "OSError: [Errno 12] other")])
def test_a_process_leaves_after_its_error_whatever_its_threads_do(error, code, line):
    done = subprocess.run([sys.executable, "-c", HANGS.format(error)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.splitlines()[-1]) == (code, "before\n", line)
    assert ("Traceback" in done.stderr) == (code == 1)


def test_hints_are_for_terminals_only(monkeypatch, capsys):
    from illada_jax import cli

    cli.hint("next")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    cli.hint("next")
    assert capsys.readouterr() == ("", "(next)\n")


@pytest.mark.parametrize("path", ["workdirs/no-such-run", "nowhere"])
def test_a_model_that_is_not_there_says_what_to_type(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"python -m illada_jax\.main --config=.*`demo`"):
        api.load(path)


def test_a_config_that_is_not_there_is_named():
    wrong = shell("train", "--config=experiments/quikstart.py")
    assert wrong.returncode == 2 and wrong.stderr == (
        "error: --config=experiments/quikstart.py: no such file; one is experiments/quickstart.py\n")
