"""Resumable work: requests are cut into chunks, distributed over processes, saved to disk and returned in order.

A chunk is computed, saved and, after an interruption, repeated as a whole. So a resumed run gives, bit for bit, the
numbers of an uninterrupted one, and several processes give those of one.
"""

import itertools
import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from etils import epath
from tqdm import tqdm

from illada_jax.errors import InputError
from illada_jax.files import read_json, write_atomically
from illada_jax.parallel import hosts
from illada_jax.parallel.fingerprints import digest


class Request(NamedTuple):
    """One unit of work.

    Attributes:
      content: JSON-compatible; requests of equal content have equal answers.
      group: requests of a group are adjacent and stay in one chunk.
      size: requests of similar size share a chunk.
    """

    content: Any
    group: Hashable
    size: int


class Answers(NamedTuple):
    """The answers of a chunk, JSON-compatible, and the number of network evaluations for them."""

    answers: list[Any]
    evaluations: int


Compute = Callable[[list[int]], Answers]


@dataclass
class Work:
    """Answers requests in chunks.

    Attributes:
      directory: for finished chunks; None saves none.
      fingerprint: of everything besides the requests that answers depend on; saved chunks with another fingerprint are
        ignored.
      chunk: approximate number of requests per chunk.
      evaluations: network evaluations of all chunks so far, on all processes, including chunks read from disk.
    """

    directory: epath.Path | None = None
    fingerprint: str = ""
    chunk: int = 64
    evaluations: int = field(default=0, init=False)

    def run(self, kind: str, requests: Sequence[Request], compute: Compute) -> list[Any]:
        """The answers, in the order of the requests.

        Args:
          kind: name of the files and the progress bar.
          requests: the work; the same on every process.
          compute: maps indices of requests to their answers, in the same order.
        """
        chunks = self._chunks(requests)
        done: dict[int, Answers] = {}
        rank, processes = jax.process_index(), jax.process_count()
        quiet = None if rank == 0 else True  # None: unless standard error is a terminal
        with tqdm(total=len(requests), unit="request", desc=kind, disable=quiet) as bar:
            for number, indices in enumerate(chunks):
                if number % processes == rank:
                    done[number] = self._chunk_answers(kind, number, indices, requests, compute)
                bar.update(len(indices))
        answer_of: dict[int, Any] = {}
        for number, answers, evaluations in itertools.chain(*hosts.gather([(n, *done[n]) for n in done])):
            self.evaluations += evaluations
            answer_of |= zip(chunks[number], answers, strict=True)
        return [answer_of[index] for index in range(len(requests))]

    def _chunks(self, requests: Sequence[Request]) -> list[list[int]]:
        """Indices of each chunk: groups are sorted by their largest request, so that a chunk has similar sizes."""
        groups: dict[Hashable, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(request.group, []).append(index)
        ordered = sorted(groups.values(), key=lambda group: (max(requests[i].size for i in group), group[0]))
        chunks: list[list[int]] = []
        for group in ordered:
            if not chunks or len(chunks[-1]) + len(group) > self.chunk:
                chunks.append([])
            chunks[-1] += group
        return chunks

    def _chunk_answers(self, kind: str, number: int, indices: list[int], requests: Sequence[Request],
                       compute: Compute) -> Answers:
        if self.directory is None:
            return compute(indices)
        content = json.dumps([self.fingerprint, kind, [requests[index].content for index in indices]])
        path = self.directory / f"{kind}-{number:05d}-{digest(content)}.json"
        if not path.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(compute(indices)._asdict()))
        # Read back as a resumed run will: JSON turns tuples into lists.
        return _read(path, len(indices))


def _read(path: epath.Path, count: int) -> Answers:
    try:
        answers = Answers(**read_json(path))
        if len(answers.answers) == count:
            return answers
        problem = f"{path}: has {len(answers.answers)} answers, expected {count}"
    except InputError as error:
        problem = str(error)
    except TypeError:
        problem = f"{path}: is not a valid chunk"
    raise InputError(f"{problem}; remove it and run the command again")
