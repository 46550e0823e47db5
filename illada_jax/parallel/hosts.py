"""Several processes as one program: they start together, agree on values and end together.

Every function also works, at no cost, in a single process. JAX's coordination service watches the processes: if one
dies or is stopped, and so sends no heartbeat for HEARTBEAT_TIMEOUT_SECONDS, JAX aborts all others (SIGABRT).
"""

import itertools
import json
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epy
from jax.experimental import multihost_utils

from illada_jax.errors import InputError

with epy.lazy_imports():  # half a second, which one process does not need
    import orbax.checkpoint as ocp

T = TypeVar("T")

HEARTBEAT_TIMEOUT_SECONDS = 20
_BARRIER_TIMEOUT_MS = 24 * 3_600_000
_LEAVE_SECONDS = 15

_barriers = itertools.count()


def join(processes: str) -> None:
    """Joins the other processes of a run; call it before anything touches a device.

    If the others do not join within five minutes, JAX aborts this process (SIGABRT).

    Args:
      processes: empty for a single process, `auto` to ask the platform (TPU pods, GKE, SLURM), or
        `ADDRESS:PORT,NUM_PROCESSES,PROCESS_ID`.

    Raises:
      InputError: `processes` is malformed, or the platform cannot tell.
    """
    if not processes:
        return
    address, *numbers = processes.split(",")
    valid = (":" in address and len(numbers) == 2 and all(number.isdigit() for number in numbers)
             and int(numbers[1]) < int(numbers[0]))
    if processes != "auto" and not valid:
        raise InputError(f"--processes={processes}: must be auto, or ADDRESS:PORT,NUM_PROCESSES,PROCESS_ID, "
                         "where ids count from 0")
    try:
        jax.distributed.initialize(*([address, *map(int, numbers)] if valid else []),
                                   heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"--processes={processes}: {str(error).splitlines()[0]}") from error


def is_primary() -> bool:
    """True in the process that writes files and prints."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """The JSON values of all processes, by process number, on every process."""
    if jax.process_count() == 1:
        return [json.loads(json.dumps(value))]
    # Collectives may time out (Gloo connects within 30 s, multi-slice TPUs detect hangs), and one process may
    # prepare a corpus for hours while the others wait: they wait at a barrier of the coordination service.
    ocp.multihost.get_barrier_sync_fn()(key=f"illada_jax/gather/{next(_barriers)}", timeout_ms=_BARRIER_TIMEOUT_MS)
    text = json.dumps(value).encode()
    sizes_P = multihost_utils.process_allgather(np.array(len(text)))
    padded = np.frombuffer(text.ljust(int(sizes_P.max()), b" "), np.uint8)
    return [json.loads(row.tobytes()) for row in np.asarray(multihost_utils.process_allgather(padded))]


def run_on_all_hosts(work: Callable[[], T]) -> T:
    """Calls `work` on every process; an InputError of one process is raised on all, so that none waits for it.

    Raises:
      InputError: of this process, or of the first process that raised one.
    """
    result, own_error = None, None
    try:
        result = work()
    except InputError as error:
        own_error = error
    errors = gather(None if own_error is None else str(own_error))
    if own_error is not None:
        raise own_error
    for number, text in enumerate(errors):
        if text is not None:
            raise InputError(f"process {number}: {text}")
    return result


def broadcast_from_primary(work: Callable[[], Any]) -> Any:
    """Calls `work` on the primary process only; returns its JSON value on all.

    Raises:
      InputError: of the primary process.
    """
    return gather(run_on_all_hosts(lambda: work() if is_primary() else None))[0]


def check_same(name: str, value: Any) -> None:
    """Checks that a JSON value, which the message calls `name`, is the same on all processes.

    Raises:
      InputError: names the processes whose value differs from that of process 0.
    """
    values = gather(value)
    others = [number for number, other in enumerate(values) if other != values[0]]
    if others:
        raise InputError(f"process {', '.join(map(str, others))}: {name} differs from that of process 0")


def fetch(tree: Any) -> Any:
    """Global arrays as numpy arrays. Every process must call it for arrays that span several processes."""
    if all(x.is_fully_addressable for x in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def disconnect() -> None:
    """Leaves the other processes, as all do after a common error; those that do not follow are left behind."""
    if jax.distributed.is_initialized():
        leaving = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        leaving.start()
        leaving.join(_LEAVE_SECONDS)
