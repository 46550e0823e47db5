"""Tasks: the shards of a preparation, each made from its own parts, in any order, by any process.

`LocalEngine` makes them on the cores of this machine, `data/preparing/beam.py` on Apache Beam; both call the same functions here.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import pathlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import tqdm

from illada_jax.data import shards
from illada_jax.data.shards import ShardInfo, ShardWriter
from illada_jax.data.sources.registry import Document, Part
from illada_jax.data.tokenizers import Tokenizer, load_tokenizer

DONE_DIRECTORY = "done"
S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class ShardJob:
    """One shard of each split: what a process needs to make it.

    Attributes:
      index: number of the shard.
      parts: what is read.
      split_below: documents whose split hash is below are held out.
      dropped: positions, among the documents of these parts, of duplicates; they are left out.
    """

    index: int
    parts: tuple[Part, ...]
    split_below: int
    dropped: frozenset[int] = frozenset()

    @property
    def num_bytes(self) -> int:
        """About how much text there is."""
        return sum(part.num_bytes for part in self.parts)

    def documents(self) -> Iterator[Document]:
        """The documents that are kept. Empty ones are not."""
        everything = (document for part in self.parts for document in part.read())
        for n, document in enumerate(everything):
            if document.text and n not in self.dropped:
                yield document

    def without(self, positions: Iterable[int]) -> "ShardJob":
        """The job with documents left out."""
        return dataclasses.replace(self, dropped=frozenset(positions))

    def split_of(self, document: Document) -> str:
        """`heldout` or `train`."""
        return "heldout" if document.split_hash < self.split_below else "train"


def group_parts(parts: Iterable[Part], shard_bytes: int) -> list[tuple[Part, ...]]:
    """Puts consecutive parts together until they hold enough for a shard."""
    groups: list[list[Part]] = [[]]
    size = 0
    for part in parts:
        if groups[-1] and size + part.num_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += part.num_bytes
    return [tuple(group) for group in groups]


def make_shard(job: ShardJob, directory: pathlib.Path, tokenizer: Tokenizer,
               advance: Callable[[int], object] = lambda num_bytes: None) -> None:
    """Makes the shard of a job, of either split, and notes that it is done.

    Args:
      job: what to read.
      directory: the target.
      tokenizer: what makes ids of text.
      advance: told the bytes of every document.
    """
    writers = {split: ShardWriter(directory / f"{split}-{job.index:06d}.array_record", tokenizer)
               for split in shards.SPLITS}
    for document in job.documents():
        num_bytes = len(document.text.encode())
        writers[job.split_of(document)].add(tokenizer.encode(document.text), num_bytes)
        advance(num_bytes)
    infos = {split: writer.close() for split, writer in writers.items()}
    done = {split: dataclasses.asdict(info) for split, info in infos.items() if info is not None}
    shards.write_atomically(done_path(directory, job.index), json.dumps(done).encode())


def make_shard_in(directory: pathlib.Path, job: ShardJob) -> None:
    """`make_shard` for a process that has nothing but the directory."""
    make_shard(job, directory, load_tokenizer(directory / shards.TOKENIZER_DIRECTORY))


def document_digests(job: ShardJob) -> np.ndarray:
    """A hash (V16) of every document of a job, in order."""
    found = [hashlib.blake2b(document.text.encode(), digest_size=16).digest()
             for part in job.parts for document in part.read()]
    return np.array(found, "V16")


def done_path(directory: pathlib.Path, index: int) -> pathlib.Path:
    """Where it is noted that a job is done, and what it made."""
    return directory / DONE_DIRECTORY / f"{index:06d}.json"


def collect(directory: pathlib.Path, jobs: Sequence[ShardJob]) -> dict[str, tuple[ShardInfo, ...]]:
    """The shards of every split, in the order of the jobs, all of which are done."""
    done = [json.loads(done_path(directory, job.index).read_bytes()) for job in jobs]
    return {split: tuple(ShardInfo(**infos[split]) for infos in done if split in infos) for split in shards.SPLITS}


class Engine(Protocol):
    """What makes shards. Whatever engine is taken, the shards are the same, byte for byte."""

    def make(self, jobs: Sequence[ShardJob], directory: pathlib.Path, drop_duplicates: bool) -> None:
        """Makes the shards that are not done yet, into a directory that holds the tokenizer already."""


@dataclass(frozen=True)
class LocalEngine:
    """Processes on this machine.

    Attributes:
      num_processes: how many.
      progress: show a bar on stderr.
    """

    num_processes: int = 1
    progress: bool = True

    def make(self, jobs: Sequence[ShardJob], directory: pathlib.Path, drop_duplicates: bool) -> None:
        """See Engine."""
        if drop_duplicates:
            jobs = self._without_duplicates(jobs)
        missing = [job for job in jobs if not done_path(directory, job.index).exists()]
        total = sum(job.num_bytes for job in jobs)
        with progress_bar(self.progress, total, "tokenizing") as bar:
            bar.update(total - sum(job.num_bytes for job in missing))
            if self.num_processes == 1:
                tokenizer = load_tokenizer(directory / shards.TOKENIZER_DIRECTORY)
                for job in missing:
                    make_shard(job, directory, tokenizer, bar.update)
            else:
                make = functools.partial(make_shard_in, directory)
                for job, _ in in_processes(make, missing, self.num_processes):
                    bar.update(job.num_bytes)

    def _without_duplicates(self, jobs: Sequence[ShardJob]) -> list[ShardJob]:
        """Tells each job which of its documents stood in an earlier place already."""
        digests = {}
        with progress_bar(self.progress, sum(job.num_bytes for job in jobs), "looking for duplicates") as bar:
            for job, found in in_processes(document_digests, jobs, self.num_processes):
                digests[job.index] = found
                bar.update(job.num_bytes)
        in_order = [digests[job.index] for job in jobs]
        _, first = np.unique(np.concatenate(in_order), return_index=True)
        repeated = np.ones(sum(map(len, in_order)), bool)
        repeated[first] = False
        per_task = np.split(repeated, np.cumsum([len(found) for found in in_order])[:-1])
        return [job.without(np.flatnonzero(positions).tolist())
                for job, positions in zip(jobs, per_task, strict=True)]


def in_processes(function: Callable[[S], T], jobs: Sequence[S], num_processes: int) -> Iterator[tuple[S, T]]:
    """Yields (job, function(job)) for every job, as they get done. The first error stops the rest."""
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
    """Ends this process when its parent is killed: the parent's next run will do the work again."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def progress_bar(shown: bool, total: int, what: str) -> tqdm.tqdm:
    """A bar in bytes, on stderr, if that is a terminal."""
    quiet = None if shown else True
    return tqdm.tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=quiet, file=sys.stderr)
