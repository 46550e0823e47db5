"""Many requests: cut into chunks, spread over processes, kept on disk, gathered in order.

A chunk is what is computed together, saved together and done again together when a run was killed within it: so the
numbers of a resumed run are those of an uninterrupted one bit by bit, and those of many processes are those of one.
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
    """One thing to compute.

    Attributes:
      content: what it asks, as JSON would have it: requests of the same content have the same answer.
      group: requests of one group come one after another and stay in one chunk.
      size: requests of similar size are computed together.
    """

    content: Any
    group: Hashable
    size: int


class Answers(NamedTuple):
    """What a chunk gave.

    Attributes:
      answers: one for each of its requests, as JSON would have it.
      evaluations: network evaluations that it took.
    """

    answers: list[Any]
    evaluations: int


Compute = Callable[[list[int]], Answers]


class Work:
    """Answers requests in chunks.

    Attributes:
      evaluations: network evaluations of all chunks so far, on all processes, also those that were found on disk.
    """

    def __init__(self, directory: str | epath.Path | None = None, fingerprint: str = "", chunk: int = 64,
                 progress: bool = True):
        """Prepares; nothing is written yet.

        Args:
          directory: where finished chunks are kept; None keeps none.
          fingerprint: identifies everything that answers depend on besides the requests: chunks of another fingerprint
            are not used.
          chunk: requests of a chunk, about.
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
          kind: a name for files and the progress bar.
          requests: what is to be computed.
          compute: indices of requests to their answers, in their order.
        """
        chunks = self._chunks(requests)
        done: dict[int, Answers] = {}
        rank, processes = jax.process_index(), jax.process_count()
        quiet = None if self._progress and rank == 0 else True  # None: where standard error is no terminal
        with tqdm(total=len(requests), unit="request", desc=kind, disable=quiet) as bar:
            for number, indices in enumerate(chunks):
                if number % processes == rank:
                    done[number] = self._chunk_answers(kind, number, indices, requests, compute)
                bar.update(len(indices))
        everywhere = hosts.gather({str(number): chunk._asdict() for number, chunk in done.items()})
        done = {int(number): Answers(**chunk) for part in everywhere for number, chunk in part.items()}
        self.evaluations += sum(chunk.evaluations for chunk in done.values())
        answers: list[Any] = [None] * len(requests)
        for number, indices in enumerate(chunks):
            for index, answer in zip(indices, done[number].answers, strict=True):
                answers[index] = answer
        return answers

    def _chunks(self, requests: Sequence[Request]) -> list[list[int]]:
        """Indices of each chunk: groups in the order of their largest request, so that a chunk is of one size."""
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
        # As it will be read when the run is resumed: JSON knows no tuples.
        return _read(path, len(indices))


def _read(path: epath.Path, count: int) -> Answers:
    try:
        answers = Answers(**json.loads(path.read_text()))
    except (json.JSONDecodeError, TypeError) as error:
        raise InputError(f"{path}: is broken; remove it and run the command again") from error
    if len(answers.answers) != count:
        raise InputError(f"{path}: has {len(answers.answers)} answers, expected {count}; remove it and run again")
    return answers
