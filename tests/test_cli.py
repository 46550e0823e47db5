"""Commands behave as shells expect: help, version, exit codes, closed pipes, no hints outside terminals."""

import json
import os
import pathlib
import pydoc
import re
import signal
import subprocess
import sys

import pytest

import illada_jax
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
ROOT = pathlib.Path(__file__).parent.parent
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
        "error: --config=experiments/quikstart.py: no such file; did you mean experiments/quickstart.py?\n")


CONFIG = "from illada_jax import config\n\ndef get_config():\n    c = config.defaults()\n    {}\n    return c\n"
SFT = "c.data.update(sources=('tasks:reverse:50',), tokenizer='bytes'); c.sft.format = 'llada'; c.train.steps = 0; "
SFT += "c.train.epochs = 3; c.eval.every_epochs = 1.0; c.optimizer.warmup_steps = 50"
MISTAKES = [  # (line of the config, overrides, parts of the message)
    ("c.log.every = 1", [], ["c.py, line 5, c.log.every = 1: config.log: unknown key; known here: checkpoint, data"]),
    ("c.trian.steps = 4", [], ["c.py, line 5", "config.trian: unknown key; did you mean config.train?"]),
    ("c.train.stepz = 4", [], ["c.py, line 5", "config.train.stepz: unknown key; did you mean config.train.steps?"]),
    ("c.train.update(stepz=4)", [], ["c.py, line 5", "did you mean config.train.steps?"]),
    ("c.train.warmup_steps = 4", [], ["did you mean config.optimizer.warmup_steps?"]),
    ("c.data.batch_size = '4'", [], ["c.py, line 5", "config.data.batch_size = '4': must be of type int"]),
    ("c.data.batch_size = -4", [], ["c.py", "config.data.batch_size = -4: must be greater than 0"]),
    ("c.model = 4", [], ["config.model = 4: must be a section"]),
    ("c.train.steps = 1 / 0", [], ["c.py, line 5, c.train.steps = 1 / 0: ZeroDivisionError: division by zero"]),
    ("c.train.steps = n", [], ["c.py, line 5", "NameError: name 'n' is not defined"]),
    ("return", [], ["c.py: get_config() must return"]),
    ("pass", ["--config.trian.steps=4"], ["--config.trian.steps=4: config.trian: unknown key; did you mean"]),
    ("pass", ["--config.train.stepz=4"], ["--config.train.stepz=4: ", "did you mean config.train.steps?"]),
    ("pass", ["--config.train.steps=many"], ["--config.train.steps=many"]),
    ("pass", ["--config.train=4"], ["config.train"]),
    ("pass", ["--config.model.num_layers=3", "--config.model.scan_unroll=2"], ["--config.model.scan_unroll=0"]),
    ("pass", ["--config.data.length=300"], ["--config.model.max_length=300"]),
    ("pass", ["--config.train.log_every=1000"], ["--config.train.plateau_window=20000"]),
    ("pass", ["--config.model.d_model=130"], ["config.model.d_model = 130", "--config.model.d_model=128"]),
    ("pass", ["--config.train.epochs=3"], ["config.train.epochs = 3", "--config.train.steps=1000"]),
]


def test_mistakes_in_a_config_say_where_and_what(tmp_path):
    """One line with file or override, full key, value, and the nearest key or a flag that helps."""
    commands = []
    for number, (line, overrides, _) in enumerate(MISTAKES):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "c.py").write_text(CONFIG.format(line))
        commands.append([f"--config={number}/c.py", "--dry_run", *overrides])
    (tmp_path / "sft.py").write_text(CONFIG.format(SFT))
    commands += [["--config=experiments/quickstart.py"], ["--config=sft.py", "--dry_run", "--config.train.steps=7"],
                 ["--config=sft.py", "--dry_run", "--config.train.epochs=2"]]
    driver = subprocess.run([sys.executable, "-m", "tests.run_commands"], input=json.dumps([
        {"argv": ["python", "-m", "illada_jax.main", *command], "stdin": ""} for command in commands]),
        capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)})
    assert driver.returncode == 0, driver.stderr
    *results, elsewhere, steps, epochs = json.loads(driver.stdout)
    for (line, overrides, parts), result in zip(MISTAKES, results, strict=True):
        (text,) = (each for each in result["stderr"].splitlines() if "WARNING" not in each and "] " not in each)
        assert result["code"] == 2 and text.startswith("error: "), (line, overrides, result)
        assert all(part in text for part in parts) and "\\n" not in text and "\\'" not in text, (line, overrides, text)
    assert f"did you mean {ROOT}/experiments/quickstart.py?" in elsewhere["stderr"]
    assert steps["code"] == 0 and re.search("^steps +7 = .*scaled by 0.14: warm-up 7, decay 0", steps["stdout"], re.M)
    assert epochs["code"] == 0 and "scaled by" in epochs["stdout"], epochs


def test_ctrl_c_while_a_command_starts_is_one_line(tmp_path):
    (tmp_path / "absl").mkdir()
    (tmp_path / "absl" / "__init__.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\n"
                                                   "time.sleep(60)\n")
    for module in ("illada_jax", "illada_jax.generate"):
        done = subprocess.run([sys.executable, "-m", module, "generate"], capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}, timeout=60,
                              preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_the_package_shows_its_interface():
    assert {"load", "LanguageModel", "__version__"} <= set(dir(illada_jax))
    shown = pydoc.render_doc(illada_jax, renderer=pydoc.plaintext)
    assert re.search(r"\bload\(\s*path: str", shown)  # Python 3.13 breaks long signatures into lines


def test_compiled_programs_are_kept(tmp_path):
    code = "from illada_jax import cli; cli.use_compilation_cache(); import jax; jax.jit(lambda x: x + 1)(1.0)"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
                          env={**environment, "XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu",
                               "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "illada_jax" / "compiled").glob("jit_*"))
