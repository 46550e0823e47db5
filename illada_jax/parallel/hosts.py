"""Several processes as one program: how they start, agree, and tell who of them hangs or is gone.

Everything here also works, and costs nothing, where there is one process.
"""

import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax._src import distributed  # the key-value store of jax.distributed has no public name
from jax.experimental import multihost_utils

from illada_jax.errors import InputError

T = TypeVar("T")

_gathered = itertools.count()
_PATIENCE_MS = 24 * 3_600_000  # should one be gone, jax.distributed says so much earlier
_PULSES = "illada_jax/pulses"
PULSE_SECONDS = 1.0
_SILENT_AFTER = 4 * PULSE_SECONDS


class HostLost(RuntimeError):
    """Another process of the run is gone or hangs: this one cannot go on, a restart of all can."""


def join(how: str) -> None:
    """Joins the processes of a run, before any device is touched.

    Args:
      how: empty for a single process, `auto` where the platform knows (TPU pods, GKE, SLURM), or
        `ADDRESS:PORT,PROCESSES,NUMBER_OF_THIS_ONE`.

    Raises:
      InputError: `how` is nothing of that kind, or the others cannot be found.
    """
    if not how:
        return
    address, *numbers = how.split(",")
    wrong = len(numbers) != 2 or not all(number.isdigit() for number in numbers) or int(numbers[1]) >= int(numbers[0])
    if how != "auto" and (wrong or ":" not in address):
        raise InputError(f"--processes={how}: must be auto, or ADDRESS:PORT,PROCESSES,NUMBER_OF_THIS_ONE (from 0)")
    try:
        jax.distributed.initialize(*([] if how == "auto" else [address, *map(int, numbers)]))
    except (ValueError, RuntimeError) as error:
        raise InputError(f"--processes={how}: {str(error).splitlines()[0]}") from error


def is_primary() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """A value, as JSON has it, of every process, on every process, by process number."""
    if jax.process_count() == 1:
        return [json.loads(json.dumps(value))]
    # Collectives give up on those that are late, and one may have to prepare what others find ready.
    distributed.global_state.client.wait_at_barrier(f"illada_jax/gather/{next(_gathered)}", _PATIENCE_MS)
    text = json.dumps(value).encode()
    sizes_P = multihost_utils.process_allgather(np.array(len(text)))
    padded = np.frombuffer(text.ljust(int(sizes_P.max()), b" "), np.uint8)
    return [json.loads(row.tobytes()) for row in np.asarray(multihost_utils.process_allgather(padded))]


def run_on_all_hosts(work: Callable[[], T]) -> T:
    """Does the same on all processes; what one of them finds wrong is the error of all, so that none waits for it.

    Raises:
      InputError: of this process, or of the first that has one.
    """
    result, mine = None, None
    try:
        result = work()
    except InputError as error:
        mine = error
    errors = gather(None if mine is None else str(mine))
    if mine is not None:
        raise mine
    for number, text in enumerate(errors):
        if text is not None:
            raise InputError(f"process {number}: {text}")
    return result


def broadcast_from_primary(work: Callable[[], Any]) -> Any:
    """What `work` returns on the first process, as JSON has it, on all; the others do not call it.

    Raises:
      InputError: of the first process.
    """
    return gather(run_on_all_hosts(lambda: work() if is_primary() else None))[0]


def check_same(what: str, value: Any) -> None:
    """Raises InputError, which names the processes, where `value` is not the same on all of them."""
    values = gather(value)
    others = [number for number, other in enumerate(values) if other != values[0]]
    if others:
        raise InputError(f"process {', '.join(map(str, others))}: {what} differs from that of process 0")


def fetch(tree: Any) -> Any:
    """Arrays as numpy arrays, also those that lie over the devices of several processes: then all of them must ask."""
    if all(x.is_fully_addressable for x in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


class Pulse(NamedTuple):
    """What a process last said of itself.

    Attributes:
      count: of the pulses; one that stands still is a process that does.
      host: name of its machine.
      phase: what it is doing.
      step: at which step.
      since: seconds for which it has been doing that.
    """

    count: int
    host: str
    phase: str
    step: int
    since: float

    def __str__(self) -> str:
        return f"on {self.host}, in {self.phase} of step {self.step:,} for {self.since:.0f} s"


def send_pulse(count: int, phase: str, step: int, since: float) -> None:
    """Tells the other processes what this one is doing."""
    client = distributed.global_state.client
    if client is not None:
        pulse = Pulse(count, socket.gethostname(), phase, step, since)
        client.key_value_set(f"{_PULSES}/{jax.process_index()}", json.dumps(pulse), allow_overwrite=True)


def stragglers() -> dict[int, str]:
    """The processes that hold up the others, with what is known of them; takes some seconds.

    They are those whose pulse stands still (stopped, or gone) or, where all are alive, those that are not where most
    of the waiting ones are: in another phase, or at an earlier step.
    """
    client, count = distributed.global_state.client, jax.process_count()
    if client is None or count == 1:
        return {}
    try:
        before = _pulses(client)
        time.sleep(_SILENT_AFTER)
        after = _pulses(client)
    except jax.errors.JaxRuntimeError:  # the store lives in process 0
        return {0: "does not answer"}
    silent = {}
    for number in range(count):
        if number not in after:
            silent[number] = "has not been heard of"
        elif number in before and before[number].count == after[number].count:
            silent[number] = f"is silent; it was {after[number]}"
    if silent:
        return silent
    places = {number: (pulse.step, pulse.phase) for number, pulse in after.items()}
    usual = max(set(places.values()), key=lambda place: (list(places.values()).count(place), place))
    return {number: f"is alive {after[number]}, the others are in {usual[1]} of step {usual[0]:,}"
            for number, place in places.items() if place != usual}


def first_is_gone(over: threading.Event) -> bool:
    """Waits until process 0, whose store all need, has ended without `over` being set: then it returns True.

    jax.distributed aborts some moments later, with a trace of the stack and not a word of what to do. An open
    connection tells at once; should the host vanish from the network, that abort is what remains.
    """
    host, port = distributed.global_state.coordinator_address.rsplit(":", 1)
    while not over.is_set():
        try:
            with socket.create_connection((host, int(port))) as connection:
                while connection.recv(1024):  # a greeting; the server ends connections that do not answer it
                    pass
        except ConnectionRefusedError:
            return not over.is_set()
        except ConnectionError:  # cut off, as a process is that was killed: the next attempt will tell, and soon
            over.wait(0.02)
        except OSError:
            over.wait(PULSE_SECONDS)
    return False


def _pulses(client: Any) -> dict[int, Pulse]:
    return {int(key.rsplit("/", 1)[1]): Pulse(*json.loads(text)) for key, text in client.key_value_dir_get(_PULSES)}


def name_lost(error: Exception, saved: str) -> HostLost:
    """The error to stop with when a collective has failed: names who is gone, and says what to do.

    Raises:
      Exception: `error` itself, where all the others are alive: then it has another cause.
    """
    gone = {number: text for number, text in stragglers().items() if "alive" not in text}
    if not gone:
        raise error
    return HostLost(f"{describe(gone)}; {saved}; start the same command on all hosts to go on")


def describe(found: dict[int, str]) -> str:
    """Suspects as text."""
    return "; ".join(f"process {number} of {jax.process_count()} {text}" for number, text in found.items())


def hard_exit(code: int) -> None:
    """Ends this process at once: its exit would wait for those that are gone. The first process goes last."""
    if is_primary():  # the others lose their store with it, and would not get to tell what they know
        time.sleep(_SILENT_AFTER / 2)
    os._exit(code)
