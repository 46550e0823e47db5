"""The interval between checkpoints: the steps that an interruption costs against the time that saving takes.

Saving is asynchronous. The loop waits while a device copies its state to its host (`copy`), then the hosts write it
(`write`); a checkpoint counts once it is whole, and the next save waits for it. On spot hardware a step of a large
model takes longer than the notice, so an interruption costs all steps since the newest whole checkpoint. The interval
with the least loss is that of J. W. Young, A first order approximation to the optimum checkpoint interval, CACM 17 (9),
1974.
"""

import math
from typing import Any

from illada_jax.planning.chips import Topology

# Assumptions: bytes per second from a device to its host, and seconds from an interruption until steps are taken again.
HOST_BANDWIDTH = 8e9
RESTART_SECONDS = 600.0


def steps_lost(every: int, step: float, write: float) -> float:
    """Steps that an interruption costs on average: half an interval, and those taken while a checkpoint is written."""
    return every / 2 + write / step


def share_blocked(every: int, step: float, copy: float, write: float) -> float:
    """Share of the time in which the loop waits for saving: each copy, and what is left of the write before it."""
    blocked = copy + max(write - every * step, 0.0)
    return blocked / (every * step + blocked)


def best_every(step: float, copy: float, write: float, between: float) -> int:
    """Steps between checkpoints that lose the least with an interruption every `between` seconds."""
    return max(round(math.sqrt(2 * copy * between) / step), math.ceil(write / step), 1)


def saving_figures(every: int, step: float, state_bytes: float, topology: Topology, preemption_hours: float,
                   save_bandwidth: float) -> dict[str, Any]:
    """Figures of saving every `every` steps. Times in seconds, `state_bytes` on a device, bandwidth of one host."""
    devices = len(topology.devices) / len({device.process_index for device in topology.devices})
    copy, write = state_bytes / HOST_BANDWIDTH, state_bytes * devices / save_bandwidth
    between = preemption_hours * 3600

    def of(every: int) -> dict[str, float]:
        lost, blocked = steps_lost(every, step, write), share_blocked(every, step, copy, write)
        restarting = (lost * step + RESTART_SECONDS) / between
        return {"every": every, "steps_lost": lost, "share_blocked": blocked,
                "share_lost": min(blocked + restarting, 1.0)}

    return {"copy_seconds": copy, "write_seconds": write, "preemption_hours": preemption_hours, "configured": of(every),
            "best": of(best_every(step, copy, write, between))}
