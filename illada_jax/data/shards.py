"""Token shards: the token stream of a corpus in ArrayRecord files, with a manifest that makes them a whole.

A directory holds `manifest.json`, `tokenizer/` and shards. A shard holds the tokens of whole documents, each followed
by EOS, as records of `CHUNK_TOKENS` little-endian ids (the last one shorter), and after them the documents' offsets
in the shard, as records of as many uint64. The training length is not part of the format. Everything is written under a
temporary name and renamed, the manifest last: a directory without one is not a corpus.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from illada_jax.data.tokenizers import Tokenizer, load_tokenizer
from illada_jax.errors import InputError, StorageError

FORMAT_VERSION = 1
CHUNK_TOKENS = 8192
MANIFEST = "manifest.json"
TOKENIZER_DIRECTORY = "tokenizer"
SPLITS = ("train", "heldout")

_OPEN_READERS = 256
_CACHED_CHUNKS = 1024
_STAT_THREADS = 32


@dataclass(frozen=True)
class ShardInfo:
    """What the manifest says about a shard.

    Attributes:
      name: its file name.
      num_tokens: tokens, EOS included.
      num_documents: documents.
      num_bytes: UTF-8 bytes of the original text.
      num_records: records in the file.
      size: bytes of the file.
      sha256: checksum of the file.
    """

    name: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    num_records: int
    size: int
    sha256: str

    def checked(self) -> "ShardInfo":
        """Itself. Raises TypeError where something is no such value, or the numbers contradict each other."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not field.type or (field.type is int and value < 0):
                raise TypeError(f"{field.name} of a shard is {value!r}")
        if pathlib.PurePath(self.name).name != self.name or not self.name.isprintable():
            raise TypeError(f"{self.name!r} is not the name of a file beside it")
        records = sum(-(-number // CHUNK_TOKENS) for number in (self.num_tokens, self.num_documents))
        if not 0 < self.num_documents <= self.num_tokens or records != self.num_records:
            raise TypeError(f"{self.name} cannot hold {self.num_tokens} tokens of {self.num_documents} documents in "
                            f"{self.num_records} records")
        return self


@dataclass(frozen=True)
class Manifest:
    """What a prepared directory holds.

    Attributes:
      sources: the sources that were read.
      tokenizer: fingerprint of the tokenizer.
      vocab_size: its size; ids take uint16 if they fit, else uint32.
      heldout_fraction: share of the documents that was to be held out.
      statistics: figures to compare a model with, by name, in bits per byte; for small corpora only.
      splits: the shards of each split.
    """

    sources: tuple[str, ...]
    tokenizer: str
    vocab_size: int
    heldout_fraction: float
    statistics: dict[str, float]
    splits: dict[str, tuple[ShardInfo, ...]]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies tokens and split: a hash over the tokenizer and the shards."""
        content = [self.tokenizer, {name: [shard.sha256 for shard in shards] for name, shards in self.splits.items()}]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def save(self, directory: pathlib.Path) -> None:
        """Writes `manifest.json`."""
        totals = {
            split: {f"num_{what}": sum(getattr(shard, f"num_{what}") for shard in shards)
                    for what in ("tokens", "documents", "bytes")}
            for split, shards in self.splits.items()
        }
        content = {"format_version": FORMAT_VERSION, "chunk_tokens": CHUNK_TOKENS, "totals": totals,
                   **dataclasses.asdict(self)}
        write_atomically(directory / MANIFEST, json.dumps(content, indent=1).encode())

    @classmethod
    def load(cls, directory: pathlib.Path) -> "Manifest":
        """Reads `manifest.json`.

        Raises:
          InputError: it is missing, broken, or of another format version.
        """
        path = directory / MANIFEST
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise InputError(f"{directory}: no prepared corpus ({MANIFEST} is missing, so it was never finished); "
                             "python -m illada_jax.prepare --source=text:DIR --tokenizer=sentencepiece "
                             f"--target={directory} makes one") from error
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read: {error}") from error
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise InputError(f"{path}: format version {version!r}, this program reads {FORMAT_VERSION}")
        try:
            if content["chunk_tokens"] != CHUNK_TOKENS:
                raise InputError(f"{path}: chunk_tokens {content['chunk_tokens']!r}, this program reads {CHUNK_TOKENS}")
            values = {f.name: content[f.name] for f in dataclasses.fields(cls)}
            values["sources"] = tuple(values["sources"])
            values["splits"] = {split: tuple(ShardInfo(**shard).checked() for shard in values["splits"][split])
                                for split in SPLITS}
            if not isinstance(values["statistics"], dict):
                raise TypeError("statistics is no object")
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}: broken: {error}") from error


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Writes a file so that it is there whole or not at all."""
    temporary = temporary_name(path)
    temporary.write_bytes(content)
    os.replace(temporary, path)


def temporary_name(path: pathlib.Path) -> pathlib.Path:
    """Where a file or directory is written before it is renamed. Another process, on any host, writes elsewhere."""
    return path.with_name(f"{path.name}.tmp-{socket.gethostname()}-{os.getpid()}")


class ShardWriter:
    """Writes one shard. Nothing is at `path` before `close`. `add` and `close` raise StorageError if writing fails."""

    def __init__(self, path: pathlib.Path, tokenizer: Tokenizer):
        self._path = path
        self._temporary = temporary_name(path)
        self._writer = None
        self._dtype = _id_dtype(tokenizer.vocab_size)
        self._eos_id = tokenizer.eos_id
        self._pending: list[np.ndarray] = []
        self._pending_tokens = 0
        self._offsets: list[int] = []
        self._num_tokens = self._num_bytes = self._num_records = 0

    def add(self, ids: list[int], num_bytes: int) -> None:
        """Adds a document: its ids without EOS, and how many bytes of UTF-8 they stand for."""
        self._offsets.append(self._num_tokens)
        self._pending.append(np.array([*ids, self._eos_id], self._dtype))
        self._pending_tokens += len(ids) + 1
        self._num_tokens += len(ids) + 1
        self._num_bytes += num_bytes
        if self._pending_tokens >= CHUNK_TOKENS:
            tokens = np.concatenate(self._pending)
            whole = len(tokens) // CHUNK_TOKENS * CHUNK_TOKENS
            self._write_records(tokens[:whole])
            self._pending, self._pending_tokens = [tokens[whole:]], len(tokens) - whole

    def close(self) -> ShardInfo | None:
        """Finishes the file and puts it at its place; None if there was no document."""
        if not self._offsets:
            return None
        self._write_records(np.concatenate(self._pending))
        self._write_records(np.array(self._offsets, "<u8"))
        with self._writing():
            self._writer.close()
        info = ShardInfo(self._path.name, self._num_tokens, len(self._offsets), self._num_bytes, self._num_records,
                         self._temporary.stat().st_size, file_sha256(self._temporary))
        os.replace(self._temporary, self._path)
        return info

    def _write_records(self, values: np.ndarray) -> None:
        with self._writing():
            if self._writer is None:
                # One record a group: records are read one by one.
                self._writer = ArrayRecordWriter(str(self._temporary), "group_size:1")
            for start in range(0, len(values), CHUNK_TOKENS):
                self._writer.write(values[start : start + CHUNK_TOKENS].tobytes())
                self._num_records += 1

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:  # the library raises whatever its C++ status became
            raise StorageError(f"{self._path}: cannot be written: {str(error).splitlines()[0]}") from error


class TokenStream:
    """The tokens of shards one after the other, with random access to any stretch of them.

    Shards are opened when they are first read; a bounded number of open files and chunks is kept. Safe to share between
    threads.

    Attributes:
      num_tokens: tokens, EOS included.
      num_bytes: UTF-8 bytes of the original text.
      num_documents: documents.
      eos_id: the id that ends every document.
    """

    def __init__(self, shards: list[tuple[pathlib.Path, ShardInfo]], vocab_size: int, eos_id: int):
        self._shards = shards
        self._dtype = _id_dtype(vocab_size)
        self._vocab_size = vocab_size
        self.eos_id = eos_id
        self.num_tokens = sum(info.num_tokens for _, info in shards)
        self.num_bytes = sum(info.num_bytes for _, info in shards)
        self.num_documents = sum(info.num_documents for _, info in shards)
        self._token_starts = np.cumsum([0] + [info.num_tokens for _, info in shards])
        self._document_starts = np.cumsum([0] + [info.num_documents for _, info in shards])
        self._reader = functools.lru_cache(_OPEN_READERS)(self._open)
        self._record = functools.lru_cache(_CACHED_CHUNKS)(self._read_record)

    @classmethod
    def concatenate(cls, streams: Sequence["TokenStream"]) -> "TokenStream":
        """One stream after the other; they have the same tokenizer."""
        every = [shard for stream in streams for shard in stream._shards]
        return cls(every, streams[0]._vocab_size, streams[0].eos_id)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int32.

        Raises:
          IndexError: they are not all there.
          InputError: a shard cannot be read; names it.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of a stream of {self.num_tokens}")
        out = np.empty(stop - start, np.int32)
        position = start
        shard = int(np.searchsorted(self._token_starts, start, "right")) - 1
        while position < stop:
            local = position - int(self._token_starts[shard])
            if local >= self._shards[shard][1].num_tokens:
                shard += 1
                continue
            chunk, offset = divmod(local, CHUNK_TOKENS)
            piece = self._record(shard, chunk)[offset : offset + stop - position]
            out[position - start : position - start + len(piece)] = piece
            position += len(piece)
        return out

    def document(self, index: int) -> np.ndarray:
        """The ids of a document (int32), its EOS included.

        Raises:
          IndexError: there is no such document.
        """
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        shard = int(np.searchsorted(self._document_starts, index, "right")) - 1
        local = index - int(self._document_starts[shard])
        info = self._shards[shard][1]
        start = self._document_offset(shard, local)
        stop = self._document_offset(shard, local + 1) if local + 1 < info.num_documents else info.num_tokens
        base = int(self._token_starts[shard])
        return self.read(base + start, base + stop)

    def _document_offset(self, shard: int, local: int) -> int:
        first = -(-self._shards[shard][1].num_tokens // CHUNK_TOKENS)
        record, offset = divmod(local, CHUNK_TOKENS)
        return int(self._record(shard, first + record).view("<u8")[offset])

    def _open(self, shard: int) -> ArrayRecordReader:
        directory, info = self._shards[shard]
        path = directory / info.name
        try:
            reader = ArrayRecordReader(str(path), "readahead_buffer_size:0")
            num_records = reader.num_records()
        except Exception as error:  # the library raises whatever its C++ status became
            raise InputError(f"{path}: cannot be read as ArrayRecord: {str(error).splitlines()[0]}") from error
        if num_records != info.num_records:
            raise InputError(f"{path}: has {num_records} records, the manifest says {info.num_records}")
        return reader

    def _read_record(self, shard: int, record: int) -> np.ndarray:
        try:
            return np.frombuffer(self._reader(shard).read([record])[0], self._dtype)
        except InputError:
            raise
        except Exception as error:
            directory, info = self._shards[shard]
            raise InputError(f"{directory / info.name}: record {record} cannot be read: "
                             f"{str(error).splitlines()[0]}") from error


def open_shards(directory: pathlib.Path) -> tuple[Manifest, Tokenizer, dict[str, TokenStream]]:
    """Opens a prepared directory: manifest, tokenizer, and a stream for each split.

    Raises:
      InputError: it is not whole, a shard does not have its size, or the tokenizer is not the one that made the shards;
        names the file.
    """
    manifest = Manifest.load(directory)
    tokenizer = load_tokenizer(directory / TOKENIZER_DIRECTORY)
    if (tokenizer.fingerprint, tokenizer.vocab_size) != (manifest.tokenizer, manifest.vocab_size):
        raise InputError(f"{directory / MANIFEST}: made with another tokenizer (fingerprint {manifest.tokenizer}, "
                         f"{directory / TOKENIZER_DIRECTORY} has {tokenizer.fingerprint})")
    _check_sizes(directory, [info for infos in manifest.splits.values() for info in infos])
    streams = {
        split: TokenStream([(directory, info) for info in shards], manifest.vocab_size, tokenizer.eos_id)
        for split, shards in manifest.splits.items()
    }
    return manifest, tokenizer, streams


def _check_sizes(directory: pathlib.Path, infos: list[ShardInfo]) -> None:
    """Checks that shards are there and have their size, without reading them."""

    def check(info: ShardInfo) -> None:
        path = directory / info.name
        try:
            size = path.stat().st_size
        except OSError as error:
            raise InputError(f"{path}: the manifest names this shard, but: {error.strerror}") from error
        if size != info.size:
            raise InputError(f"{path}: has {size} bytes, the manifest says {info.size}: truncated or not the same "
                             "file; prepare the corpus again")

    # On a mounted bucket every look takes its time, and there may be thousands.
    with concurrent.futures.ThreadPoolExecutor(_STAT_THREADS) as pool:
        for _ in pool.map(check, infos):
            pass


def file_sha256(path: pathlib.Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _id_dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 2**16 else "<u4"
