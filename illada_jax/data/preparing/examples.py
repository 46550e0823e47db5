"""Examples to token shards with an answer mask."""

import os
import pathlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from illada_jax.data.manifest import Manifest
from illada_jax.data.preparing.jobs import DONE_DIRECTORY, DropCounter, EncodedDocument, ShardJob, collect, group_parts
from illada_jax.data.preparing.local import LocalEngine
from illada_jax.data.preparing.settings import ExampleSettings, save_tokenizer
from illada_jax.data.sources.examples import Example, RejectedExample
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

    def encode(self, tokenizer: Tokenizer, counter: DropCounter) -> Iterator[EncodedDocument]:
        """See ShardJob."""
        for part in self.parts:
            for example in part.read():
                counter.total += 1
                if isinstance(example, RejectedExample):
                    counter.add(example)
                    continue
                try:
                    conversation = encode_example(example, tokenizer)
                except InputError as error:
                    counter.add(RejectedExample(example.where, "chat template", str(error)))
                    continue
                split = self.split_of(split_hash(example.group))
                for ids, is_answer in self._fit(conversation, example.where, counter):
                    yield EncodedDocument(split, ids, len(tokenizer.decode(ids).encode()), is_answer)

    def _fit(self, conversation: Conversation, where: str, counter: DropCounter) -> Iterator[Conversation]:
        """The pieces to store for an example: none or several if it is longer than a window or row."""
        ids, is_answer = conversation
        limit, rule, windows = self.settings.length, self.settings.over_length, self.settings.format == "illada"
        if len(ids) <= limit:
            yield conversation
            return
        fate = {"drop": "left out", "split": "split", "truncate": "truncated"}[rule]
        counter.add(RejectedExample(where, f"longer than config.data.length = {limit}", f"{len(ids)} tokens"), fate)
        if rule == "split" and windows:
            yield conversation  # windows divide the concatenated examples anyway
            return
        stops = {"drop": 0, "split": len(ids), "truncate": limit}[rule]
        for start in range(0, stops, limit):
            piece = Conversation(ids[start : start + limit], is_answer[start : start + limit])
            if windows or any(piece.is_answer):
                yield piece
            else:
                counter.add(RejectedExample(where, "a piece of a long example without any answer"))


def encode_example(example: Example, tokenizer: Tokenizer) -> Conversation:
    """The tokens of an example: a conversation through the chat template, a pair as prompt + response + EOS.

    Raises:
      InputError: the chat template rejects the conversation.
    """
    if example.messages:
        return encode_conversation(tokenizer, example.messages)
    prompt, response = tokenizer.encode(example.prompt), [*tokenizer.encode(example.response), tokenizer.eos_id]
    return Conversation(prompt + response, [False] * len(prompt) + [True] * len(response))


def prepare_examples(settings: ExampleSettings, parts: list[list[Part]], directory: pathlib.Path,
                     tokenizer: Tokenizer | None, progress: bool = True) -> Manifest:
    """Prepares examples, on all cores if there is much to do. Their order is that of the sources.

    Args:
      settings: sources, tokenizer, split and length.
      parts: the parts of each source.
      directory: the target; empty.
      tokenizer: None trains one on the examples.
      progress: show a bar on stderr.
    """
    groups = [(source, group) for source, of_source in enumerate(parts)
              for group in group_parts(of_source, settings.shard_bytes)]
    jobs = [ExampleJob(index=index, parts=group, split_below=settings.split_below, source=source, settings=settings)
            for index, (source, group) in enumerate(groups)]
    texts = (text for of_source in parts for part in of_source for example in part.read()
             if isinstance(example, Example) for text in example.texts)
    tokenizer = save_tokenizer(directory, tokenizer, texts, settings.vocab_size, progress)
    num_processes = 1
    if sum(job.num_bytes for job in jobs) > _WORTH_PROCESSES:
        num_processes = min(len(jobs), os.cpu_count() or 1)
    (directory / DONE_DIRECTORY).mkdir()
    LocalEngine(num_processes, progress).make(jobs, directory, drop_duplicates=False)
    splits, counter = collect(directory, jobs)
    shutil.rmtree(directory / DONE_DIRECTORY)
    manifest = Manifest(settings.sources, tokenizer.fingerprint, tokenizer.vocab_size, settings.heldout_fraction,
                        splits, has_answers=True, dropped=counter.lines("left out", "truncated"),
                        divided=counter.lines("split"))
    manifest.save(directory)
    return manifest
