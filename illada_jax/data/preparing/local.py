"""Jobs on the cores of this machine."""

import concurrent.futures
import functools
import multiprocessing
import os
import pathlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import tqdm

from illada_jax.data.preparing import jobs as shard_jobs
from illada_jax.data.preparing.jobs import ShardJob, TextJob, done_path

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class LocalEngine:
    """Processes on this machine; see jobs.Engine.

    Attributes:
      num_processes: number of processes; 1 works in this process.
      progress: show a bar on stderr.
    """

    num_processes: int = 1
    progress: bool = True

    def make(self, jobs: Sequence[ShardJob], directory: pathlib.Path, drop_duplicates: bool) -> None:
        """See jobs.Engine."""
        if drop_duplicates:
            jobs = self._without_duplicates(jobs)
        missing = [job for job in jobs if not done_path(directory, job.index).exists()]
        total = sum(job.num_bytes for job in jobs)
        with progress_bar(self.progress, total, "tokenizing") as bar:
            bar.update(total - sum(job.num_bytes for job in missing))
            if self.num_processes == 1:
                for job in missing:
                    shard_jobs.make_shard(directory, job, bar.update)
            else:
                make = functools.partial(shard_jobs.make_shard, directory)
                for job, _ in _in_processes(make, missing, self.num_processes):
                    bar.update(job.num_bytes)

    def _without_duplicates(self, jobs: Sequence[TextJob]) -> list[TextJob]:
        """Tells each job which of its documents repeat the text of an earlier one."""
        digests = {}
        with progress_bar(self.progress, sum(job.num_bytes for job in jobs), "looking for duplicates") as bar:
            for job, found in _in_processes(TextJob.digests, jobs, self.num_processes):
                digests[job.index] = found
                bar.update(job.num_bytes)
        in_order = [digests[job.index] for job in jobs]
        _, first = np.unique(np.concatenate(in_order), return_index=True)
        repeated = np.ones(sum(map(len, in_order)), bool)
        repeated[first] = False
        per_job = np.split(repeated, np.cumsum([len(found) for found in in_order])[:-1])
        return [job.without(np.flatnonzero(positions).tolist())
                for job, positions in zip(jobs, per_job, strict=True)]


def _in_processes(function: Callable[[S], T], jobs: Sequence[S], num_processes: int) -> Iterator[tuple[S, T]]:
    """Yields (job, function(job)) for every job, in order of completion. The first error cancels the rest."""
    if num_processes == 1:
        yield from ((job, function(job)) for job in jobs)
        return
    # Not forked: the parent may run threads (progress bar, gRPC) whose locks a fork would copy.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(num_processes, context, _die_with_parent) as pool:
        futures = {pool.submit(function, job): job for job in jobs}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _die_with_parent() -> None:
    """Ends this process when its parent dies; the parent's next run repeats the work."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def progress_bar(shown: bool, total: int, what: str) -> tqdm.tqdm:
    """A bar in bytes, on stderr, shown on terminals only."""
    quiet = None if shown else True
    return tqdm.tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=quiet, file=sys.stderr)
