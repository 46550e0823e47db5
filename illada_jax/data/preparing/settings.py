"""Settings of a preparation, and the tokenizer and the cache key that follow from them."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from illada_jax.data.manifest import FORMAT_VERSION
from illada_jax.data.shards import file_sha256
from illada_jax.data.sources.registry import MAX_DOCUMENT_BYTES, Part
from illada_jax.data.tokenizers import ByteTokenizer, Tokenizer, check_lossless, load_tokenizer
from illada_jax.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """Settings of a preparation of text: everything that the shards depend on, besides the content of the sources.

    Attributes:
      sources: see `data/sources/registry.py`.
      tokenizer: `bytes`, `sentencepiece` (trained on the corpus) or a path.
      vocab_size: ids of a tokenizer that is trained here.
      heldout_fraction: share of the documents that is held out, chosen by hash.
      drop_duplicates: keep only the first of documents with the same text.
      shard_bytes: approximate size of the text of a shard; a part of a source (a file, say) is never divided.
      max_document_bytes: the longest document or record of a source.
    """

    sources: tuple[str, ...]
    tokenizer: str
    vocab_size: int
    heldout_fraction: float
    drop_duplicates: bool = False
    shard_bytes: int = 64 * 2**20
    max_document_bytes: int = MAX_DOCUMENT_BYTES

    def __post_init__(self):
        if not 0 <= self.heldout_fraction < 1:
            raise ConfigError(f"heldout_fraction = {self.heldout_fraction}: must lie in [0, 1)")
        for name in ("shard_bytes", "max_document_bytes"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be greater than 0")

    @property
    def split_below(self) -> int:
        """Documents with a smaller split hash (64 bits) are held out."""
        return int(self.heldout_fraction * 2**64)


@dataclass(frozen=True, kw_only=True)
class ExampleSettings(Settings):
    """Settings of a preparation of examples.

    Attributes:
      length: tokens of a window or row (config.data.length).
      over_length: see config.sft.over_length.
      format: see config.sft.format.
    """

    length: int
    over_length: Literal["split", "truncate", "drop"]
    format: Literal["illada", "llada"]
    shard_bytes: int = 16 * 2**20


def content_key(settings: Settings, parts: Iterable[Part], tokenizer: Tokenizer | None) -> str:
    """Identifies a prepared corpus: a hash over the settings, all bytes of the sources and the tokenizer.

    Args:
      settings: the settings.
      parts: the parts of all sources.
      tokenizer: None if it is trained on the corpus.
    """
    values = dataclasses.asdict(settings)
    if tokenizer is not None:  # by its files, whatever their path; chat templates decide how examples are written
        files = tokenizer.files()
        values["tokenizer"] = [[name, hashlib.sha256(files[name]).hexdigest()] for name in sorted(files)]
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, values]).encode())
    for path in dict.fromkeys(path for part in parts for path in part.files):
        digest.update(file_sha256(path).encode())
    return digest.hexdigest()[:24]


def given_tokenizer(name: str) -> Tokenizer | None:
    """The tokenizer of a setting, or None for `sentencepiece`, which is trained on the corpus.

    Raises:
      InputError: it cannot be read, or it is not lossless.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name == "sentencepiece":
        return None
    tokenizer = load_tokenizer(name)
    check_lossless(tokenizer, f"tokenizer {name}")
    return tokenizer
