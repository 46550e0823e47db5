"""The registry of sources, `KIND` or `KIND:ARGUMENT`; each kind is a function that lists the parts of a corpus.

To add a kind, write a function `argument -> list[Part]`, decorate it with `@register("name")`, and import its module in
the package. With `takes_limit` the function takes the longest document in bytes, too. Parts are read one by one,
possibly in other processes, so the content of a part may depend only on its files and arguments.
"""

import difflib
import glob
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from illada_jax.config import DataConfig
from illada_jax.errors import InputError

MAX_DOCUMENT_BYTES = DataConfig().max_document_bytes


@dataclass(frozen=True)
class Document:
    """One text of a corpus.

    Attributes:
      text: the text.
      group: documents of one group fall on the same side of the held-out split; if empty, the text is the group.
    """

    text: str
    group: str = ""

    @property
    def split_hash(self) -> int:
        """A uniform 64-bit number that decides the side of the held-out split."""
        return split_hash(self.group or self.text)


def split_hash(text: str) -> int:
    """A uniform 64-bit number that depends on a text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Part:
    """A share of a source, the unit of parallel reading.

    Attributes:
      name: the name in messages and progress bars.
      read: yields the documents or examples, the same ones in the same order each time; can be pickled.
      num_bytes: the approximate size.
      files: the files that the content depends on.
    """

    name: str
    read: Callable[[], Iterator[Any]]
    num_bytes: int
    files: tuple[pathlib.Path, ...] = ()

    @classmethod
    def of_files(cls, name: str, read: Callable[[], Iterator[Any]], files: tuple[pathlib.Path, ...]) -> "Part":
        """A part that is as large as its files."""
        return cls(name, read, sum(path.stat().st_size for path in files), files)


ListParts = Callable[..., list[Part]]
_KINDS: dict[str, tuple[ListParts, bool, bool]] = {}


def register(kind: str, takes_argument: bool = True, takes_limit: bool = False) -> Callable[[ListParts], ListParts]:
    """Decorates the function that lists the parts of sources of one kind."""
    return lambda function: _KINDS.setdefault(kind, (function, takes_argument, takes_limit))[0]


def _unknown(spec: str, kind: str) -> str:
    """The message for a source of unknown kind, with the source that may be meant."""
    if glob.glob(os.path.expanduser(spec)):  # a path without its kind
        suffix = pathlib.Path(spec).suffixes[:1]
        near = f"{'jsonl' if suffix == ['.jsonl'] else 'text'}:{spec}"
    else:
        near = "".join(difflib.get_close_matches(kind, _KINDS, n=1))
    hint = f"did you mean {near}? " if near else ""
    return f"unknown kind {kind!r}; {hint}known: {', '.join(sorted(_KINDS))}"


def parts(spec: str, max_bytes: int = MAX_DOCUMENT_BYTES) -> list[Part]:
    """The parts of a source, in order.

    Args:
      spec: the source.
      max_bytes: the longest document; a longer one is an InputError when it is read.

    Raises:
      InputError: the kind is unknown or its argument invalid.
    """
    kind, _, argument = spec.partition(":")
    if kind == "prepared":
        raise InputError(f"source {spec!r}: already prepared; name it in config.data.sources")
    if kind not in _KINDS:
        raise InputError(f"source {spec!r}: {_unknown(spec, kind)}")
    list_parts, takes_argument, takes_limit = _KINDS[kind]
    if argument and not takes_argument:
        raise InputError(f"source {spec!r}: {kind!r} takes no argument")
    return list_parts(argument, max_bytes) if takes_limit else list_parts(argument)
