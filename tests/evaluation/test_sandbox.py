"""Programs that misbehave: none of them hangs, fills or reaches anything, and none passes."""

import os
import pathlib
import textwrap
import time

import pytest

from illada_jax.errors import InputError
from illada_jax.evaluation import sandbox

try:
    sandbox.check_supported()
except InputError as error:
    pytest.skip(str(error), allow_module_level=True)


def run(program, **limits):
    return sandbox.run(textwrap.dedent(program), **limits)


def test_good_and_bad_programs():
    assert run("import math, re, collections\nassert math.comb(4, 2) == 6") == (True, "passed")
    assert run("assert 1 == 2, 'no'") == (False, "AssertionError: no")
    assert run("def f(:\n") [1].startswith("SyntaxError")
    assert run("print('x' * 10_000_000)").passed
    assert run("def f(n): return f(n)\nf(1)")[1].startswith("RecursionError")


@pytest.mark.parametrize("program", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit",
                                     "raise KeyboardInterrupt", "quit()"])
def test_leaving_early_is_not_passing(program):
    assert not run(program + "\nassert False").passed


@pytest.mark.parametrize("program", [
    "while True: pass",
    "import time\ntime.sleep(60)",
    "import signal\nfor s in {*range(1, 32)} - {9, 19}: signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    "import os\nfor fd in range(3, 64):\n    try: os.close(fd)\n    except OSError: pass\nwhile True: pass",
], ids=["loop", "sleep", "ignores signals", "closes the pipe"])
def test_endless(program):
    start = time.monotonic()
    assert not run(program, seconds=0.5).passed
    assert time.monotonic() - start < 30


def test_fork_bomb_and_threads():
    refused = "import os, threading\n"
    assert run(refused + "while True: os.fork()")[1].startswith("PermissionError")
    assert not run(refused + "threading.Thread(target=print).start()").passed
    assert not run("import subprocess; subprocess.run(['true'])").passed
    assert not run("import os; os.execv('/bin/true', ['true'])").passed


def test_memory():
    assert run("x = bytearray(2 << 30)", megabytes=512)[1].startswith("MemoryError")
    assert not run("x = []\nwhile True: x.append(bytearray(1 << 20))", megabytes=256).passed


def test_disk(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("kept")
    assert run("open('big', 'wb').write(b'x' * 100)")[1].startswith("PermissionError")
    for attempt in ("open(P, 'w')", "open(P, 'r+')", "open(P, 'a')", "os.remove(P)", "os.rename(P, P + '2')",
                    "os.truncate(P, 0)", "os.chmod(P, 0)", "os.mkdir(P + '3')", "os.symlink(P, P + '4')",
                    "os.link(P, P + '5')", "os.mkfifo(P + '6')", "os.memfd_create('x')",
                    "os.utime(P)", "os.setxattr(P, 'user.x', b'1')"):
        outcome = run(f"import os\nP = {str(victim)!r}\n{attempt}")
        assert not outcome.passed and "Error" in outcome.reason, (attempt, outcome)
    assert victim.read_text() == "kept" and os.listdir(tmp_path) == ["victim"]
    assert run(f"assert open({str(victim)!r}).read() == 'kept'").passed


def test_network_and_signals():
    assert run("import socket\nsocket.socket()")[1].startswith("PermissionError")
    assert run("import os\nos.kill(os.getppid(), 9)")[1].startswith("PermissionError")
    assert run("import os\nos.kill(-1, 9)")[1].startswith("PermissionError")
    assert not run("import ctypes\nassert ctypes.CDLL(None).socket(2, 1, 0) >= 0").passed


def test_limits_cannot_be_raised():
    assert not run("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))").passed


def test_nothing_is_left_behind():
    def children():
        return {path.name for path in pathlib.Path("/proc").glob("[0-9]*")
                if f"PPid:\t{os.getpid()}\n" in (path / "status").read_text(errors="ignore")}

    before = children()
    run("while True: pass", seconds=0.2)
    assert children() <= before


def test_code_eval_and_pass_at_k():
    add = "def add(a, b): return a {} b"
    scores, outcomes = sandbox.SandboxedCodeEval().compute(
        references=["assert add(2, 3) == 5", "assert add(1, 1) == 0"],
        predictions=[[add.format("+"), add.format("*")], [add.format("-"), add.format("-")]], k=[1, 2, 3])
    assert scores == {"pass@1": 0.75, "pass@2": 1.0}
    assert [outcome.passed for outcome in outcomes[0]] == [True, False]
    assert sandbox.pass_at_k(5, 2, 3) == pytest.approx(1 - 1 / 10)  # of the ten triples one has none of the two
