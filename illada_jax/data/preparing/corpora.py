"""Text to token shards: what `python -m illada_jax.prepare` and small corpora that prepare themselves have in common.

A preparation is planned first: the sources are listed and their parts put together to shards. Each shard depends on
its parts, the tokenizer and the split only, so shards are made on any number of processes, in any order, and a
preparation that was killed goes on with the shards that are missing. The manifest comes last.
"""

import dataclasses
import gzip
import hashlib
import json
import math
import os
import pathlib
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from illada_jax.data import shards
from illada_jax.data.preparing.jobs import (
    DONE_DIRECTORY,
    Engine,
    LocalEngine,
    ShardJob,
    collect,
    group_parts,
    progress_bar,
)
from illada_jax.data.shards import Manifest
from illada_jax.data.sources import registry
from illada_jax.data.sources.registry import Document, Part
from illada_jax.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer, train_sentencepiece
from illada_jax.errors import ConfigError, InputError

_IN_MEMORY_BYTES = 64 * 2**20
_TRAINING_BYTES = 64 * 2**20  # text that a tokenizer is trained on
_PLAN = "plan.json"
_PROBE = "A b\n\n  c\t\td \r\n é e\u0301 ﬁ 漢字 🙂\u200d \x00\x7f ½ ...  ' n't <s> </s> <mask> [MASK] <|endoftext|> \n"


@dataclass(frozen=True)
class Settings:
    """What a preparation depends on, besides the text.

    Attributes:
      sources: see `data/sources`.
      tokenizer: `bytes`, `sentencepiece` (trained here) or a path.
      vocab_size: size of a tokenizer that is trained here.
      heldout_fraction: share of the documents, chosen by hash.
      drop_duplicates: keep only the first of documents with the same text.
      shard_bytes: text in a shard, about: parts of a source (a file, say) are not cut.
    """

    sources: tuple[str, ...]
    tokenizer: str
    vocab_size: int
    heldout_fraction: float
    drop_duplicates: bool = False
    shard_bytes: int = _IN_MEMORY_BYTES

    def __post_init__(self):
        if not 0 <= self.heldout_fraction < 1:
            raise ConfigError(f"heldout_fraction = {self.heldout_fraction}: must lie in [0, 1)")
        if self.shard_bytes <= 0:
            raise ConfigError(f"shard_bytes = {self.shard_bytes}: must be greater than 0")


def list_parts(specs: Iterable[str]) -> list[Part]:
    """The parts of all sources.

    Raises:
      InputError: a source is unknown or holds nothing.
    """
    found = [part for spec in specs for part in registry.parts(spec)]
    if not sum(part.num_bytes for part in found):
        raise InputError(f"source {', '.join(specs)}: empty, there is no text to learn from")
    return found


def content_key(settings: Settings, parts: Iterable[Part]) -> str:
    """Identifies settings and text, by the bytes of every file."""
    digest = hashlib.sha256(json.dumps([shards.FORMAT_VERSION, dataclasses.asdict(settings)]).encode())
    for path in dict.fromkeys(path for part in parts for path in part.files):
        digest.update(shards.file_sha256(path).encode())
    tokenizer = pathlib.Path(settings.tokenizer)
    if tokenizer.exists():
        digest.update(load_tokenizer(tokenizer).fingerprint.encode())
    return digest.hexdigest()[:24]


def prepare(settings: Settings, directory: pathlib.Path, engine: Engine | None = None, progress: bool = True
            ) -> Manifest:
    """Prepares a corpus in a directory, or goes on with a preparation that was stopped.

    Args:
      settings: sources, tokenizer and split.
      directory: the target; new, empty, or an unfinished preparation of the same.
      engine: what makes the shards of a corpus that is more than one; None: this process. The result does not depend
        on it.
      progress: show a bar on stderr.

    Raises:
      InputError: the sources or the target are no good.
    """
    parts = list_parts(settings.sources)
    _claim(directory, settings, parts)
    try:
        manifest = _fill(settings, directory, parts, engine or LocalEngine(1, progress), progress)
    except InputError:
        if not any((directory / DONE_DIRECTORY).iterdir()):
            shutil.rmtree(directory)  # nothing to go on with: the next try need not repeat this one's mistake
        raise
    _remove_leftovers(directory)  # those of a cluster's workers that were given up
    manifest.save(directory)
    shutil.rmtree(directory / DONE_DIRECTORY)
    (directory / _PLAN).unlink()
    return manifest


def _fill(settings: Settings, directory: pathlib.Path, parts: list[Part], engine: Engine, progress: bool) -> Manifest:
    """Makes tokenizer and shards; returns the manifest, not yet saved."""
    if sum(part.num_bytes for part in parts) <= min(settings.shard_bytes, _IN_MEMORY_BYTES):
        jobs, tokenizer, statistics = _prepare_small(settings, directory, parts, progress)
        LocalEngine(1, progress).make(jobs, directory, drop_duplicates=False)
    else:
        groups = group_parts(parts, settings.shard_bytes)
        jobs = [ShardJob(index, group, _fraction_hash(settings)) for index, group in enumerate(groups)]
        tokenizer = _tokenizer(settings, directory, _training_sample(jobs), progress)
        statistics = {}
        engine.make(jobs, directory, settings.drop_duplicates)
    splits = collect(directory, jobs)
    if not splits["train"]:
        raise InputError(f"source {', '.join(settings.sources)}: no document is left for training; a lower "
                         "heldout_fraction or more documents are needed")
    return Manifest(settings.sources, tokenizer.fingerprint, tokenizer.vocab_size, settings.heldout_fraction,
                    statistics, splits)


