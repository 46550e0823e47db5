"""Hostile programs: none of them hangs, exhausts, reads or reaches anything outside the sandbox, and none passes."""

import contextlib
import functools
import os
import pathlib
import secrets
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest

from illada_jax.errors import InputError
from illada_jax.evaluation import code_execution

NAMED = "import ctypes\nctypes.CDLL(None).prctl(15, b'{}')\n"  # the name of a process in /proc/PID/comm


@functools.cache
def why_not() -> str:
    try:
        code_execution.check_supported()
    except InputError as error:
        return str(error)
    return ""


@pytest.fixture
def run():
    """Runs a program in the sandbox."""
    if why_not():
        pytest.skip(why_not())
    return lambda program, **limits: code_execution.run(textwrap.dedent(program), **limits)


def states(name: str) -> list[str]:
    """States of the processes of that name: R, S, Z and so on."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            lines = path.read_text().splitlines()
            found += [line.split()[1] for line in lines if line.startswith("State:") and f"Name:\t{name}" in lines]
    return found


def wait_until(condition, seconds):
    """Fails if the condition stays False."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_good_and_bad_programs(run):
    assert run("import math, re, collections\nassert math.comb(4, 2) == 6") == (True, "passed")
    assert run("assert 1 == 2, 'no'") == (False, "AssertionError: no")
    assert run("def f(:\n")[1].startswith("SyntaxError")
    assert run("print('x' * 10_000_000)").passed
    assert run("def f(n): return f(n)\nf(1)")[1].startswith("RecursionError")
    assert run("open('file', 'w').write('text')\nassert open('/tmp/file').read() == 'text'").passed
    assert run("import subprocess, threading\nthreading.Thread(target=print).start()\n"
               "assert subprocess.run(['echo', 'x'], capture_output=True).stdout == b'x\\n'").passed
    assert run(f"'{'x' * 1_000_000}'").passed
    assert run("import __main__\nassert __main__.__dict__ is globals()").passed


@pytest.mark.parametrize("program", [
    "import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "raise KeyboardInterrupt", "quit()",
    "import os\nif os.fork(): os._exit(0)",
    "print('\\npassed', flush=True); raise SystemExit",
    "import os\nfor fd in range(64):\n    try: os.write(fd, b'\\npassed')\n    except OSError: pass\nos._exit(0)",
    "import os\nos.write = lambda *_: 0\nassert False",
    "import os, sys, builtins\nos._exit = sys.exit = builtins.exit = lambda *_: None\nassert False",
    "import atexit\natexit.register(print, 'passed')\nassert False",
])
def test_only_a_program_that_ran_to_its_end_passes(run, program):
    assert not run(program).passed


@pytest.mark.parametrize("program", [
    "while True: pass",
    "import time\ntime.sleep(60)",
    "import signal\nfor s in {*range(1, 32)} - {9, 19}: signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    "import os\nos.closerange(0, 64)\nwhile True: pass",
    "while True: print('x' * 10_000)",
    "import os\nwhile True:\n  for fd in range(64):\n    try: os.write(fd, b'x' * 10_000)\n    except OSError: pass",
    "import os\nos.setsid() if os.fork() else None\nwhile True: pass",
], ids=["loop", "sleep", "ignores signals", "closes files", "prints", "writes to all files", "leaves the session"])
def test_endless(run, program):
    name = secrets.token_hex(6)
    start = time.monotonic()
    assert not run(NAMED.format(name) + program, seconds=0.5).passed
    assert time.monotonic() - start < 30
    wait_until(lambda: not states(name), 5)


def test_processes_are_limited_and_none_is_left(run):
    name = NAMED.format(bomb := secrets.token_hex(6))
    assert run(f"{name}import os\nwhile True: os.fork()")[1].startswith("BlockingIOError")
    threads = "import threading, time\nfor _ in range(100): threading.Thread(target=time.sleep, args=(9,)).start()"
    assert run(threads)[1].startswith("RuntimeError")
    wait_until(lambda: not states(bomb), 5)
    # Zombies, and a process that outlives the program.
    name = NAMED.format(orphan := secrets.token_hex(6))
    assert run(f"{name}import os\nfor _ in range(9): os.fork() or os._exit(0)").passed
    assert run(f"{name}import os, time\nif not os.fork():\n    os.setsid()\n    os.fork()\n    time.sleep(60)").passed
    wait_until(lambda: not states(orphan), 5)


def test_nothing_outlives_a_killed_evaluator(run, tmp_path):
    name = secrets.token_hex(6)
    program = f"{NAMED.format(name)}import time\ntime.sleep(60)"
    command = f"from illada_jax.evaluation import code_execution\ncode_execution.run({program!r}, seconds=60)"
    evaluator = subprocess.Popen([sys.executable, "-c", command])
    wait_until(lambda: states(name), 60)
    evaluator.send_signal(signal.SIGKILL)
    evaluator.wait()
    # A zombie may remain: whether orphans are reaped is up to the system.
    wait_until(lambda: set(states(name)) <= {"Z"}, 5)


