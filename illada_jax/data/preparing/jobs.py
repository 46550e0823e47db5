"""Jobs: each makes the shards of its own parts, in any order, in any process.

An engine runs them: `local.py` on the cores of this machine, `beam.py` on Apache Beam. Both call the functions here.
"""

import abc
import collections
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from illada_jax.data.manifest import SPLITS, TOKENIZER_DIRECTORY
from illada_jax.data.shards import ShardInfo, ShardWriter
from illada_jax.data.sources.examples import RejectedExample
from illada_jax.data.sources.registry import Document, Part
from illada_jax.data.tokenizers import Tokenizer, load_tokenizer
from illada_jax.files import write_atomically

DONE_DIRECTORY = "done"
_SHOWN_PLACES = 3  # of each reason


class DropCounter:
    """Counts of examples that were left out or cut, by fate and reason, with the first positions of each.

    Attributes:
      total: all examples read.
    """

    def __init__(self):
        self.total = 0
        self._counts: collections.Counter[tuple[str, str]] = collections.Counter()
        self._places: dict[tuple[str, str], list[str]] = collections.defaultdict(list)

    def add(self, rejected: RejectedExample, fate: str = "left out") -> None:
        """Counts an example."""
        place = rejected.where + (f" ({rejected.detail})" if rejected.detail else "")
        self._add((fate, rejected.reason), 1, [place])

    def to_json(self) -> dict:
        """The counts as JSON values, for `merge`."""
        return {"total": self.total,
                "drops": [[*key, count, self._places[key]] for key, count in self._counts.items()]}

    def merge(self, later: dict) -> None:
        """Adds the counts, as `to_json` gives them, of examples that come later in the sources."""
        self.total += later["total"]
        for fate, reason, count, places in later["drops"]:
            self._add((fate, reason), count, places)

    def lines(self, *fates: str) -> tuple[str, ...]:
        """One line per reason, the most frequent first."""
        return tuple(
            f"{count:,} of {self.total:,} examples {fate}: {reason}: " + "; ".join(self._places[fate, reason])
            + ("; …" if count > _SHOWN_PLACES else "")
            for (fate, reason), count in self._counts.most_common() if fate in fates
        )

    def _add(self, key: tuple[str, str], count: int, places: list[str]) -> None:
        self._counts[key] += count
        self._places[key] = (self._places[key] + places)[:_SHOWN_PLACES]


class EncodedDocument(NamedTuple):
    """A document or an example as tokens.

    Attributes:
      split: `train` or `heldout`.
      ids: its tokens, the end token included.
      num_bytes: UTF-8 bytes of its text.
      is_answer: for examples, True for each token of an answer.
    """

    split: str
    ids: Sequence[int]
    num_bytes: int
    is_answer: Sequence[bool] = ()


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

    @property
    def num_bytes(self) -> int:
        """Approximate size of the parts."""
        return sum(part.num_bytes for part in self.parts)

    def split_of(self, split_hash: int) -> str:
        """`heldout` or `train`."""
        return "heldout" if split_hash < self.split_below else "train"

    @abc.abstractmethod
    def encode(self, tokenizer: Tokenizer, counter: DropCounter) -> Iterator[EncodedDocument]:
        """The documents of the parts as tokens, in order; examples that are left out or cut are counted."""


@dataclass(frozen=True)
class TextJob(ShardJob):
    """A shard of text.

    Attributes:
      duplicates: positions, among the documents of the parts, of duplicates, which are left out.
    """

    duplicates: frozenset[int] = frozenset()

    def documents(self) -> Iterator[Document]:
        """The documents without empty ones and duplicates."""
        for position, document in enumerate(self._all_documents()):
            if document.text and position not in self.duplicates:
                yield document

    def digests(self) -> np.ndarray:
        """A hash (V16) of every document of the parts, in order."""
        return np.array([hashlib.blake2b(document.text.encode(), digest_size=16).digest()
                         for document in self._all_documents()], "V16")

    def without(self, duplicates: Iterable[int]) -> "TextJob":
        """The job with documents left out."""
        return dataclasses.replace(self, duplicates=frozenset(duplicates))

    def encode(self, tokenizer: Tokenizer, counter: DropCounter) -> Iterator[EncodedDocument]:
        """See ShardJob."""
        for document in self.documents():
            ids = [*tokenizer.encode(document.text), tokenizer.eos_id]
            yield EncodedDocument(self.split_of(document.split_hash), ids, len(document.text.encode()))

    def _all_documents(self) -> Iterator[Document]:
        return (document for part in self.parts for document in part.read())


class Engine(Protocol):
    """Runs jobs. The shards are the same with every engine, byte for byte."""

    def make(self, jobs: Sequence[ShardJob], directory: pathlib.Path, drop_duplicates: bool) -> None:
        """Makes the shards that are not done yet.

        Args:
          jobs: all jobs of the preparation.
          directory: the target; it holds the tokenizer already.
          drop_duplicates: leave out documents that repeat the text of an earlier one (TextJob only).
        """


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


def make_shard(directory: pathlib.Path, job: ShardJob, advance: Callable[[int], object] = lambda num_bytes: None
               ) -> None:
    """Makes the shards of a job, one of each split, and records that it is done.

    Args:
      directory: the target of the preparation, which holds the tokenizer.
      job: the job.
      advance: called with the bytes of every document.
    """
    tokenizer = load_tokenizer(directory / TOKENIZER_DIRECTORY)
    writers = {split: ShardWriter(directory / f"{split}-{job.index:06d}.array_record", tokenizer.vocab_size,
                                  job.has_answers, job.source) for split in SPLITS}
    counter = DropCounter()
    for document in job.encode(tokenizer, counter):
        writers[document.split].add(document.ids, document.num_bytes, document.is_answer)
        advance(document.num_bytes)
    infos = {split: writer.close() for split, writer in writers.items()}
    done = {"shards": {split: dataclasses.asdict(info) for split, info in infos.items() if info is not None},
            "drops": counter.to_json()}
    write_atomically(done_path(directory, job.index), json.dumps(done))


def done_path(directory: pathlib.Path, index: int) -> pathlib.Path:
    """The record that a job is done, with its shards and drops."""
    return directory / DONE_DIRECTORY / f"{index:06d}.json"


def collect(directory: pathlib.Path, jobs: Sequence[ShardJob]) -> tuple[dict[str, tuple[ShardInfo, ...]], DropCounter]:
    """The shards of every split, in the order of the jobs, and the drops. All jobs must be done."""
    done = [json.loads(done_path(directory, job.index).read_bytes()) for job in jobs]
    counter = DropCounter()
    for record in done:
        counter.merge(record["drops"])
    splits = {split: tuple(ShardInfo(**record["shards"][split]) for record in done if split in record["shards"])
              for split in SPLITS}
    return splits, counter
