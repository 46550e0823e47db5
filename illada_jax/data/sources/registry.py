"""Where text comes from: `KIND` or `KIND:ARGUMENT`, each kind a function that lists the parts of a corpus.

To add a kind, write a function `argument -> list[Part]` and decorate it with `@register("name")`. Parts are read one by
one, possibly in other processes, so what a part holds may depend on nothing but its files and arguments.
"""

import hashlib
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from illada_jax.errors import InputError


@dataclass(frozen=True)
class Document:
    """A piece of text that stands on its own.

    Attributes:
      text: the text.
      group: documents of the same group fall on the same side of the held-out split; empty: a group of its own.
    """

    text: str
    group: str = ""

    @property
    def split_hash(self) -> int:
        """A uniform 64-bit number that decides about the held-out split."""
        return split_hash(self.group or self.text)


def split_hash(text: str) -> int:
    """A uniform 64-bit number that depends on a text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Part:
    """A share of a source that is read at one go.

    Attributes:
      name: for messages and progress.
      read: yields the documents, the same ones in the same order each time. Pickled to other processes.
      num_bytes: about how much there is to read.
      files: the files that it depends on.
    """

    name: str
    read: Callable[[], Iterator[Document]]
    num_bytes: int
    files: tuple[pathlib.Path, ...] = ()


_KINDS: dict[str, Callable[[str], list[Part]]] = {}


def register(kind: str) -> Callable[[Callable[[str], list[Part]]], Callable[[str], list[Part]]]:
    """Decorates the function that lists the parts of sources of this kind."""

    def decorate(function: Callable[[str], list[Part]]) -> Callable[[str], list[Part]]:
        _KINDS[kind] = function
        return function

    return decorate


def parts(spec: str) -> list[Part]:
    """The parts of a source, in order.

    Args:
      spec: `KIND` or `KIND:ARGUMENT`.

    Raises:
      InputError: the kind is unknown, or its argument is no good.
    """
    kind, _, argument = spec.partition(":")
    if kind == "prepared":
        raise InputError(f"source {spec!r}: is prepared already; name it in config.data.sources")
    if kind not in _KINDS:
        raise InputError(f"source {spec!r}: unknown kind {kind!r}; known: {', '.join(sorted(_KINDS))}")
    return _KINDS[kind](argument)


def documents(spec: str) -> Iterator[Document]:
    """All the documents of a source, in order.

    Raises:
      InputError: the source is unknown or cannot be read; names the file and where in it.
    """
    for part in parts(spec):
        yield from part.read()


def no_argument(kind: str, argument: str) -> None:
    """For kinds without an argument.

    Raises:
      InputError: there is one.
    """
    if argument:
        raise InputError(f"source {kind}:{argument}: {kind!r} takes no argument")
