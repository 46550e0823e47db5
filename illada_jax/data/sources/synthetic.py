"""Synthetic tasks: `tasks:NAME`, `tasks:NAME:COUNT` or `tasks:NAME:COUNT:SEED`.

All prompts of a task differ, and their order is fixed; another seed draws other examples. Answers have 1 to more than
100 characters. The prompt names the task, so that tasks can be mixed; the answers of `addition` and `story` include the
working.
"""

import random
import string
from collections.abc import Callable, Iterator

from illada_jax.errors import InputError

DEFAULT_COUNT = 10_000
_MAX_DRAWS = 100  # per example, before a task counts as exhausted


def parse(argument: str) -> tuple[str, int, int]:
    """The task, number of examples and seed of `NAME`, `NAME:COUNT` or `NAME:COUNT:SEED`; else an InputError."""
    name, _, numbers = argument.partition(":")
    count, _, seed = numbers.partition(":")
    if name not in TASKS:
        raise InputError(f"source tasks:{argument}: unknown task {name!r}; known: {', '.join(TASKS)}")
    if count and not (count.isdecimal() and int(count) > 0):
        raise InputError(f"source tasks:{argument}: {count!r} is not a number of examples")
    if seed and not seed.isdecimal():
        raise InputError(f"source tasks:{argument}: {seed!r} is not a seed")
    return name, int(count or DEFAULT_COUNT), int(seed or 0)


def examples(name: str, count: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Yields pairs (prompt, response) with distinct prompts; fewer than `count` if the task has no more."""
    draw = random.Random(f"{name} {seed}" if seed else name)
    seen: set[str] = set()
    for _ in range(_MAX_DRAWS * count):
        prompt, response = TASKS[name](draw)
        if prompt not in seen:
            seen.add(prompt)
            yield prompt, response
        if len(seen) == count:
            return


def _letters(draw: random.Random, low: int, high: int) -> str:
    return "".join(draw.choices(string.ascii_lowercase, k=draw.randint(low, high)))


def _reverse(draw: random.Random) -> tuple[str, str]:
    """Reverse 3 to 7 letters."""
    word = _letters(draw, 3, 7)
    return f"reverse {word}=", word[::-1]


def _sort(draw: random.Random) -> tuple[str, str]:
    """Sort 3 to 12 letters."""
    word = _letters(draw, 3, 12)
    return f"sort {word}=", "".join(sorted(word))


def _last(draw: random.Random) -> tuple[str, str]:
    """Name the letter that comes last in the alphabet: an answer of one character."""
    word = _letters(draw, 2, 8)
    return f"last {word}=", max(word)


def _addition(draw: random.Random) -> tuple[str, str]:
    """Add two numbers of up to 10 digits: digit by digit from the right with carries, then the sum.

    `add 58+7=` has the answer `8+7=15 5+0+1=06 65`.
    """
    a, b = (draw.randrange(10 ** draw.randint(1, 10)) for _ in range(2))
    lines, carry = [], 0
    width = max(len(str(a)), len(str(b)))
    for x, y in zip(reversed(f"{a:0{width}}"), reversed(f"{b:0{width}}"), strict=True):
        total = int(x) + int(y) + carry
        lines.append(f"{x}+{y}{f'+{carry}' if carry else ''}={total:02}")
        carry = total // 10
    return f"add {a}+{b}=", " ".join([*lines, str(a + b)])


def _count(draw: random.Random) -> tuple[str, str]:
    """Count up: 1 to 40 numbers. There are 2,440 such prompts."""
    start, terms = draw.randint(0, 60), draw.randint(1, 40)
    numbers = range(start, start + terms)
    return f"count {start} to {numbers[-1]}=", " ".join(map(str, numbers))


def _down(draw: random.Random) -> tuple[str, str]:
    """Count down in steps of 1 to 9 while positive: 1 to 40 numbers. There are 813 such prompts."""
    step = draw.randint(1, 9)
    numbers = range(draw.randint(1, min(99, 40 * step)), 0, -step)
    return f"down {numbers[0]} by {step}=", " ".join(map(str, numbers))


_PEOPLE = ("Ann", "Ben", "Eva", "Tom", "Mia")
_THINGS = ("apples", "books", "coins", "eggs", "pens")


def _story(draw: random.Random) -> tuple[str, str]:
    """Solve a word problem of one to five steps, with the working."""
    person, thing = draw.choice(_PEOPLE), draw.choice(_THINGS)
    have = draw.randint(1, 20)
    text, working = [f"{person} has {have} {thing}"], []
    for _ in range(draw.randint(1, 5)):
        amount = draw.randint(1, 9)
        gives = have >= amount and draw.random() < 0.5
        text.append(f"{'gives away' if gives else 'gets'} {amount}")
        after = have - amount if gives else have + amount
        working.append(f"{have}{'-' if gives else '+'}{amount}={after}")
        have = after
    return f"{', '.join(text)}. How many? ", f"{', '.join(working)}. {have}"


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    task.__name__.removeprefix("_"): task for task in (_reverse, _sort, _last, _addition, _count, _down, _story)}
