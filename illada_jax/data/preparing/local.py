"""Jobs on the cores of this machine."""

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import pathlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import tqdm

from illada_jax.data.preparing import jobs as shard_jobs
from illada_jax.data.preparing.jobs import ShardJob, TextJob, done_path

T = TypeVar("T")


def make_locally(jobs: Sequence[ShardJob], directory: pathlib.Path, drop_duplicates: bool, num_processes: int = 1,
                 progress: bool = True) -> None:
    """An engine (see `jobs.Engine`) of processes on this machine; 1 is this process. Shows bars on a terminal."""
    run = functools.partial(_run, num_processes=num_processes, progress=progress)
    if drop_duplicates:
        digests = list(run("looking for duplicates", TextJob.digests, jobs))
        _, first = np.unique(np.concatenate(digests), return_index=True)
        repeated = np.ones(sum(map(len, digests)), bool)
        repeated[first] = False
        per_job = np.split(repeated, np.cumsum(list(map(len, digests)))[:-1])
        jobs = [dataclasses.replace(job, duplicates=frozenset(np.flatnonzero(positions).tolist()))
                for job, positions in zip(jobs, per_job, strict=True)]
    missing = [job for job in jobs if not done_path(directory, job.index).exists()]
    for _ in run("tokenizing", functools.partial(shard_jobs.make_shard, directory), missing):
        pass


def _run(what: str, function: Callable[[ShardJob], T], jobs: Sequence[ShardJob], num_processes: int, progress: bool
         ) -> Iterator[T]:
    """Yields the function of every job, in order. The first error cancels the rest."""
    bar = functools.partial(tqdm.tqdm, desc=what, total=len(jobs), unit="shard", disable=None if progress else True)
    if num_processes == 1:
        yield from bar(map(function, jobs))
        return
    # Not forked: the parent may run threads (progress bar, gRPC) whose locks a fork would copy.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(num_processes, context, _die_with_parent) as pool:
        yield from bar(pool.map(function, jobs))


def _die_with_parent() -> None:
    """Ends this process when its parent is killed: the parent's next run repeats the work."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
