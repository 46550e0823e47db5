"""Sources that need no download: documentation and source code of the Python standard library, and sudokus."""

import ast
import functools
import importlib
import itertools
import pathlib
import random
import sys
import sysconfig
import tokenize
from collections.abc import Iterator

from illada_jax.data.sources.registry import Document, Part, register

# Tests contain broken and generated code; the other directories are not the standard library.
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "pydoc_data", "__pycache__"}
_PUZZLES_PER_GRID = 64


@register("python_docs", takes_argument=False)
def _python_docs(_: str) -> list[Part]:
    """The language reference and the docstrings of the standard library.

    A document is a topic of the reference, the docstring of a module, or the docstrings of a top-level class or
    function and of everything inside it.
    """
    modules = _library_modules()
    reference = pathlib.Path(importlib.import_module("pydoc_data.topics").__file__)
    return [Part.of_files(f"Python {sys.version.split()[0]} language reference", _reference_topics, (reference,)),
            Part.of_files("docstrings of the standard library", functools.partial(_docstrings, modules), modules)]


@register("python_source", takes_argument=False)
def _python_source(_: str) -> list[Part]:
    """The source code of the standard library, one document per module."""
    modules = _library_modules()
    return [Part.of_files("source of the standard library", functools.partial(_sources, modules), modules)]


@register("sudoku", takes_argument=False)
def _sudoku(_: str) -> list[Part]:
    """4 × 4 sudokus as `PUZZLE=SOLUTION`: 33 characters, row by row, with `.` for an empty cell.

    Each of the 288 grids has 64 puzzles with a unique solution and is a group: no held-out grid occurs in training.
    """
    return [Part("4 × 4 sudokus", _sudoku_documents, 288 * _PUZZLES_PER_GRID * 33)]


def _library_modules() -> tuple[pathlib.Path, ...]:
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    return tuple(sorted(p for p in root.rglob("*.py") if _SKIPPED.isdisjoint(p.relative_to(root).parts)))


def _reference_topics() -> Iterator[Document]:
    for _, text in sorted(importlib.import_module("pydoc_data.topics").topics.items()):
        yield Document(text)


def _sources(modules: tuple[pathlib.Path, ...]) -> Iterator[Document]:
    for path in modules:
        try:
            with tokenize.open(path) as file:
                yield Document(file.read())
        except (SyntaxError, UnicodeDecodeError):
            continue  # some files of the library are invalid on purpose


def _docstrings(modules: tuple[pathlib.Path, ...]) -> Iterator[Document]:
    for source in _sources(modules):
        try:
            tree = ast.parse(source.text)
        except (SyntaxError, ValueError):
            continue
        entries = [ast.get_docstring(tree), *("\n\n".join(_docstrings_in(statement)) for statement in tree.body)]
        yield from (Document(text) for text in entries if text)


def _docstrings_in(node: ast.AST) -> Iterator[str]:
    """Docstrings of classes and functions in the order of the source (ast.walk goes level by level)."""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node):
        yield ast.get_docstring(node)
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):
            yield from _docstrings_in(child)


def _sudoku_documents() -> Iterator[Document]:
    grids = _all_grids()
    # Bit g of grids_with[cell, digit]: grid g has that digit in that cell. A puzzle is unique if one bit remains.
    grids_with = {
        (cell, digit): sum(1 << g for g, grid in enumerate(grids) if grid[cell] == digit)
        for cell in range(16) for digit in "1234"
    }
    draw = random.Random(0)
    for _ in range(_PUZZLES_PER_GRID):
        for grid in grids:
            yield Document(f"{_puzzle(grid, grids_with, draw)}={grid}", group=grid)


def _puzzle(grid: str, grids_with: dict[tuple[int, str], int], draw: random.Random) -> str:
    """Empties a random number of cells in random order, skipping those whose loss would let another grid fit."""
    cells = list(range(16))
    draw.shuffle(cells)
    target = draw.randint(6, 12)
    empty: set[int] = set()
    for cell in cells:
        clues = [grids_with[c, grid[c]] for c in range(16) if c not in empty and c != cell]
        if len(empty) < target and functools.reduce(int.__and__, clues).bit_count() == 1:
            empty.add(cell)
    return "".join("." if c in empty else digit for c, digit in enumerate(grid))


def _all_grids() -> list[str]:
    """The 288 filled grids, in lexicographic order."""
    rows = ["".join(p) for p in itertools.permutations("1234")]
    return [
        a + b + c + d
        for a, b, c, d in itertools.product(rows, repeat=4)
        if all(len({a[i], b[i], c[i], d[i]}) == 4 for i in range(4))
        and all(len(set(top[i : i + 2] + bottom[i : i + 2])) == 4 for top, bottom in ((a, b), (c, d)) for i in (0, 2))
    ]