def _claim(directory: pathlib.Path, settings: Settings, parts: list[Part]) -> None:
    """Makes the target ours: writes the plan, or finds the same one there."""
    plan = {
        "format_version": shards.FORMAT_VERSION,
        "settings": dataclasses.asdict(settings),
        "parts": [[part.name, part.num_bytes, _stamp(part.files)] for part in parts],
    }
    content = json.dumps(plan, indent=1).encode()
    path = directory / _PLAN
    if (directory / shards.MANIFEST).exists():
        raise InputError(f"{directory}: already holds a prepared corpus; choose another target")
    if path.exists():
        if path.read_bytes() != content:
            raise InputError(f"{directory}: holds an unfinished preparation with other sources, files or settings (see "
                             f"{path}); repeat its command, delete it, or choose another target")
    elif directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory}: is not empty, and what it holds is no unfinished preparation; choose another "
                         "target")
    try:
        (directory / DONE_DIRECTORY).mkdir(parents=True, exist_ok=True)
        shards.write_atomically(path, content)
    except OSError as error:
        raise InputError(f"{directory}: cannot be written: {error.strerror}") from error
    _remove_leftovers(directory)


def _remove_leftovers(directory: pathlib.Path) -> None:
    """Removes what a killed process had begun to write."""
    for leftover in directory.rglob("*.tmp-*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _stamp(files: Iterable[pathlib.Path]) -> str:
    """Changes when a file does; reads none."""
    status = [path.stat() for path in files]
    return hashlib.sha256(repr([(s.st_size, s.st_mtime_ns) for s in status]).encode()).hexdigest()[:16]


def _prepare_small(settings: Settings, directory: pathlib.Path, parts: list[Part], progress: bool
                   ) -> tuple[list[ShardJob], Tokenizer, dict[str, float]]:
    """Reads everything into memory once: for duplicates, the split, the tokenizer, the statistics and the shard."""
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
    tokenizer = _tokenizer(settings, directory, (d.text for d in everything if d.split_hash >= split_below), progress)
    in_memory = tuple(
        Part(part.name, documents.__iter__, sum(len(document.text.encode()) for document in documents))
        for part, documents in zip(parts, read, strict=True))
    return [ShardJob(0, in_memory, split_below)], tokenizer, _statistics(everything)


def _small_split(settings: Settings, documents: list[Document]) -> int:
    """Where the split lies. A fraction that is not 0 holds out one document (or group) at least."""
    if not documents:
        raise InputError(f"source {', '.join(settings.sources)}: empty, there is no text to learn from")
    if not settings.heldout_fraction:
        return 0
    hashes = sorted({document.split_hash for document in documents})
    if len(hashes) < 2:
        raise InputError(f"source {', '.join(settings.sources)}: a single document cannot be split into training and "
                         "held-out text; add documents, or set heldout_fraction to 0")
    return min(max(_fraction_hash(settings), hashes[0] + 1), hashes[-1])


def _fraction_hash(settings: Settings) -> int:
    return int(settings.heldout_fraction * 2**64)


def _training_sample(jobs: list[ShardJob]) -> Iterator[str]:
    """Training text from the beginning of each shard's parts, the same share of each."""
    share = _TRAINING_BYTES // len(jobs)
    for job in jobs:
        left = share
        for document in job.documents():
            if left <= 0:
                break
            if job.split_of(document) == "train":
                left -= len(document.text.encode())
                yield document.text


def _tokenizer(settings: Settings, directory: pathlib.Path, texts: Iterable[str], progress: bool) -> Tokenizer:
    """The tokenizer of the settings, saved in the directory; one that is already there is taken."""
    target = directory / shards.TOKENIZER_DIRECTORY
    if target.exists():
        return load_tokenizer(target)
    if settings.tokenizer == "bytes":
        tokenizer = ByteTokenizer()
    elif settings.tokenizer == "sentencepiece":
        if progress:
            print(f"training a SentencePiece tokenizer of {settings.vocab_size:,} ids", file=sys.stderr, flush=True)
        tokenizer = train_sentencepiece(texts, settings.vocab_size)
    else:
        tokenizer = load_tokenizer(settings.tokenizer)
        check_lossless(tokenizer, settings.tokenizer)
    temporary = shards.temporary_name(target)
    tokenizer.save(temporary)
    os.replace(temporary, target)
    return tokenizer


def check_lossless(tokenizer: Tokenizer, name: str) -> None:
    """Checks on a text full of traps that text survives.

    Raises:
      InputError: it does not.
    """
    back = tokenizer.decode(tokenizer.encode(_PROBE))
    if back != _PROBE:
        at = next((i for i, (a, b) in enumerate(zip(_PROBE, back, strict=False)) if a != b), len(back))
        raise InputError(f"tokenizer {name}: text does not survive it: {_PROBE[at:at + 8]!r} comes back as "
                         f"{back[at:at + 8]!r}; a byte-level tokenizer, or one with byte fallback, is needed")


def _statistics(documents: list[Document]) -> dict[str, float]:
    """What needs no model: bits per byte of the whole corpus by byte frequencies and by gzip."""
    text = "".join(document.text for document in documents).encode()
    frequency = np.bincount(np.frombuffer(text, np.uint8), minlength=256) / len(text)
    entropy = -sum(p * math.log2(p) for p in frequency.tolist() if p)
    return {
        "order-0 entropy of bytes": entropy,
        "gzip -9": 8 * len(gzip.compress(text, 9, mtime=0)) / len(text),
    }