def test_memory(run):
    assert run("x = bytearray(2 << 30)", megabytes=512)[1].startswith("MemoryError")
    assert run("x = []\nwhile True: x.append(bytearray(1 << 20))", megabytes=256)[1].startswith("MemoryError")
    assert run("x = [bytearray(1 << 20) for _ in range(100)]", megabytes=256).passed
    for limit in ("AS", "NPROC", "FSIZE", "CPU"):
        assert not run(f"import resource as r\nr.setrlimit(r.RLIMIT_{limit}, (-1, -1))").passed


def test_disk(run):
    assert "File too large" in run("open('big', 'wb').write(bytes(32 << 20))")[1]
    assert "No space left" in run("for n in range(99): open(str(n), 'wb').write(bytes(8 << 20))")[1]
    assert run("open('left', 'w').write('x')").passed
    assert run("import os\nassert not os.path.exists('/tmp/left')").passed
    for directory in ("/", "/dev", "/dev/shm", "/usr", "/etc", "/proc", str(pathlib.Path(sys.prefix))):
        outcome = run(f"open('{directory}/victim', 'w')")
        assert outcome[1].startswith(("OSError", "PermissionError", "FileNotFoundError")), (directory, outcome)


def test_files_outside_are_neither_seen_nor_changed(run, tmp_path):
    (tmp_path / "secret").write_text("kept")
    for path in (tmp_path, "/etc/shadow", "/etc/passwd", pathlib.Path.home() / ".bashrc", "/sys", "/var", "/home",
                 pathlib.Path(code_execution.__file__)):
        assert run(f"open({str(path)!r})")[1].startswith("FileNotFoundError"), path
    assert run("""
        for line in open("/proc/self/mounts"):
            _, target, kind, options, *_ = line.split()
            assert options.startswith("ro,") or target.startswith(("/proc", "/dev/")) or target == "/tmp", line
        """) == (True, "passed")
    # 0x40086602 is FS_IOC_SETFLAGS. Nothing of the system or of this Python may change.
    attempts = ("open(P, 'r+')", "os.remove(P)", "os.rename(P, P + '2')", "os.truncate(P, 0)", "os.chmod(P, 0)",
                "os.utime(P)", "os.link(P, '/tmp/link')", "os.setxattr(P, 'user.x', b'1')",
                "fcntl.ioctl(os.open(P, 0), 0x40086602, b'\\x20' + bytes(7))")
    for path in (os.__file__, "/usr/bin/env"):
        assert run(f"""
import fcntl, os
P = {path!r}
for attempt in {attempts!r}:
    try:
        exec(attempt)
    except OSError:
        continue
    assert False, attempt
""") == (True, "passed")


def test_the_evaluator_is_out_of_reach(run, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "1234")
    assert run("import os\nassert set(os.environ) <= {'HOME', 'PATH', 'OPENBLAS_NUM_THREADS', 'PWD', 'LC_CTYPE'}, "
               "set(os.environ)") == (True, "passed")
    assert run("import os\nassert [p for p in os.listdir('/proc') if p.isdigit()] == ['1', '2']").passed
    assert run("import os\nassert os.getppid() == 1").passed
    assert run(f"import os\nos.kill({os.getpid()}, 9)")[1].startswith("ProcessLookupError")
    run("import os\nos.kill(-1, 9)\nos.kill(1, 9)")
    # F_SETSIG (10) and F_SETOWN (8) make the kernel signal a process when something happens to a pipe.
    for owner in (os.getpid(), -os.getpgrp(), 1):
        run(f"""
            import fcntl, os
            for fd in range(64):
                try:
                    fcntl.fcntl(fd, 10, 9)
                    fcntl.fcntl(fd, 8, {owner})
                    fcntl.fcntl(fd, fcntl.F_SETFL, os.O_ASYNC | fcntl.fcntl(fd, fcntl.F_GETFL))
                    os.write(fd, b"x")
                except OSError:
                    pass
            """)


def test_network(run):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}))")[1].startswith("ConnectionRefused")
    assert run("import socket\nsocket.create_connection(('192.0.2.1', 80), timeout=1)")[1].startswith("OSError")


@pytest.mark.parametrize("bwrap, message", [
    (None, "bubblewrap is not installed; install it .apt-get install bubblewrap., or run programs without isolation: "
           "--allow_code_execution=unsafe"),
    ("/bin/false", "the sandbox did not start .no message.; it needs bubblewrap 0.7 or later, and user namespaces"),
])
def test_an_unsupported_system_is_an_error(monkeypatch, bwrap, message):
    monkeypatch.setattr(code_execution.shutil, "which", lambda name: bwrap)
    with pytest.raises(InputError, match=message):
        code_execution.check_supported()


def test_code_eval_and_pass_at_k(run):
    add = "def add(a, b): return a {} b"
    scores, outcomes = code_execution.SandboxedCodeEval().compute(
        references=["assert add(2, 3) == 5", "assert add(1, 1) == 0"],
        predictions=[[add.format("+"), add.format("*")], [add.format("-"), add.format("-")]], k=[1, 2, 3])
    assert scores == {"pass@1": 0.75, "pass@2": 1.0}
    assert [outcome.passed for outcome in outcomes[0]] == [True, False]
    assert code_execution.pass_at_k(5, 2, 3) == pytest.approx(1 - 1 / 10)  # of the ten triples one has none of the two
