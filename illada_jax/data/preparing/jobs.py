"""Jobs: each makes the shards of its own parts, in any order, in any process.

An engine runs them: `make_locally` on the cores of this machine, `beam.py` on Apache Beam.
"""

import abc
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
from typing import ClassVar, NamedTuple, TypeVar

import numpy as np
import tqdm

from illada_jax.data.manifest import SPLITS, TOKENIZER_DIRECTORY, Manifest
from illada_jax.data.preparing.settings import Settings
from illada_jax.data.shards import ShardInfo, ShardWriter
from illada_jax.data.sources.records import RejectedExample
from illada_jax.data.sources.registry import Document, Part
from illada_jax.data.tokenizers import Tokenizer, load_tokenizer, train_sentencepiece
from illada_jax.files import read_json, write_atomically

DONE_DIRECTORY = "done"
TRAINING_BYTES = 64 * 2**20  # text that a tokenizer is trained on
_SHOWN_PLACES = 3  # of each reason

T = TypeVar("T")


@dataclass
class Report:
    """The examples or documents read, and those left out or cut.

    Attributes:
      num_read: all that were read.
      drops: by fate and reason ("left out: …"), the number of those left out or cut, and the first places.
    """

    num_read: int = 0
    drops: dict[str, tuple[int, list[str]]] = dataclasses.field(default_factory=dict)

    def add(self, rejected: RejectedExample, fate: str = "left out") -> None:
        """Adds an example to the drops."""
        place = rejected.where + (f" ({rejected.detail})" if rejected.detail else "")
        self.merge(Report(0, {f"{fate}: {rejected.reason}": (1, [place])}))

    def merge(self, other: "Report") -> None:
        """Adds the report of what was read later."""
        self.num_read += other.num_read
        for reason, (number, places) in other.drops.items():
            before, first_places = self.drops.get(reason, (0, []))
            self.drops[reason] = before + number, (first_places + places)[:_SHOWN_PLACES]

    def lines(self, what: str, *fates: str) -> tuple[str, ...]:
        """One line per reason with the first places, the most frequent reason first; `what` was read."""
        return tuple(
            f"{number:,} of {self.num_read:,} {what} {reason}: {'; '.join(places)}{'; …' * (number > len(places))}"
            for reason, (number, places) in sorted(self.drops.items(), key=lambda item: -item[1][0])
            if reason.startswith(fates)
        )


class EncodedDocument(NamedTuple):
    """A document or an example as tokens.

    Attributes:
      ids: its tokens, the end token included.
      num_bytes: UTF-8 bytes of its text.
      split_hash: decides its side of the held-out split.
      is_answer: of an example, for each token: it belongs to an answer.
      is_fixed: of an example, for each token: it is never masked.
    """

    ids: Sequence[int]
    num_bytes: int
    split_hash: int
    is_answer: Sequence[bool] = ()
    is_fixed: Sequence[bool] = ()


@dataclass(frozen=True)
class ShardJob(abc.ABC):
    """Everything that a process needs to make one shard of each split.

    Attributes:
      index: number of the shard.
      parts: the parts to read.
      split_below: documents with a smaller split hash are held out.
      source: index of the source that examples are from; 0 for text.
    """

    has_answers: ClassVar[bool] = False

    index: int
    parts: tuple[Part, ...]
    split_below: int
    source: int = 0

    @abc.abstractmethod
    def encode(self, tokenizer: Tokenizer, report: Report) -> Iterator[EncodedDocument]:
        """The documents of the parts as tokens, in order; what was read or left out is reported."""


@dataclass(frozen=True)
class TextJob(ShardJob):
    """A shard of text.

    Attributes:
      duplicates: positions, among the documents of the parts, of duplicates, which are left out.
    """

    duplicates: frozenset[int] = frozenset()

    def documents(self, report: Report) -> Iterator[Document]:
        """The documents without empty ones, which are reported, and duplicates."""
        documents = ((part.name, document) for part in self.parts for document in part.read())
        for position, (place, document) in enumerate(documents):
            report.num_read += 1
            if not document.text:
                report.add(RejectedExample(place, "no text (null or empty)"))
            elif position not in self.duplicates:
                yield document

    def digests(self) -> np.ndarray:
        """A hash (V16) of every document of the parts, in order."""
        return np.array([hashlib.blake2b(document.text.encode(), digest_size=16).digest()
                         for part in self.parts for document in part.read()], "V16")

    def encode(self, tokenizer: Tokenizer, report: Report) -> Iterator[EncodedDocument]:
        """See ShardJob."""
        for document in self.documents(report):
            ids = [*tokenizer.encode(document.text), tokenizer.eos_id]
            yield EncodedDocument(ids, len(document.text.encode()), document.split_hash)


