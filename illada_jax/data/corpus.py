"""From `config.data` to tokens: opens prepared corpora; prepares small corpora and examples in a cache first."""

import hashlib
import pathlib
from collections.abc import Callable
from dataclasses import dataclass, field

from illada_jax.config import Config, DataConfig
from illada_jax.data.manifest import MANIFEST, open_shards
from illada_jax.data.preparing.examples import prepare_examples
from illada_jax.data.preparing.settings import ExampleSettings, Settings, content_key, given_tokenizer
from illada_jax.data.preparing.text import list_parts, prepare
from illada_jax.data.shards import ExampleSet, TokenStream
from illada_jax.data.sources import examples
from illada_jax.data.tokenizers import Tokenizer, check_lossless
from illada_jax.errors import ConfigError, InputError
from illada_jax.files import cache_directory, new_directory

_PREPARED = "prepared:"
_LARGEST_BYTES = 2**30  # of a corpus that is prepared on the fly


@dataclass(frozen=True)
class Component:
    """One prepared corpus of a mixture.

    Attributes:
      name: its directory; its sources if it was prepared on the fly.
      train: its training stream.
      weight: share of the rows that come from it; all weights together are 1.
    """

    name: str
    train: TokenStream
    weight: float


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text as tokens.

    Attributes:
      tokenizer: the tokenizer of all components.
      train: the training streams, concatenated.
      heldout: the held-out streams, concatenated; empty if nothing is held out.
      fingerprint: identifies tokens and split.
      components: the corpora of the mixture; a single one without a mixture; none of examples.
      statistics: figures to compare a model with, by name, in bits per byte; empty for large corpora, mixtures and
        examples.
      dropped: report of documents or examples that were left out or cut, a line per reason; may be empty.
      split_warning: a line per corpus whose held-out share is far from what was asked; may be empty.
    """

    tokenizer: Tokenizer
    train: TokenStream
    heldout: TokenStream
    fingerprint: str
    components: tuple[Component, ...] = ()
    statistics: dict[str, float] = field(default_factory=dict)
    dropped: str = ""
    split_warning: str = ""


@dataclass(frozen=True, kw_only=True)
class Examples(Corpus):
    """Examples as tokens, for fine-tuning.

    Attributes:
      sources: their names, as in the config; `ExampleSet.sources_N` holds indices into them.
    """

    train: ExampleSet
    heldout: ExampleSet
    sources: tuple[str, ...]


def open_corpus(data: DataConfig, progress: bool = True) -> Corpus:
    """Opens the text of a config.

    Sources other than `prepared:DIR` are prepared into the cache unless they are in it; the key is a hash of their
    content, the tokenizer and the settings.

    Args:
      data: the section of the config.
      progress: show a bar on stderr while preparing.

    Raises:
      ConfigError: the sources cannot be combined, or weights do not apply.
      InputError: a source, the tokenizer or a shard cannot be read; names it.
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


def open_examples(config: Config, tokenizer: Tokenizer | None = None, progress: bool = True) -> Examples:
    """Opens the examples of a config; prepares them into the cache unless they are in it.

    Args:
      config: the config; the key in the cache is a hash of files, tokenizer and the settings that matter.
      tokenizer: that of config.init.checkpoint, if config.data.tokenizer is `checkpoint`.
      progress: show a bar on stderr while preparing.

    Raises:
      InputError: a source or the tokenizer cannot be read, no example is left to learn from, or one was left out
        although config.sft.strict is set; names it.
    """
    data, sft = config.data, config.sft
    if data.weights:
        raise InputError(f"config.data.weights = {data.weights!r}: weights are for prepared corpora; every example is "
                         "seen once per epoch")
    settings = ExampleSettings(data.sources, data.tokenizer, data.tokenizer_vocab_size, data.heldout_fraction,
                               length=data.length, over_length=sft.over_length, format=sft.format,
                               max_document_bytes=data.max_document_bytes)
    parts = [examples.parts(spec, settings.max_document_bytes) for spec in data.sources]
    if tokenizer is None:
        tokenizer = given_tokenizer(data.tokenizer)
    else:
        check_lossless(tokenizer, "config.data.tokenizer = checkpoint")
    if sft.chat_template:
        if tokenizer is None:
            raise InputError(f"config.sft.chat_template = {sft.chat_template!r}: a tokenizer that is trained on the "
                             "examples has no chat template")
        tokenizer.choose_chat_template(sft.chat_template)
    key = content_key(settings, [part for of_source in parts for part in of_source], tokenizer)
    directory = _cached(data, f"examples-{key}",
                        lambda target: prepare_examples(settings, parts, target, tokenizer, progress))
    manifest, tokenizer, streams = open_shards(directory)
    if sft.strict and manifest.dropped:
        raise InputError(f"config.sft.strict: {'; '.join(manifest.dropped)}")
    if not streams["train"].num_documents:
        raise InputError(f"config.data.sources = {data.sources!r}: no example is left to learn from"
                         + "".join(f"; {line}" for line in manifest.dropped))
    return Examples(tokenizer=tokenizer, **streams, fingerprint=manifest.fingerprint, sources=manifest.sources,
                    dropped="\n".join(manifest.dropped + manifest.divided), split_warning=manifest.split_warning)


def _open(directories: list[pathlib.Path], names: list[str], weights: tuple[float, ...]) -> Corpus:
    opened = [open_shards(directory) for directory in directories]
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
        dropped="\n".join(line for manifest in manifests for line in manifest.dropped),
        split_warning="\n".join(f"{name}: {manifest.split_warning}"
                                for name, manifest in zip(names, manifests, strict=True) if manifest.split_warning),
        fingerprint=fingerprints[0] if single else hashlib.sha256("".join(fingerprints).encode()).hexdigest()[:16],
    )


def _prepare_in_cache(data: DataConfig, progress: bool) -> pathlib.Path:
    settings = Settings(data.sources, data.tokenizer, data.tokenizer_vocab_size, data.heldout_fraction,
                        max_document_bytes=data.max_document_bytes)
    parts = list_parts(settings)
    size = sum(part.num_bytes for part in parts)
    if size > _LARGEST_BYTES:
        raise InputError(f"config.data.sources = {data.sources!r}: {size / 2**30:.1f} GiB, too large to prepare on "
                         f"the fly; run: python -m illada_jax.prepare --source={','.join(data.sources)} --target=DIR "
                         f"--tokenizer={data.tokenizer}, then set config.data.sources to ('prepared:DIR',)")
    key = content_key(settings, parts, given_tokenizer(data.tokenizer))
    return _cached(data, key, lambda target: prepare(settings, target, progress=progress))


def _cached(data: DataConfig, name: str, prepare_in: Callable[[pathlib.Path], object]) -> pathlib.Path:
    """A directory of the cache, prepared if it is missing. Safe against kills and other processes."""
    target = pathlib.Path(data.cache_dir or cache_directory()).expanduser() / name
    if not (target / MANIFEST).exists():
        with new_directory(target, keep_existing=True) as unfinished:
            prepare_in(unfinished)
    return target
