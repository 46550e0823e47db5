"""Prepared corpora: directories of token shards with their tokenizer and a manifest that describes them.

Every file is written atomically, `manifest.json` last: a directory without it is unfinished.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
from dataclasses import dataclass

from illada_jax.data.shards import ExampleSet, ShardInfo, TokenStream
from illada_jax.data.tokenizers import Tokenizer, load_tokenizer
from illada_jax.errors import InputError
from illada_jax.files import read_json, write_atomically

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
TOKENIZER_DIRECTORY = "tokenizer"
SPLITS = ("train", "heldout")

_STAT_THREADS = 32


@dataclass(frozen=True)
class Manifest:
    """The description of a prepared corpus.

    Attributes:
      sources: the sources that were read.
      tokenizer: fingerprint of the tokenizer.
      vocab_size: ids of the tokenizer.
      heldout_fraction: requested share of held-out documents.
      splits: the shards of each split.
      statistics: figures to compare a model with, by name, in bits per byte; for small corpora of text only.
      has_answers: the shards hold examples, with an answer mask.
      dropped: examples or documents left out or truncated, a line per reason.
      divided: long examples split into several windows or rows, a line per reason.
    """

    sources: tuple[str, ...]
    tokenizer: str
    vocab_size: int
    heldout_fraction: float
    splits: dict[str, tuple[ShardInfo, ...]]
    statistics: dict[str, float] = dataclasses.field(default_factory=dict)
    has_answers: bool = False
    dropped: tuple[str, ...] = ()
    divided: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Identifies tokens and split: a hash over the tokenizer and the shards."""
        content = [self.tokenizer, {name: [info.sha256 for info in infos] for name, infos in self.splits.items()}]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def split_warning(self) -> str:
        """A line if the held-out share of the text is far from what was asked; else empty.

        Far: either side has less than half of its share, or the held-out side more than twice of it.
        """
        train, heldout = (sum(info.num_bytes for info in self.splits[split]) for split in SPLITS)
        asked, share = self.heldout_fraction, heldout / max(train + heldout, 1)
        if asked / 2 <= share <= min(2 * asked, (1 + asked) / 2):
            return ""
        return (f"warning: {share:.2%} of the text is held out, not {asked:.2%} (heldout_fraction): there are few "
                "documents, or some are much longer than others")

    def save(self, directory: pathlib.Path) -> None:
        """Writes `manifest.json`."""
        content = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        write_atomically(directory / MANIFEST, json.dumps(content, indent=1))

    @classmethod
    def load(cls, directory: pathlib.Path) -> "Manifest":
        """Reads `manifest.json`.

        Raises:
          InputError: the manifest is missing, malformed or of another format version.
        """
        path = directory / MANIFEST
        if not path.exists():
            raise InputError(f"{directory}: no prepared corpus ({MANIFEST} is missing: never finished); run: "
                             "python -m illada_jax.prepare --source=text:DIR --tokenizer=sentencepiece "
                             f"--target={directory}")
        content = read_json(path)
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise InputError(f"{path}: format version {version!r}, this program reads {FORMAT_VERSION}")
        try:
            values = {f.name: content[f.name] for f in dataclasses.fields(cls)}
            for name in ("sources", "dropped", "divided"):
                values[name] = tuple(map(str, values[name]))
            values["splits"] = {split: tuple(ShardInfo(**shard) for shard in values["splits"][split])
                                for split in SPLITS}
            return cls(**values | {"statistics": dict(values["statistics"])})
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: malformed: {error}") from error


def open_shards(directory: pathlib.Path) -> tuple[Manifest, Tokenizer, dict[str, TokenStream]]:
    """Opens a prepared directory: manifest, tokenizer, and a stream for each split.

    Raises:
      InputError: the directory is unfinished, a shard has the wrong size, or the tokenizer is not the one that
        made the shards; names the file.
    """
    manifest = Manifest.load(directory)
    tokenizer = load_tokenizer(directory / TOKENIZER_DIRECTORY)
    if (tokenizer.fingerprint, tokenizer.vocab_size) != (manifest.tokenizer, manifest.vocab_size):
        raise InputError(f"{directory / MANIFEST}: made with another tokenizer (fingerprint {manifest.tokenizer}, "
                         f"{directory / TOKENIZER_DIRECTORY} has {tokenizer.fingerprint})")
    # In threads: on a mounted bucket every stat call is slow, and there may be thousands.
    with concurrent.futures.ThreadPoolExecutor(_STAT_THREADS) as pool:
        list(pool.map(functools.partial(_check_size, directory), itertools.chain(*manifest.splits.values())))
    stream = ExampleSet if manifest.has_answers else TokenStream
    streams = {
        split: stream([(directory, info) for info in infos], manifest.vocab_size, tokenizer.eos_id)
        for split, infos in manifest.splits.items()
    }
    return manifest, tokenizer, streams


def _check_size(directory: pathlib.Path, info: ShardInfo) -> None:
    path = directory / info.name
    try:
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: shard of the manifest cannot be opened: {error.strerror}") from error
    if size != info.size:
        raise InputError(f"{path}: has {size} bytes, the manifest says {info.size}: truncated or replaced; "
                         "prepare the corpus again")
