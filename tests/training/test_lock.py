"""One trainer per workdir: which owners block a second trainer, and what frees the lock."""

import errno
import fcntl
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest
from etils import epath

from illada_jax.errors import InputError
from illada_jax.training.lock import only_trainer

ROOT = pathlib.Path(__file__).parents[2]
OWNER = """
import sys, time
from etils import epath
from illada_jax.training.lock import only_trainer
with only_trainer(epath.Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path)


@pytest.fixture
def owner(workdir):
    """Another process that holds the lock of the workdir."""
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(workdir)], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"})
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()


def fail_to_lock(monkeypatch, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_living_or_stopped_owner_blocks_and_is_named_and_a_killed_one_does_not(workdir, owner):
    refusal = rf"process {owner.pid} on {socket.gethostname()} is training in this workdir; stop it, or use another"
    for number in (None, signal.SIGSTOP):
        if number:
            owner.send_signal(number)
        with pytest.raises(InputError, match=refusal), only_trainer(workdir):
            pass
    owner.kill()
    owner.wait()
    with only_trainer(workdir):
        assert (workdir / "trainer.lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


def test_the_lock_is_released_at_the_end_and_after_an_error(workdir):
    with only_trainer(workdir), pytest.raises(InputError, match=f"process {os.getpid()} on"), only_trainer(workdir):
        pass
    with pytest.raises(ZeroDivisionError), only_trainer(workdir):
        1 / 0  # noqa: B018
    with only_trainer(workdir):
        pass


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(workdir, monkeypatch, capsys, code):
    fail_to_lock(monkeypatch, code)
    with only_trainer(workdir):
        pass
    assert "trainer.lock: this file system has no locks" in capsys.readouterr().err


def test_a_failing_disk_is_an_error(workdir, monkeypatch):
    fail_to_lock(monkeypatch, errno.EIO)
    message = "trainer.lock: the file cannot be written: Input/output error"
    with pytest.raises(InputError, match=message), only_trainer(workdir):
        pass


def test_buckets_have_no_lock():
    with only_trainer(epath.Path("gs://bucket/run")), only_trainer(epath.Path("gs://bucket/run")):
        pass
