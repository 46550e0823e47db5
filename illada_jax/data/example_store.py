"""Examples as tokens on disk: encoded once into the cache, then read by memory mapping, in any order.

A store is a directory: `train/` and `heldout/` with `tokens.bin` (int32), `answers.bin` (bool, one for each token: it
belongs to an answer), `offsets.npy` (int64 [N + 1]) and `sources.npy` (int32 [N]); the tokenizer; `report.json` with
what was left out and why.
"""

import collections
import hashlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from illada_jax.config import Config
from illada_jax.data import shards
from illada_jax.data.corpus import cache_directory, rename_finished
from illada_jax.data.preparing.corpora import check_lossless
from illada_jax.data.preparing.jobs import in_processes
from illada_jax.data.sources import examples as reading
from illada_jax.data.sources.examples import Example, ExamplePart, RejectedExample
from illada_jax.data.sources.registry import split_hash
from illada_jax.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer, train_sentencepiece
from illada_jax.data.tokenizers.chat import Conversation, encode_conversation
from illada_jax.errors import InputError

_FORMAT_VERSION = 1
_SPLITS = ("train", "heldout")
_WORTH_PROCESSES = 32 * 2**20  # bytes
_SHOWN = 3  # places that are named for each reason


class Question(NamedTuple):
    """A held-out example as something to ask.

    Attributes:
      prompt: ids up to its last answer.
      answer: ids of that answer, without its end token.
    """

    prompt: list[int]
    answer: list[int]


class ExampleSet:
    """The examples of one split.

    Attributes:
      num_documents: how many there are (N).
      num_tokens: their tokens, end tokens included.
      num_bytes: UTF-8 bytes of their text.
      lengths_N: int64 tokens of each.
      sources_N: int32, the number of the source that each is from.
    """

    def __init__(self, directory: pathlib.Path, num_bytes: int):
        self._offsets = np.load(directory / "offsets.npy")
        self.num_documents = len(self._offsets) - 1
        self.num_tokens = int(self._offsets[-1])
        self.num_bytes = num_bytes
        self.lengths_N = np.diff(self._offsets)
        self.sources_N = np.load(directory / "sources.npy")
        size = (self.num_tokens,)
        # An empty file cannot be mapped.
        self._tokens = np.memmap(directory / "tokens.bin", np.int32, "r", shape=size) if size[0] else np.empty(0, "i4")
        self._answers = np.memmap(directory / "answers.bin", bool, "r", shape=size) if size[0] else np.empty(0, bool)

    def document(self, index: int) -> np.ndarray:
        """The ids of an example, int32."""
        return np.asarray(self._tokens[self._offsets[index] : self._offsets[index + 1]])

    def is_answer(self, index: int) -> np.ndarray:
        """For each token of an example, whether it belongs to an answer, bool."""
        return np.asarray(self._answers[self._offsets[index] : self._offsets[index + 1]])

    def question(self, index: int) -> Question:
        """An example as a prompt and its last answer."""
        tokens = self.document(index).tolist()
        start, stop = answer_spans(self.is_answer(index))[-1]
        return Question(tokens[:start], tokens[start : stop - 1])


def answer_spans(is_answer_L: np.ndarray) -> np.ndarray:
    """Where answers begin and end: int64 [answers, 2], columns [start, stop)."""
    edges = np.flatnonzero(np.diff(is_answer_L.astype(np.int8), prepend=0, append=0))
    return edges.reshape(-1, 2)


@dataclass(frozen=True)
class Examples:
    """What is fine-tuned on; to commands and evaluators the counterpart of a Corpus.

    Attributes:
      tokenizer: what made the tokens.
      train: the examples to learn from.
      heldout: those that training never sees.
      statistics: empty; corpora have some.
      dropped: what was left out or cut, a line a reason; empty if nothing was.
      sources: their names, as in the config.
      fingerprint: identifies tokens and split.
    """

    tokenizer: Tokenizer
    train: ExampleSet
    heldout: ExampleSet
    statistics: dict[str, float]
    dropped: str
    sources: tuple[str, ...]
    fingerprint: str


