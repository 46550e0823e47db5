"""Examples to token shards with an answer mask."""

import functools
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from illada_jax.data.preparing.jobs import (
    DONE_DIRECTORY,
    TRAINING_BYTES,
    EncodedDocument,
    Report,
    ShardJob,
    group_parts,
    make_locally,
    run_jobs,
)
from illada_jax.data.preparing.settings import ExampleSettings
from illada_jax.data.sources.examples import Example
from illada_jax.data.sources.records import RejectedExample
from illada_jax.data.sources.registry import Part, split_hash
from illada_jax.data.tokenizers import Tokenizer
from illada_jax.data.tokenizers.chat import Conversation, encode_conversation
from illada_jax.errors import InputError

_WORTH_PROCESSES = 32 * 2**20  # bytes


@dataclass(frozen=True, kw_only=True)
class ExampleJob(ShardJob):
    """A shard of examples of one source. Its parts read Example | RejectedExample.

    Attributes:
      settings: length and format of the rows.
    """

    has_answers: ClassVar[bool] = True

    settings: ExampleSettings

    def encode(self, tokenizer: Tokenizer, report: Report) -> Iterator[EncodedDocument]:
        """See ShardJob."""
        for part in self.parts:
            for example in part.read():
                report.num_read += 1
                if isinstance(example, RejectedExample):
                    report.add(example)
                    continue
                try:
                    conversation = encode_example(example, tokenizer)
                except InputError as error:
                    report.add(RejectedExample(example.where, "chat template", str(error)))
                    continue
                for piece in self._fit(conversation, example.where, report):
                    num_bytes = len(tokenizer.decode(piece.ids).encode())
                    yield EncodedDocument(piece.ids, num_bytes, split_hash(example.group), piece.is_answer,
                                          piece.is_fixed)

    def _fit(self, conversation: Conversation, where: str, report: Report) -> Iterator[Conversation]:
        """The pieces that an example is stored as: more or less than one if it is longer than a window or row."""
        num_tokens = len(conversation.ids)
        limit, rule, windows = self.settings.length, self.settings.over_length, self.settings.format == "illada"
        if num_tokens <= limit:
            yield conversation
            return
        fate = {"drop": "left out", "split": "split", "truncate": "truncated"}[rule]
        report.add(RejectedExample(where, f"longer than config.data.length = {limit}", f"{num_tokens} tokens"), fate)
        if rule == "split" and windows:
            yield conversation  # windows divide the concatenated examples anyway
            return
        stops = {"drop": 0, "split": num_tokens, "truncate": limit}[rule]
        for start in range(0, stops, limit):
            piece = Conversation(*(values[start : start + limit] for values in conversation))
            if windows or any(piece.is_answer):
                yield piece
            else:
                report.add(RejectedExample(where, "a piece of a long example without any answer"))


def encode_example(example: Example, tokenizer: Tokenizer) -> Conversation:
    """The tokens of an example: a conversation through the chat template, a pair as prompt + response + EOS.

    Raises:
      InputError: the chat template rejects the conversation.
    """
    if example.messages:
        return encode_conversation(tokenizer, example.messages, example.tools)
    prompt = tokenizer.encode(example.prompt)
    encode_response = tokenizer.encode_behind if prompt else tokenizer.encode
    response = [*encode_response(example.response), tokenizer.eos_id]
    ids = prompt + response
    return Conversation(ids, [False] * len(prompt) + [True] * len(response), [False] * len(ids))


def prepare_examples(settings: ExampleSettings, parts: list[list[Part]], directory: pathlib.Path,
                     tokenizer: Tokenizer | None, progress: bool = True) -> None:
    """Prepares examples, on all cores if there is much to do. Their order is that of the sources.

    Args:
      settings: sources, tokenizer, split and length.
      parts: the parts of each source.
      directory: the target; empty.
      tokenizer: None trains one on the first examples.
      progress: show a bar on stderr.
    """
    groups = [(source, group) for source, of_source in enumerate(parts)
              for group in group_parts(of_source, settings.shard_bytes)]
    jobs = [ExampleJob(index=index, parts=group, split_below=settings.split_below, source=source, settings=settings)
            for index, (source, group) in enumerate(groups)]
    every = [part for of_source in parts for part in of_source]
    num_processes = 1
    if sum(part.num_bytes for part in every) > _WORTH_PROCESSES:
        num_processes = min(len(jobs), os.cpu_count() or 1)
    engine = functools.partial(make_locally, num_processes=num_processes, progress=progress)
    manifest = run_jobs(settings, directory, jobs, tokenizer, _training_sample(every), engine, progress)
    shutil.rmtree(directory / DONE_DIRECTORY)
    manifest.save(directory)


def _training_sample(parts: Iterable[Part]) -> Iterator[str]:
    """The texts of the first examples, about as many as a tokenizer is trained on."""
    left = TRAINING_BYTES
    for example in (example for part in parts for example in part.read()):
        for text in example.texts if isinstance(example, Example) else ():
            left -= len(text.encode())
            yield text
        if left <= 0:
            return
