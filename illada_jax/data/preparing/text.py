"""Text to token shards, for `python -m illada_jax.prepare` and for small corpora that are prepared on the fly.

A preparation begins with a plan: the parts of all sources, grouped into shards. A shard depends on its parts, the
tokenizer and the split only, so any number of processes can make shards, in any order, and a preparation that was
killed continues with the missing shards. The manifest is written last.
"""

import dataclasses
import functools
import gzip
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator

import numpy as np

from illada_jax.data.manifest import FORMAT_VERSION, MANIFEST, Manifest
from illada_jax.data.preparing.jobs import (
    DONE_DIRECTORY,
    TRAINING_BYTES,
    Engine,
    Report,
    TextJob,
    group_parts,
    make_locally,
    run_jobs,
)
from illada_jax.data.preparing.settings import Settings, given_tokenizer
from illada_jax.data.sources import registry
from illada_jax.data.sources.registry import Document, Part
from illada_jax.errors import InputError
from illada_jax.files import read_file, remove_leftovers, write_atomically

_IN_MEMORY_BYTES = 64 * 2**20
_IN_MEMORY_CHARACTERS = 4 * _IN_MEMORY_BYTES  # of compressed files
_SHORTEST_DOCUMENT = 128  # characters that even a short document counts for
_PLAN = "plan.json"


def list_parts(settings: Settings) -> list[Part]:
    """The parts of all sources. Raises InputError if a source is unknown."""
    return [part for spec in settings.sources for part in registry.parts(spec, settings.max_document_bytes)]


def prepare(settings: Settings, directory: pathlib.Path, engine: Engine | None = None, progress: bool = True
            ) -> Manifest:
    """Prepares a corpus in a directory, or continues a preparation that was stopped.

    Args:
      settings: sources, tokenizer and split.
      directory: the target; new, empty, or an unfinished preparation with the same settings.
      engine: runs the jobs of a corpus of several shards; None: this process. The result does not depend on it.
      progress: show a bar on stderr.

    Raises:
      InputError: the sources, the tokenizer or the target cannot be used; names them.
    """
    parts = list_parts(settings)
    _claim(directory, settings, parts)
    try:
        manifest = _fill(settings, directory, parts, engine, progress)
    except InputError:
        if not any((directory / DONE_DIRECTORY).glob("*")):
            shutil.rmtree(directory)  # nothing to continue: a corrected command can use the target
        raise
    remove_leftovers(directory / "*")
    manifest.save(directory)
    shutil.rmtree(directory / DONE_DIRECTORY)
    (directory / _PLAN).unlink()
    return manifest


def _claim(directory: pathlib.Path, settings: Settings, parts: list[Part]) -> None:
    """Writes the plan into the target, or checks that the unfinished preparation there has the same plan."""
    # Files by size and time of modification: the plan reads none of them.
    stamps = [[part.name, part.num_bytes, [[s.st_size, s.st_mtime_ns] for s in map(os.stat, part.files)]]
              for part in parts]
    plan = json.dumps([FORMAT_VERSION, dataclasses.asdict(settings), stamps])
    path = directory / _PLAN
    if (directory / MANIFEST).exists():
        raise InputError(f"{directory}: already holds a prepared corpus; choose another target")
    if path.exists():
        if read_file(path).decode(errors="replace") != plan:
            raise InputError(f"{directory}: holds an unfinished preparation with other sources, files or settings (see "
                             f"{path}); repeat its command, delete it, or choose another target")
    elif directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory}: is not empty and holds no unfinished preparation; choose another target")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(path, plan)
    except OSError as error:
        raise InputError(f"{directory}: cannot be written: {error.strerror}") from error


def _fill(settings: Settings, directory: pathlib.Path, parts: list[Part], engine: Engine | None, progress: bool
          ) -> Manifest:
    """Makes tokenizer and shards; returns the manifest, not yet saved."""
    tokenizer = given_tokenizer(settings.tokenizer)
    in_this_process = functools.partial(make_locally, progress=progress)
    num_bytes = sum(part.num_bytes for part in parts)
    documents = _read(settings, parts) if num_bytes <= min(settings.shard_bytes, _IN_MEMORY_BYTES) else None
    if documents is not None:
        in_memory = Part(", ".join(settings.sources), documents.__iter__, num_bytes)
        jobs, limit = [TextJob(0, (in_memory,), _small_split(settings, documents))], math.inf
        statistics, engine = _statistics(documents), in_this_process
        settings = dataclasses.replace(settings, drop_duplicates=False)  # they are dropped
    else:
        groups = group_parts(parts, settings.shard_bytes)
        jobs = [TextJob(index, group, settings.split_below) for index, group in enumerate(groups)]
        limit, statistics = TRAINING_BYTES, {}
    texts = _training_sample(jobs, limit)
    manifest = run_jobs(settings, directory, jobs, tokenizer, texts, engine or in_this_process, progress)
    if not manifest.splits["train"]:
        raise InputError(f"source {', '.join(settings.sources)}: no document is left for training; lower "
                         "heldout_fraction or add documents")
    return dataclasses.replace(manifest, statistics=statistics)


def _read(settings: Settings, parts: list[Part]) -> list[Document] | None:
    """The documents of a small corpus, in memory; None if its files hold too much text."""
    documents, size, seen = [], 0, set()
    for document in (document for part in parts for document in part.read()):
        if settings.drop_duplicates and document.text in seen:
            continue
        if document.text:
            seen.add(document.text)
        size += max(len(document.text), _SHORTEST_DOCUMENT)
        if size > _IN_MEMORY_CHARACTERS:
            return None
        documents.append(document)
    if not seen:
        raise InputError(f"source {', '.join(settings.sources)}: empty; name a source that holds text")
    return documents


def _small_split(settings: Settings, documents: list[Document]) -> int:
    """The split hash below which documents are held out: at least one, unless the fraction is 0."""
    if not settings.heldout_fraction:
        return 0
    hashes = sorted({document.split_hash for document in documents if document.text})
    if len(hashes) < 2:
        raise InputError(f"source {', '.join(settings.sources)}: a single document cannot be split into training and "
                         "held-out text; add documents, or set heldout_fraction to 0")
    return min(max(settings.split_below, hashes[0] + 1), hashes[-1])


def _training_sample(jobs: list[TextJob], limit: float) -> Iterator[str]:
    """About `limit` bytes of training text from the beginning of each shard's parts, the same share of each."""
    for job in jobs:
        left = limit // len(jobs)
        for document in job.documents(Report()):
            if left <= 0:
                break
            if document.split_hash >= job.split_below:
                left -= len(document.text.encode())
                yield document.text


def _statistics(documents: list[Document]) -> dict[str, float]:
    """Bits per byte of the whole corpus by byte frequencies and by gzip, which need no model."""
    text = "".join(document.text for document in documents).encode()
    frequency = np.bincount(np.frombuffer(text, np.uint8), minlength=256) / len(text)
    entropy = -sum(p * math.log2(p) for p in frequency.tolist() if p)
    return {
        "order-0 entropy of bytes": entropy,
        "gzip -9": 8 * len(gzip.compress(text, 9, mtime=0)) / len(text),
    }