def open_examples(config: Config, tokenizer: Tokenizer | None = None, progress: bool = True) -> Examples:
    """Opens what `config.data.sources` names; encodes it into the cache if it is not there.

    Args:
      config: the experiment; its key in the cache is a hash of files, tokenizer and the settings that matter.
      tokenizer: that of config.init.checkpoint, where config.data.tokenizer is `checkpoint`.
      progress: show a bar on stderr while encoding.

    Raises:
      InputError: a source or the tokenizer is no good, nothing is left to learn from, or config.sft.strict and
        something was left out; names it.
    """
    parts = [(number, part) for number, spec in enumerate(config.data.sources) for part in reading.parts(spec)]
    if config.data.weights:
        raise InputError(f"config.data.weights = {config.data.weights!r}: weights are for prepared corpora; examples "
                         "are all seen once per epoch")
    tokenizer = tokenizer or _given_tokenizer(config.data.tokenizer)
    key = _key(config, parts, tokenizer)
    target = cache_directory(config.data) / f"examples-{key}"
    if not (target / "report.json").exists():
        unfinished = shards.temporary_name(target)
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            _write(config, parts, tokenizer, unfinished, progress)
            rename_finished(unfinished, target, "report.json")
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    report = json.loads((target / "report.json").read_text())
    if config.sft.strict and report["losses"]:
        raise InputError(f"config.sft.strict: {'; '.join(report['losses'])}")
    train, heldout = (ExampleSet(target / split, report["num_bytes"][split]) for split in _SPLITS)
    if not train.num_documents:
        raise InputError(f"config.data.sources = {config.data.sources!r}: no example is left to learn from"
                         + "".join(f"; {line}" for line in report["losses"]))
    return Examples(load_tokenizer(target / shards.TOKENIZER_DIRECTORY), train, heldout, {},
                    "\n".join(report["losses"] + report["splits"]), config.data.sources, key)


def _given_tokenizer(name: str) -> Tokenizer | None:
    """The tokenizer of the config, or None if it is to be trained."""
    if name == "bytes":
        return ByteTokenizer()
    if name == "sentencepiece":
        return None
    tokenizer = load_tokenizer(name)
    check_lossless(tokenizer, name)
    return tokenizer


def _key(config: Config, parts: list[tuple[int, ExamplePart]], tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        made_by = [config.data.tokenizer, str(config.data.tokenizer_vocab_size)]
    else:
        files = tokenizer.files()  # chat templates too: they decide what conversations look like
        made_by = [f"{name} {hashlib.sha256(files[name]).hexdigest()}" for name in sorted(files)]
    settings = [_FORMAT_VERSION, made_by, config.data.sources, config.data.heldout_fraction, config.data.length,
                config.sft.over_length, config.sft.format]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for path in dict.fromkeys(path for _, part in parts for path in part.files):
        digest.update(shards.file_sha256(path).encode())
    return digest.hexdigest()[:24]


def _write(config: Config, parts: list[tuple[int, ExamplePart]], tokenizer: Tokenizer | None,
           directory: pathlib.Path, progress: bool) -> None:
    """Encodes the parts, on all cores if there is much to do, and puts them together in their order."""
    if tokenizer is None:
        texts = (text for _, example in _read(parts) if isinstance(example, Example) for text in example.texts)
        tokenizer = train_sentencepiece(texts, config.data.tokenizer_vocab_size)
    tokenizer.save(directory / shards.TOKENIZER_DIRECTORY)
    jobs = [_Job(config, source, part, directory / f"part-{number}", directory / shards.TOKENIZER_DIRECTORY)
            for number, (source, part) in enumerate(parts)]
    size = sum(path.stat().st_size for _, part in parts for path in part.files)
    num_processes = min(len(jobs), os.cpu_count() or 1) if size > _WORTH_PROCESSES else 1
    tally = DropCounter()
    made = {}
    with tqdm(total=len(jobs), unit="part", desc="encoding", disable=None if progress else True) as bar:
        for job, found in in_processes(_encode_part, jobs, num_processes):
            made[job.directory] = found
            bar.update()
    num_bytes = dict.fromkeys(_SPLITS, 0)
    for job in jobs:
        part_tally, part_bytes = made[job.directory]
        tally.take(part_tally)
        for split in _SPLITS:
            num_bytes[split] += part_bytes[split]
    for split in _SPLITS:
        _join([job.directory / split for job in jobs], directory / split)
    for job in jobs:
        shutil.rmtree(job.directory)
    report = {"num_bytes": num_bytes, "losses": tally.lines("left out", "truncated"), "splits": tally.lines("split")}
    (directory / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1))


class _Job(NamedTuple):
    """What a process needs to encode a part."""

    config: Config
    source: int
    part: ExamplePart
    directory: pathlib.Path
    tokenizer: pathlib.Path


def _encode_part(job: _Job) -> tuple["DropCounter", dict[str, int]]:
    """Writes the examples of a part; what was left out, and the UTF-8 bytes of each split."""
    tokenizer = load_tokenizer(job.tokenizer)
    tally = DropCounter()
    below = job.config.data.heldout_fraction * 2**64
    writers = {split: _Writer(job.directory / split) for split in _SPLITS}
    for item in job.part.read():
        tally.total += 1
        split = "train"
        if isinstance(item, Example):
            split = "heldout" if split_hash(item.group) < below else "train"
            item = encode(item, tokenizer)
        for piece in [item] if isinstance(item, RejectedExample) else _fit(item, job.config, tally):
            if isinstance(piece, RejectedExample):
                tally.add(piece)
            else:
                text = tokenizer.decode(piece.conversation.ids)
                writers[split].add(piece.conversation, len(text.encode()), job.source)
    return tally, {split: writer.close() for split, writer in writers.items()}


