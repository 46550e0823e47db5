"""Resumable work: requests are cut into chunks, distributed over processes, saved to disk and returned in order.

A chunk is computed, saved and, after an interruption, repeated as a whole. So a resumed run gives bit for bit the
numbers of an uninterrupted one, and several processes give those of one.
"""

import hashlib
import json
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath
from tqdm import tqdm

from illada_jax.errors import InputError
from illada_jax.files import write_atomically
from illada_jax.parallel import hosts


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
    """The results of a chunk.

    Attributes:
      answers: one per request, JSON-compatible.
      evaluations: network evaluations that they took.
    """

    answers: list[Any]
    evaluations: int


Compute = Callable[[list[int]], Answers]


class Work:
    """Answers requests in chunks.

    Attributes:
      evaluations: network evaluations of all chunks so far, on all processes, including chunks read from disk.
    """

    def __init__(self, directory: str | epath.Path | None = None, fingerprint: str = "", chunk: int = 64,
                 progress: bool = True):
        """Takes the settings; writes nothing yet.

        Args:
          directory: for finished chunks; None keeps none.
          fingerprint: of everything besides the requests that answers depend on; saved chunks with another fingerprint
            are ignored.
          chunk: approximate number of requests per chunk.
          progress: show a progress bar.
        """
        self.evaluations = 0
        self._directory = None if directory is None else epath.Path(directory)
        self._fingerprint = fingerprint
        self._chunk = chunk
        self._progress = progress

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
        quiet = None if self._progress and rank == 0 else True  # None: unless standard error is a terminal
        with tqdm(total=len(requests), unit="request", desc=kind, disable=quiet) as bar:
            for number, indices in enumerate(chunks):
                if number % processes == rank:
                    done[number] = self._chunk_answers(kind, number, indices, requests, compute)
                bar.update(len(indices))
        gathered = hosts.gather({str(number): chunk._asdict() for number, chunk in done.items()})
        done = {int(number): Answers(**chunk) for part in gathered for number, chunk in part.items()}
        self.evaluations += sum(chunk.evaluations for chunk in done.values())
        answers: list[Any] = [None] * len(requests)
        for number, indices in enumerate(chunks):
            for index, answer in zip(indices, done[number].answers, strict=True):
                answers[index] = answer
        return answers

    def _chunks(self, requests: Sequence[Request]) -> list[list[int]]:
        """Indices of each chunk: groups are sorted by their largest request, so that a chunk has similar sizes."""
        groups: dict[Hashable, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(request.group, []).append(index)
        ordered = sorted(groups.values(), key=lambda group: (max(requests[i].size for i in group), group[0]))
        chunks: list[list[int]] = []
        for group in ordered:
            if not chunks or len(chunks[-1]) + len(group) > self._chunk:
                chunks.append([])
            chunks[-1] += group
        return chunks

    def _chunk_answers(self, kind: str, number: int, indices: list[int], requests: Sequence[Request],
                       compute: Compute) -> Answers:
        if self._directory is None:
            return compute(indices)
        content = json.dumps([self._fingerprint, kind, [requests[index].content for index in indices]])
        name = f"{kind}-{number:05d}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.json"
        path = self._directory / name
        if path.exists():
            return _read(path, len(indices))
        answers = compute(indices)
        self._directory.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(answers._asdict()))
        # Read back as a resumed run will: JSON turns tuples into lists.
        return _read(path, len(indices))


def _read(path: epath.Path, count: int) -> Answers:
    try:
        answers = Answers(**json.loads(path.read_text()))
    except (json.JSONDecodeError, TypeError) as error:
        raise InputError(f"{path}: is not a valid chunk; remove it and run the command again") from error
    if len(answers.answers) != count:
        raise InputError(f"{path}: has {len(answers.answers)} answers, expected {count}; remove it and run the command "
                         "again")
    return answers
