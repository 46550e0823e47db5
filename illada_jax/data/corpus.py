"""From `config.data` to token streams: a small corpus prepares itself into a cache, a prepared one is opened."""

import hashlib
import os
import pathlib
import shutil
from dataclasses import dataclass

from illada_jax.config import DataConfig
from illada_jax.data import shards
from illada_jax.data.preparing import corpora as preparing
from illada_jax.data.shards import TokenStream
from illada_jax.data.tokenizers import Tokenizer
from illada_jax.errors import ConfigError, InputError

_PREPARED = "prepared:"
_LARGEST_BYTES = 2**30  # what prepares itself


@dataclass(frozen=True)
class Component:
    """One prepared corpus of a mixture.

    Attributes:
      name: its directory; where it has prepared itself, its sources.
      train: its training stream.
      weight: share of the rows that come from it; all weights together are 1.
    """

    name: str
    train: TokenStream
    weight: float


@dataclass(frozen=True)
class Corpus:
    """Text as tokens.

    Attributes:
      tokenizer: what made the tokens.
      components: what is mixed; a single one if there is one corpus.
      train: the streams to learn from, one after the other.
      heldout: the streams that training never sees; empty if nothing is held out.
      statistics: figures to compare a model with, by name, in bits per byte; empty for large corpora and mixtures.
      fingerprint: identifies tokens and split.
    """

    tokenizer: Tokenizer
    components: tuple[Component, ...]
    train: TokenStream
    heldout: TokenStream
    statistics: dict[str, float]
    fingerprint: str


def open_corpus(data: DataConfig, progress: bool = True) -> Corpus:
    """Opens what the config names.

    Sources other than `prepared:DIR` are prepared into the cache first, if they are not there; the key is a hash of
    their content and of the settings.

    Args:
      data: the section of the config.
      progress: show a bar on stderr while preparing.

    Raises:
      InputError: a source, the tokenizer or a shard is no good; names it.
    """
    prepared = [pathlib.Path(spec.removeprefix(_PREPARED)) for spec in data.sources if spec.startswith(_PREPARED)]
    if not prepared:
        if data.weights:
            raise ConfigError(f"config.data.weights = {data.weights!r}: weights are for prepared corpora "
                              "('prepared:DIR', see python -m illada_jax.prepare)")
        return _open([_prepare_in_cache(data, progress)], ["+".join(data.sources)], ())
    if len(prepared) != len(data.sources):
        raise ConfigError(f"config.data.sources = {data.sources!r}: prepared corpora and others do not mix; prepare "
                          "the others too (python -m illada_jax.prepare)")
    return _open(prepared, list(map(str, prepared)), data.weights)


def _open(directories: list[pathlib.Path], names: list[str], weights: tuple[float, ...]) -> Corpus:
    opened = [shards.open_shards(directory) for directory in directories]
    manifests, tokenizers, streams = zip(*opened, strict=True)
    for directory, tokenizer in zip(directories, tokenizers, strict=True):
        if tokenizer.fingerprint != tokenizers[0].fingerprint:
            raise InputError(f"{directory}: prepared with another tokenizer (fingerprint {tokenizer.fingerprint}) than "
                             f"{directories[0]} ({tokenizers[0].fingerprint})")
    train = [of_split["train"] for of_split in streams]
    total = sum(stream.num_tokens for stream in train)
    weights = weights or tuple(stream.num_tokens / total for stream in train)
    fingerprints = [manifest.fingerprint for manifest in manifests]
    single = len(opened) == 1
    return Corpus(
        tokenizer=tokenizers[0],
        components=tuple(map(Component, names, train, weights)),
        train=TokenStream.concatenate(train),
        heldout=TokenStream.concatenate([of_split["heldout"] for of_split in streams]),
        statistics=manifests[0].statistics if single else {},
        fingerprint=fingerprints[0] if single else hashlib.sha256("".join(fingerprints).encode()).hexdigest()[:16],
    )


def _prepare_in_cache(data: DataConfig, progress: bool) -> pathlib.Path:
    settings = preparing.Settings(data.sources, data.tokenizer, data.tokenizer_vocab_size, data.heldout_fraction)
    parts = preparing.list_parts(data.sources)
    size = sum(part.num_bytes for part in parts)
    if size > _LARGEST_BYTES:
        raise InputError(f"config.data.sources = {data.sources!r}: {size / 2**30:.1f} GiB are too much to prepare on "
                         f"the fly; type: python -m illada_jax.prepare --source={','.join(data.sources)} --target=DIR "
                         f"--tokenizer={data.tokenizer}, then set config.data.sources to ('prepared:DIR',)")
    cache = cache_directory(data)
    target = cache / preparing.content_key(settings, parts)
    if not (target / shards.MANIFEST).exists():
        unfinished = shards.temporary_name(target)
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            preparing.prepare(settings, unfinished, progress=progress)
            rename_finished(unfinished, target, shards.MANIFEST)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return target


def rename_finished(source: pathlib.Path, target: pathlib.Path, last_file: str) -> None:
    """Moves a directory, whole or not at all, to its place in the cache; `last_file` shows that one is whole."""
    try:
        os.rename(source, target)
    except OSError:
        if not (target / last_file).exists():  # else another process was faster, with the same result
            raise


def cache_directory(data: DataConfig) -> pathlib.Path:
    """Where small corpora and examples are prepared."""
    if data.cache_dir:
        return pathlib.Path(data.cache_dir).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(base) if base else pathlib.Path.home() / ".cache") / "illada_jax"