def _join(directories: list[pathlib.Path], target: pathlib.Path) -> None:
    """Puts splits one after the other."""
    target.mkdir()
    for name in ("tokens.bin", "answers.bin"):
        with (target / name).open("wb") as joined:
            for directory in directories:
                with (directory / name).open("rb") as file:
                    shutil.copyfileobj(file, joined)
    lengths = [np.diff(np.load(directory / "offsets.npy")) for directory in directories]
    np.save(target / "offsets.npy", np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64))
    np.save(target / "sources.npy", np.concatenate([np.load(directory / "sources.npy") for directory in directories]))


def _read(parts: list[tuple[int, ExamplePart]]) -> Iterator[tuple[int, Example | RejectedExample]]:
    for source, part in parts:
        for item in part.read():
            yield source, item


@dataclass(frozen=True)
class Encoded:
    """An example as tokens, and its place in the source."""

    where: str
    conversation: Conversation


def encode(example: Example, tokenizer: Tokenizer) -> Encoded | RejectedExample:
    """The tokens of an example: a conversation through the chat template, a pair as prompt + response + one EOS."""
    if example.messages:
        try:
            return Encoded(example.where, encode_conversation(tokenizer, example.messages))
        except InputError as error:
            return RejectedExample(example.where, "chat template", str(error))
    prompt, response = tokenizer.encode(example.prompt), [*tokenizer.encode(example.response), tokenizer.eos_id]
    return Encoded(example.where, Conversation(prompt + response, [False] * len(prompt) + [True] * len(response)))


def _fit(encoded: Encoded | RejectedExample, config: Config, tally: "DropCounter") -> Iterable[Encoded | RejectedExample]:
    """Deals with an example that is longer than a window or a row."""
    if isinstance(encoded, RejectedExample):
        return [encoded]
    ids, is_answer = encoded.conversation
    limit, rule = config.data.length, config.sft.over_length
    if len(ids) <= limit:
        return [encoded]
    too_long = RejectedExample(encoded.where, f"longer than config.data.length = {limit}", f"{len(ids)} tokens")
    if rule == "drop":
        return [too_long]
    tally.add(too_long, "split" if rule == "split" else "truncated")
    if rule == "split" and config.sft.format == "illada":
        return [encoded]  # windows run on: nothing of it is lost
    pieces = [Conversation(ids[i : i + limit], is_answer[i : i + limit]) for i in range(0, len(ids), limit)]
    return [
        Encoded(encoded.where, piece) if any(piece.is_answer) or config.sft.format == "illada"
        else RejectedExample(encoded.where, "a piece of a long example without any answer")
        for piece in (pieces[:1] if rule == "truncate" else pieces)
    ]


class _Writer:
    """Appends examples to the files of a split."""

    def __init__(self, directory: pathlib.Path):
        directory.mkdir(parents=True)
        self._directory = directory
        self._tokens = (directory / "tokens.bin").open("wb")
        self._answers = (directory / "answers.bin").open("wb")
        self._offsets = [0]
        self._sources: list[int] = []
        self._num_bytes = 0

    def add(self, conversation: Conversation, num_bytes: int, source: int) -> None:
        self._tokens.write(np.asarray(conversation.ids, np.int32).tobytes())
        self._answers.write(np.asarray(conversation.is_answer, bool).tobytes())
        self._offsets.append(self._offsets[-1] + len(conversation.ids))
        self._sources.append(source)
        self._num_bytes += num_bytes

    def close(self) -> int:
        """Finishes the files; the UTF-8 bytes of the text."""
        self._tokens.close()
        self._answers.close()
        np.save(self._directory / "offsets.npy", np.asarray(self._offsets, np.int64))
        np.save(self._directory / "sources.npy", np.asarray(self._sources, np.int32))
        return self._num_bytes


class DropCounter:
    """Counts what was left out, and what was cut, by reason."""

    def __init__(self):
        self.total = 0
        self._places: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
        self._counts: collections.Counter[tuple[str, str]] = collections.Counter()

    def add(self, bad: RejectedExample, fate: str = "left out") -> None:
        self._counts[fate, bad.reason] += 1
        if len(self._places[fate, bad.reason]) < _SHOWN:
            self._places[fate, bad.reason].append(bad.where + (f" ({bad.detail})" if bad.detail else ""))

    def take(self, other: "DropCounter") -> None:
        """Adds up what another one, of the part that comes next, has counted."""
        self.total += other.total
        self._counts += other._counts
        for key, places in other._places.items():
            self._places[key] = (self._places[key] + places)[:_SHOWN]

    def lines(self, *fates: str) -> list[str]:
        """One line a reason, the most frequent first."""
        return [
            f"{count:,} of {self.total:,} examples {fate}: {reason}: " + "; ".join(self._places[fate, reason])
            + ("; …" if count > _SHOWN else "")
            for (fate, reason), count in self._counts.most_common() if fate in fates
        ]


def report_dropped(examples: Examples) -> None:
    """Says on stderr what was left out."""
    if examples.dropped:
        print(examples.dropped, file=sys.stderr, flush=True)