# Makes the missing shards of jobs in a directory, of TextJobs without duplicates if the flag is set. The shards are the
# same with every engine, byte for byte.
Engine = Callable[[Sequence[ShardJob], pathlib.Path, bool], None]


def group_parts(parts: Iterable[Part], shard_bytes: int) -> list[tuple[Part, ...]]:
    """Groups consecutive parts until they fill a shard."""
    groups: list[list[Part]] = []
    size = 0
    for part in parts:
        if not groups or size + part.num_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += part.num_bytes
    return [tuple(group) for group in groups]


def make_shard(directory: pathlib.Path, job: ShardJob) -> None:
    """Makes the shard of a job, of either split, and records that it is done, unless it is done already."""
    path = directory / DONE_DIRECTORY / f"{job.index:06d}.json"
    if path.exists():
        return
    tokenizer = load_tokenizer(directory / TOKENIZER_DIRECTORY)
    writers = {split: ShardWriter(directory / f"{split}-{job.index:06d}.array_record", tokenizer.vocab_size,
                                  job.has_answers, job.source) for split in SPLITS}
    report = Report()
    for document in job.encode(tokenizer, report):
        split = "heldout" if document.split_hash < job.split_below else "train"
        writers[split].add(document.ids, document.num_bytes, document.is_answer, document.is_fixed)
    infos = {split: writer.close() for split, writer in writers.items()}
    done = {"shards": {split: dataclasses.asdict(info) for split, info in infos.items() if info is not None},
            "report": dataclasses.asdict(report)}
    write_atomically(path, json.dumps(done))


def make_locally(jobs: Sequence[ShardJob], directory: pathlib.Path, drop_duplicates: bool, num_processes: int = 1,
                 progress: bool = True) -> None:
    """An engine of processes on this machine; 1 is this process. Shows bars on a terminal."""
    run = functools.partial(_run, num_processes=num_processes, progress=progress)
    if drop_duplicates:
        digests = list(run("looking for duplicates", TextJob.digests, jobs))
        _, first = np.unique(np.concatenate(digests), return_index=True)
        repeated = np.ones(sum(map(len, digests)), bool)
        repeated[first] = False
        per_job = np.split(repeated, np.cumsum(list(map(len, digests)))[:-1])
        jobs = [dataclasses.replace(job, duplicates=frozenset(np.flatnonzero(positions).tolist()))
                for job, positions in zip(jobs, per_job, strict=True)]
    for _ in run("tokenizing", functools.partial(make_shard, directory), jobs):
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


def run_jobs(settings: Settings, directory: pathlib.Path, jobs: Sequence[ShardJob], tokenizer: Tokenizer | None,
             texts: Iterable[str], engine: Engine, progress: bool) -> Manifest:
    """Saves the tokenizer, makes the missing shards, and returns the manifest, not yet saved.

    The tokenizer of a preparation that was stopped is kept; if `tokenizer` is None, one is trained on `texts`.
    """
    target, done_directory = directory / TOKENIZER_DIRECTORY, directory / DONE_DIRECTORY
    if done_directory.exists():
        tokenizer = load_tokenizer(target)
    else:
        if tokenizer is None:
            if progress:
                print(f"training a SentencePiece tokenizer of {settings.vocab_size:,} ids", file=sys.stderr, flush=True)
            tokenizer = train_sentencepiece(texts, settings.vocab_size)
        # Not renamed into place: mounted buckets may refuse to rename directories. The other directory, made later,
        # says that it is whole.
        tokenizer.save(target)
        done_directory.mkdir()
    engine(jobs, directory, settings.drop_duplicates)
    paths = sorted(done_directory.glob("*.json"), key=lambda path: int(path.stem))
    done = [read_json(path) for path in paths]
    report = Report()
    for record in done:
        report.merge(Report(**record["report"]))
    splits = {split: tuple(ShardInfo(**record["shards"][split]) for record in done if split in record["shards"])
              for split in SPLITS}
    has_answers = any(job.has_answers for job in jobs)
    what = "examples" if has_answers else "documents"
    return Manifest(settings.sources, tokenizer.fingerprint, tokenizer.vocab_size, settings.heldout_fraction, splits,
                    has_answers=has_answers, dropped=report.lines(what, "left out", "truncated"),
                    divided=report.lines(what, "split"))
