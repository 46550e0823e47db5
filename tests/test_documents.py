"""Documents say what is there: links, files and commands that they name, examples in docstrings, guides to rooms."""

import doctest
import functools
import importlib
import pathlib
import re

import pytest

from illada_jax import api
from illada_jax.__main__ import COMMANDS

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "illada_jax"
UNTRACKED = {"workdirs", "corpora", "build", "dist", "demo"}
DOCUMENTS = [path for path in sorted(ROOT.rglob("*.md"))
             if not any(part.startswith(".") or part in UNTRACKED for part in path.relative_to(ROOT).parts)]
ROOMS = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))
WITH_EXAMPLES = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]\[]*\]\(([^()\s]+)\)")
NAMED = re.compile(r"(?<![\w/.=:@-])(?:experiments|tpu|tests|illada_jax|\.ci)/[\w./-]*\w")


def name(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading)).lower().replace(" ", "-") for heading in headings}


def broken_links(path: pathlib.Path) -> list[str]:
    """The links of a document that lead nowhere; of those that leave the repository only the form is looked at."""
    broken = []
    for link in LINK.findall(re.sub(r"`[^`\n]*`", "", FENCE.sub("", path.read_text(encoding="utf-8")))):
        if re.match(r"[a-z]+:", link):
            good = re.fullmatch(r"https://[\w.-]+\.[a-z]+(/[^\s<>]*)?|mailto:[^@\s]+@[\w.-]+", link)
        else:
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            good = target.exists()
            if good and anchor:
                good = target.suffix == ".md" and anchor in anchors(target.read_text(encoding="utf-8"))
        if not good:
            broken.append(link)
    return broken


def missing(text: str) -> list[str]:
    """Files and modules of this repository that a text names and that are not there."""
    files = [file for file in NAMED.findall(text) if not (ROOT / file).exists()]
    modules = re.findall(r"-m ((?:illada_jax|tests)(?:\.[a-z_]+)*)", text)
    commands = re.findall(r"(?:^|`)illada ([a-z]+)", text, re.MULTILINE)
    return files + [module for module in modules if not any(
        (ROOT / (module.replace(".", "/") + end)).exists() for end in (".py", "/__main__.py"))] + [
        command for command in commands if command not in {*COMMANDS, "help"}]


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_lead_somewhere(path):
    assert not broken_links(path)


@pytest.mark.parametrize("path", [*DOCUMENTS, *sorted(PACKAGE.glob("*.py"))], ids=name)
def test_what_is_named_is_there(path):
    assert not missing(path.read_text(encoding="utf-8"))


def test_broken_links_and_names_are_found(tmp_path):
    path = tmp_path / "a.md"
    (tmp_path / "b.md").write_text("# On `b`: two words\n```\n# code\n```\n")
    good = "[1](b.md) [2](b.md#on-b-two-words) [3](https://example.org/x) ![](b.md) `[x](y)`\n```\n[x](y)\n```\n"
    path.write_text(good)
    assert broken_links(path) == []
    path.write_text(f"{good} [4](c.md) [5](b.md#code) [6](http:/x) [7](#here)")
    assert broken_links(path) == ["c.md", "b.md#code", "http:/x", "#here"]
    assert missing("`experiments/quickstart.py` python -m illada_jax.main illada_jax/data/ tests.faults") == []
    assert missing("experiments/nope.py\npython -m illada_jax.nope\nillada trian --x\npython -m tests.faults") == [
        "experiments/nope.py", "illada_jax.nope", "trian"]


load_once = functools.cache(api.load)


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=name)
def test_examples_in_docstrings(path, monkeypatch):
    monkeypatch.setattr(api, "load", load_once)
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


def test_the_python_interface_has_examples():
    assert {PACKAGE / "__init__.py", PACKAGE / "api.py", PACKAGE / "tracing" / "trace.py"} <= {*WITH_EXAMPLES}


@pytest.mark.parametrize("room", ROOMS, ids=lambda path: path.name)
def test_a_room_has_a_guide(room):
    """What is in it, where to begin, what it may import; the files that it names are there."""
    guide = importlib.import_module(f"illada_jax.{room.name}").__doc__
    assert "Begin with" in guide and "import" in guide
    assert f"`illada_jax.{room.name}`" in importlib.import_module("illada_jax").__doc__
    first = re.search(r"Begin with `(\w+)", guide).group(1)
    assert (room / f"{first}.py").exists() or hasattr(importlib.import_module(f"illada_jax.{room.name}"), first)


def test_the_glossary_is_sorted_and_part_of_the_reference():
    terms = re.findall(r"^\*\*(.+?)\.\*\*", (PACKAGE / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(terms) > 20 and terms == sorted(terms, key=str.lower)
    assert ".. include:: glossary.md" in (PACKAGE / "__init__.py").read_text(encoding="utf-8")
