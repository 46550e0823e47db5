"""Text to token shards, for `python -m illada_jax.prepare` and for small corpora that are prepared on the fly.

A preparation begins with a plan: the parts of all sources, grouped into shards. A shard depends on its parts, the
tokenizer and the split only, so any number of processes can make shards, in any order, and a preparation that was
killed continues with the missing shards. The manifest is written last.
"""

import dataclasses
import gzip
import hashlib
import json
import math
import pathlib
import shutil
from collections.abc import Iterable, Iterator

import numpy as np

from illada_jax.data.manifest import FORMAT_VERSION, MANIFEST, Manifest
from illada_jax.data.preparing.jobs import DONE_DIRECTORY, Engine, TextJob, collect, group_parts
from illada_jax.data.preparing.local import LocalEngine, progress_bar
from illada_jax.data.preparing.settings import Settings, given_tokenizer, save_tokenizer
from illada_jax.data.sources import registry
from illada_jax.data.sources.registry import Document, Part
from illada_jax.data.tokenizers import Tokenizer
from illada_jax.errors import InputError
from illada_jax.files import remove_leftovers, write_atomically

_IN_MEMORY_BYTES = 64 * 2**20
_TRAINING_BYTES = 64 * 2**20  # text that a tokenizer is trained on
_PLAN = "plan.json"


def list_parts(specs: Iterable[str]) -> list[Part]:
    """The parts of all sources.

    Raises:
      InputError: a source is unknown, or all are empty.
    """
    found = [part for spec in specs for part in registry.parts(spec)]
    if not sum(part.num_bytes for part in found):
        raise InputError(f"source {', '.join(specs)}: empty; name a source that holds text")
    return found


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
    parts = list_parts(settings.sources)
    _claim(directory, settings, parts)
    try:
        manifest = _fill(settings, directory, parts, engine or LocalEngine(1, progress), progress)
    except InputError:
        if not any((directory / DONE_DIRECTORY).iterdir()):
            shutil.rmtree(directory)  # nothing to continue: a corrected command can use the target
        raise
    _remove_leftovers(directory)  # of failed cluster workers
    manifest.save(directory)
    shutil.rmtree(directory / DONE_DIRECTORY)
    (directory / _PLAN).unlink()
    return manifest


def _fill(settings: Settings, directory: pathlib.Path, parts: list[Part], engine: Engine, progress: bool) -> Manifest:
    """Makes tokenizer and shards; returns the manifest, not yet saved."""
    tokenizer = given_tokenizer(settings.tokenizer)
    if sum(part.num_bytes for part in parts) <= min(settings.shard_bytes, _IN_MEMORY_BYTES):
        jobs, tokenizer, statistics = _prepare_small(settings, directory, parts, tokenizer, progress)
        LocalEngine(1, progress).make(jobs, directory, drop_duplicates=False)
    else:
        groups = group_parts(parts, settings.shard_bytes)
        jobs = [TextJob(index, group, settings.split_below) for index, group in enumerate(groups)]
        tokenizer = save_tokenizer(directory, tokenizer, _training_sample(jobs), settings.vocab_size, progress)
        statistics = {}
        engine.make(jobs, directory, settings.drop_duplicates)
    splits, _ = collect(directory, jobs)
    if not splits["train"]:
        raise InputError(f"source {', '.join(settings.sources)}: no document is left for training; lower "
                         "heldout_fraction or add documents")
    return Manifest(settings.sources, tokenizer.fingerprint, tokenizer.vocab_size, settings.heldout_fraction,
                    splits, statistics)


def _claim(directory: pathlib.Path, settings: Settings, parts: list[Part]) -> None:
    """Writes the plan into the target, or checks that the unfinished preparation there has the same plan."""
    plan = {
        "format_version": FORMAT_VERSION,
        "settings": dataclasses.asdict(settings),
        "parts": [[part.name, part.num_bytes, _stamp(part.files)] for part in parts],
    }
    content = json.dumps(plan, indent=1).encode()
    path = directory / _PLAN
    if (directory / MANIFEST).exists():
        raise InputError(f"{directory}: already holds a prepared corpus; choose another target")
    if path.exists():
        if path.read_bytes() != content:
            raise InputError(f"{directory}: holds an unfinished preparation with other sources, files or settings (see "
                             f"{path}); repeat its command, delete it, or choose another target")
    elif directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory}: is not empty and holds no unfinished preparation; choose another target")
    try:
        (directory / DONE_DIRECTORY).mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise InputError(f"{directory}: cannot be written: {error.strerror}") from error
    _remove_leftovers(directory)


def _remove_leftovers(directory: pathlib.Path) -> None:
    """Removes unfinished files of killed processes."""
    for parent in (directory, directory / DONE_DIRECTORY):
        remove_leftovers(parent / "*")


def _stamp(files: Iterable[pathlib.Path]) -> str:
    """A hash of sizes and modification times; reads no file."""
    status = [path.stat() for path in files]
    return hashlib.sha256(repr([(s.st_size, s.st_mtime_ns) for s in status]).encode()).hexdigest()[:16]


def _prepare_small(settings: Settings, directory: pathlib.Path, parts: list[Part], tokenizer: Tokenizer | None,
                   progress: bool) -> tuple[list[TextJob], Tokenizer, dict[str, float]]:
    """Reads all text into memory once: for duplicates, the split, the tokenizer, the statistics and the shard."""
    read = []
    with progress_bar(progress, sum(part.num_bytes for part in parts), "reading text") as bar:
        for part in parts:
            read.append([document for document in part.read() if document.text])
            bar.update(part.num_bytes)
    if settings.drop_duplicates:
        unique = dict.fromkeys(document.text for documents in read for document in documents)
        read = [[d for d in documents if unique.pop(d.text, d) is None] for documents in read]
    everything = [document for documents in read for document in documents]
    split_below = _small_split(settings, everything)
    training_texts = (document.text for document in everything if document.split_hash >= split_below)
    tokenizer = save_tokenizer(directory, tokenizer, training_texts, settings.vocab_size, progress)
    in_memory = tuple(
        Part(part.name, documents.__iter__, sum(len(document.text.encode()) for document in documents))
        for part, documents in zip(parts, read, strict=True))
    return [TextJob(0, in_memory, split_below)], tokenizer, _statistics(everything)


def _small_split(settings: Settings, documents: list[Document]) -> int:
    """The split hash below which documents are held out: at least one, unless the fraction is 0."""
    if not documents:
        raise InputError(f"source {', '.join(settings.sources)}: empty; name a source that holds text")
    if not settings.heldout_fraction:
        return 0
    hashes = sorted({document.split_hash for document in documents})
    if len(hashes) < 2:
        raise InputError(f"source {', '.join(settings.sources)}: a single document cannot be split into training and "
                         "held-out text; add documents, or set heldout_fraction to 0")
    return min(max(settings.split_below, hashes[0] + 1), hashes[-1])


def _training_sample(jobs: list[TextJob]) -> Iterator[str]:
    """Training text: the beginning of each shard's parts, the same share of each."""
    share = _TRAINING_BYTES // len(jobs)
    for job in jobs:
        left = share
        for document in job.documents():
            if left <= 0:
                break
            if job.split_of(document.split_hash) == "train":
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
