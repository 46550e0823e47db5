"""One trainer for a workdir: who is refused, who takes over, and what happens to the one that was taken over from."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from illada_jax.errors import InputError
from illada_jax.training import lease as lease_lib
from illada_jax.training.lease import Lease

GOOD_FOR = 0.8


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path)


@pytest.fixture
def acquired(workdir):
    """acquired() is a lease of the workdir that is held."""
    leases = []

    def acquired():
        lease = Lease(workdir, GOOD_FOR)
        lease.acquire()
        leases.append(lease)
        return lease

    yield acquired
    for lease in leases:
        lease.release()


def held(workdir):
    return json.loads((workdir / "trainer.json").read_text())


def write(workdir, **changes):
    """Writes what another trainer, on another machine, would have left."""
    content = {"owner": "other", "host": "elsewhere", "pid": 7, "machine": "elsewhere", "started": "1", "renewed": 3}
    (workdir / "trainer.json").write_text(json.dumps(content | changes))


def test_a_second_trainer_of_this_machine_is_refused_at_once(workdir, acquired, capsys):
    acquired()
    with pytest.raises(InputError, match=rf"process {os.getpid()} on .* trains in this workdir; stop it, or use an"):
        acquired()
    assert "waiting" not in capsys.readouterr().err, "it sees the process"
    assert held(workdir)["pid"] == os.getpid()


def test_it_is_given_back(workdir, acquired):
    acquired().release()
    assert not (workdir / "trainer.json").exists()
    acquired()


def test_that_of_a_process_that_is_gone_is_taken_at_once(workdir, acquired):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    mine = Lease(workdir)._mine
    for change in ({"pid": child.pid}, {"started": "12345"}):  # no such process; its number is another's now
        write(workdir, **(mine | {"owner": "other"} | change))
        started = time.monotonic()
        acquired().release()
        assert time.monotonic() - started < GOOD_FOR / 2


def test_that_of_another_machine_is_taken_when_it_was_not_renewed(workdir, acquired, capsys):
    write(workdir)
    started = time.monotonic()
    acquired()
    assert time.monotonic() - started >= GOOD_FOR
    assert held(workdir)["pid"] == os.getpid()
    assert "waiting up to 1 s to see whether process 7 on elsewhere still trains" in capsys.readouterr().err


def test_another_machine_that_still_trains_is_left_alone(workdir, acquired):
    write(workdir)
    renewal = threading.Timer(GOOD_FOR / 3, lambda: write(workdir, renewed=4))
    renewal.start()
    with pytest.raises(InputError, match="process 7 on elsewhere trains in this workdir"):
        acquired()
    renewal.join()
    assert held(workdir)["owner"] == "other"


@pytest.mark.parametrize("content", ["", '{"owner": "oth', "[]", '{"pid": 3}'])
def test_what_is_no_lease_does_not_stand_in_the_way(workdir, acquired, content):
    (workdir / "trainer.json").write_text(content)
    acquired()


def test_of_two_that_start_together_the_last_to_write_has_it(workdir, monkeypatch):
    monkeypatch.setattr(lease_lib.time, "sleep", lambda _: write(workdir))
    with pytest.raises(InputError, match="process 7 on elsewhere trains"):
        Lease(workdir, GOOD_FOR).acquire()
    assert held(workdir)["owner"] == "other"


def test_it_is_renewed_and_whoever_lost_it_stops(workdir, acquired, monkeypatch, capsys):
    left = []

    def leave(code):  # really the end of the process, here that of the thread
        left.append(code)
        threading.Event().wait()

    monkeypatch.setattr(lease_lib.hosts, "leave", leave)
    lease = acquired()
    first = held(workdir)["renewed"]
    time.sleep(GOOD_FOR)
    assert held(workdir)["renewed"] > first
    write(workdir)
    time.sleep(GOOD_FOR)
    assert left == [2] and "process 7 on elsewhere trains in this workdir" in capsys.readouterr().err
    lease.release()
    assert held(workdir)["owner"] == "other", "what is another's is not removed"
