"""Token shards: the documents of a corpus, text or examples, as tokens in ArrayRecord files.

A shard holds the tokens of whole documents, each with its end token, as records of `CHUNK_TOKENS` little-endian ids
(the last record may be shorter). After them come the offsets of the documents in the shard, as records of as many
uint64. Ids of text are uint16, or uint32 if the vocabulary is larger. Ids of examples are int32, and their sign bit is
the answer mask: set for the tokens of answers. The bit below is set for tokens that are never masked, of messages that
are seen, not learnt. The training length is not part of the format.
"""

import array
import bisect
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from illada_jax.errors import InputError, StorageError
from illada_jax.files import temporary_path

CHUNK_TOKENS = 8192

_OPEN_READERS = 256
_ID_BITS = 2**30 - 1
_FIXED_BIT = 2**30
_ANSWER_BIT = -(2**31)


@dataclass(frozen=True)
class ShardInfo:
    """The description of a shard in the manifest.

    Attributes:
      name: its file name.
      num_tokens: tokens, end tokens included.
      num_documents: documents.
      num_bytes: UTF-8 bytes of their text.
      size: bytes of the file.
      sha256: checksum of the file.
      source: index of the source that its examples are from; 0 for text.
    """

    name: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    size: int
    sha256: str
    source: int

    def __post_init__(self):
        """Raises TypeError if a value is of another type, or the numbers contradict each other."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not field.type or (field.type is int and value < 0):
                raise TypeError(f"{field.name} of a shard is {value!r}")
        if pathlib.PurePath(self.name).name != self.name or not self.name.isprintable():
            raise TypeError(f"{self.name!r} is not the name of a file in this directory")
        if not 0 < self.num_documents <= self.num_tokens:
            raise TypeError(f"{self.name} cannot hold {self.num_tokens} tokens of {self.num_documents} documents")

    @property
    def num_records(self) -> int:
        """Records in the file."""
        return sum(-(-number // CHUNK_TOKENS) for number in (self.num_tokens, self.num_documents))


class ShardWriter:
    """Writes one shard, of text or of examples from one source. `close` creates it, atomically.

    `add` and `close` raise StorageError if writing fails.
    """

    def __init__(self, path: pathlib.Path, vocab_size: int, has_answers: bool = False, source: int = 0):
        self._path = path
        self._source = source
        self._temporary = temporary_path(path)
        self._writer = None
        self._dtype = _id_dtype(vocab_size, has_answers)
        self._pending: list[np.ndarray] = []
        self._pending_tokens = 0
        self._offsets = array.array("Q")
        self._num_tokens = self._num_bytes = 0

    def add(self, ids: Sequence[int], num_bytes: int, is_answer: Sequence[bool] = (), is_fixed: Sequence[bool] = ()
            ) -> None:
        """Adds a document.

        Args:
          ids: its tokens, the end token included.
          num_bytes: UTF-8 bytes of its text.
          is_answer: for examples, True for each token of an answer.
          is_fixed: for examples, True for each token that is never masked.
        """
        values = np.array(ids, self._dtype)
        for flags, bit in ((is_answer, _ANSWER_BIT), (is_fixed, _FIXED_BIT)):
            if len(flags):
                values[np.asarray(flags, bool)] |= bit
        self._offsets.append(self._num_tokens)
        self._pending.append(values)
        self._pending_tokens += len(values)
        self._num_tokens += len(values)
        self._num_bytes += num_bytes
        if self._pending_tokens >= CHUNK_TOKENS:
            tokens = np.concatenate(self._pending)
            whole = len(tokens) // CHUNK_TOKENS * CHUNK_TOKENS
            self._write_records(tokens[:whole])
            self._pending, self._pending_tokens = [tokens[whole:]], len(tokens) - whole

    def close(self) -> ShardInfo | None:
        """Finishes the file and moves it into place; returns None if there was no document."""
        if not self._offsets:
            return None
        self._write_records(np.concatenate(self._pending))
        self._write_records(np.array(self._offsets, "<u8"))
        with self._writing():
            self._writer.close()
        info = ShardInfo(self._path.name, self._num_tokens, len(self._offsets), self._num_bytes,
                         self._temporary.stat().st_size, file_sha256(self._temporary), self._source)
        self._temporary.replace(self._path)
        return info

    def _write_records(self, values: np.ndarray) -> None:
        with self._writing():
            if self._writer is None:
                # Groups of one record, because records are read one by one.
                self._writer = ArrayRecordWriter(str(self._temporary), "group_size:1")
            for start in range(0, len(values), CHUNK_TOKENS):
                self._writer.write(values[start : start + CHUNK_TOKENS].tobytes())

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:  # depends on the status of the C++ library
            raise StorageError(f"{self._path}: cannot be written: {str(error).splitlines()[0]}") from error


class TokenStream:
    """The tokens of consecutive shards, with random access to any range of them.

    Shards are opened when they are first read. The number of open files and of cached chunks is bounded. Thread-safe.

    Attributes:
      num_tokens: tokens, end tokens included.
      num_bytes: UTF-8 bytes of the original text.
      num_documents: documents.
      eos_id: id of EOS, which ends every document of text.
    """

    _has_answers = False
    _cached_chunks = 1024

    def __init__(self, shards: Sequence[tuple[pathlib.Path, ShardInfo]], vocab_size: int, eos_id: int):
        self._shards = shards
        self._dtype = _id_dtype(vocab_size, self._has_answers)
        self._vocab_size = vocab_size
        self.eos_id = eos_id
        self.num_tokens = sum(info.num_tokens for _, info in shards)
        self.num_bytes = sum(info.num_bytes for _, info in shards)
        self.num_documents = sum(info.num_documents for _, info in shards)
        # Where each shard begins, and the end.
        self._token_starts = list(itertools.accumulate((info.num_tokens for _, info in shards), initial=0))
        self._document_starts = list(itertools.accumulate((info.num_documents for _, info in shards), initial=0))
        self._reader = functools.lru_cache(_OPEN_READERS)(self._open)
        self._record = functools.lru_cache(self._cached_chunks)(self._read_record)

    @classmethod
    def concatenate(cls, streams: Sequence["TokenStream"]) -> "TokenStream":
        """The concatenation of streams that have the same tokenizer."""
        every = [shard for stream in streams for shard in stream._shards]
        return cls(every, streams[0]._vocab_size, streams[0].eos_id)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int32.

        Raises:
          IndexError: the range is not within the stream.
          InputError: a shard cannot be read; names it.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of a stream of {self.num_tokens}")
        out = np.empty(stop - start, np.int32)
        position = start
        shard = bisect.bisect_right(self._token_starts, start) - 1
        while position < stop:
            if position == self._token_starts[shard + 1]:
                shard += 1
            chunk, offset = divmod(position - self._token_starts[shard], CHUNK_TOKENS)
            piece = self._record(shard, chunk)[offset : offset + stop - position]
            out[position - start : position - start + len(piece)] = piece
            position += len(piece)
        return out

    def document(self, index: int) -> np.ndarray:
        """The ids of a document (int32), its end token included. Raises IndexError if it is out of range."""
        return self.read(*self._document_range(index))

    def _document_range(self, index: int) -> tuple[int, int]:
        """Tokens [start, stop) of a document."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        return self._document_start(index), self._document_start(index + 1)

    def _document_start(self, index: int) -> int:
        if index == self.num_documents:
            return self.num_tokens
        shard = bisect.bisect_right(self._document_starts, index) - 1
        record, offset = divmod(index - self._document_starts[shard], CHUNK_TOKENS)
        return self._token_starts[shard] + int(self._offsets(shard, record)[offset])

    def _offsets(self, shard: int, record: int) -> np.ndarray:
        """A record of document offsets of a shard, uint64."""
        first = -(-self._shards[shard][1].num_tokens // CHUNK_TOKENS)
        return self._record(shard, first + record).view("<u8")

    def _open(self, shard: int) -> ArrayRecordReader:
        directory, info = self._shards[shard]
        path = directory / info.name
        try:
            reader = ArrayRecordReader(str(path), "readahead_buffer_size:0")
            num_records = reader.num_records()
        except Exception as error:  # depends on the status of the C++ library
            raise InputError(f"{path}: cannot be read as ArrayRecord: {str(error).splitlines()[0]}") from error
        if num_records != info.num_records:
            raise InputError(f"{path}: has {num_records} records, the manifest says {info.num_records}")
        return reader

    def _read_record(self, shard: int, record: int) -> np.ndarray:
        directory, info = self._shards[shard]
        reader = self._reader(shard)
        try:
            values = np.frombuffer(reader.read([record])[0], self._dtype)
        except Exception as error:
            raise InputError(f"{directory / info.name}: record {record} cannot be read: "
                             f"{str(error).splitlines()[0]}") from error
        expected = min(CHUNK_TOKENS, info.num_tokens - record * CHUNK_TOKENS)  # negative for records of offsets
        if 0 < expected != len(values):
            raise InputError(f"{directory / info.name}: record {record} holds {len(values)} ids, the manifest says "
                             f"{expected}")
        return values


class Question(NamedTuple):
    """An example as a prompt and the answer to it.

    Attributes:
      prompt: ids up to its last answer.
      answer: ids of that answer, without its end token.
    """

    prompt: list[int]
    answer: list[int]


class ExampleSet(TokenStream):
    """The examples of one split: a token stream with an answer mask. A document is an example.

    Attributes:
      lengths_N: int64 tokens of each example.
      sources_N: int32 index of the source that each example is from.
    """

    _has_answers = True
    _cached_chunks = 8192  # 256 MiB: fine-tuning reads documents in permuted order

    def __init__(self, shards: Sequence[tuple[pathlib.Path, ShardInfo]], vocab_size: int, eos_id: int):
        super().__init__(shards, vocab_size, eos_id)
        offsets = [self._token_starts[shard] + self._offsets(shard, record).astype(np.int64)
                   for shard, (_, info) in enumerate(shards)
                   for record in range(-(-info.num_documents // CHUNK_TOKENS))]
        self.lengths_N = np.diff(np.concatenate([*offsets, np.array([self.num_tokens], np.int64)]))
        self.sources_N = np.repeat(np.array([info.source for _, info in shards], np.int32),
                                   [info.num_documents for _, info in shards])

    def read(self, start: int, stop: int) -> np.ndarray:
        """See TokenStream."""
        return super().read(start, stop) & _ID_BITS

    def is_answer(self, index: int) -> np.ndarray:
        """The answer mask of an example: bool, True for each token of an answer."""
        return super().read(*self._document_range(index)) < 0

    def may_be_masked(self, index: int) -> np.ndarray:
        """The tokens of an example that may be masked: bool, False for messages that are seen, not learnt."""
        return super().read(*self._document_range(index)) & _FIXED_BIT == 0

    def question(self, index: int) -> Question:
        """An example as a prompt and its last answer."""
        tokens = self.document(index).tolist()
        start, stop = answer_spans(self.is_answer(index))[-1]
        return Question(tokens[:start], tokens[start : stop - 1])


def answer_spans(is_answer_L: np.ndarray) -> np.ndarray:
    """Columns [start, stop) of each answer in an answer mask, int64 [num_answers, 2]."""
    edges = np.flatnonzero(np.diff(is_answer_L.astype(np.int8), prepend=0, append=0))
    return edges.reshape(-1, 2)


def file_sha256(path: pathlib.Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _id_dtype(vocab_size: int, has_answers: bool) -> str:
    if has_answers:
        return "<i4"
    return "<u2" if vocab_size <= 2**16 else "<u4"
