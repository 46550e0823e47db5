"""Documents are correct: links, files, commands and settings that they name, examples in docstrings, package guides."""

import doctest
import functools
import importlib
import pathlib
import re

import pytest

from illada_jax import api
from illada_jax import config as config_lib
from illada_jax.__main__ import COMMANDS

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE, EXPERIMENTS = ROOT / "illada_jax", ROOT / "experiments"
UNTRACKED = {"workdirs", "corpora", "build", "dist", "demo"}
DOCUMENTS = [path for path in sorted(ROOT.rglob("*.md"))
             if not any(part.startswith(".") or part in UNTRACKED for part in path.relative_to(ROOT).parts)]
PACKAGES = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))
WITH_EXAMPLES = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]\[]*\]\(([^()\s]+)\)")
NAMED = re.compile(r"(?<![\w/.=:@-])(?:experiments|tpu|tests|illada_jax|\.ci)/[\w./-]*\w")


def name(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes from the headings."""
    headings = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading)).lower().replace(" ", "-") for heading in headings}


def broken_links(path: pathlib.Path) -> list[str]:
    """The broken links of a document; of links out of the repository only the form is checked."""
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
    """Files, modules and commands of this repository that a text names and that do not exist."""
    files = [file for file in NAMED.findall(text) if not (ROOT / file).exists()]
    modules = re.findall(r"-m ((?:illada_jax|tests)(?:\.[a-z_]+)*)", text)
    commands = re.findall(r"(?:^|`)illada ([a-z]+)", text, re.MULTILINE)
    return files + [module for module in modules if not any(
        (ROOT / (module.replace(".", "/") + end)).exists() for end in (".py", "/__main__.py"))] + [
        command for command in commands if command not in {*COMMANDS, "help"}]


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_are_not_broken(path):
    assert not broken_links(path)


@pytest.mark.parametrize("path", [*DOCUMENTS, *sorted(PACKAGE.glob("*.py"))], ids=name)
def test_named_files_and_commands_exist(path):
    assert not missing(path.read_text(encoding="utf-8"))


def test_broken_links_and_missing_names_are_found(tmp_path):
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


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_a_package_has_a_guide(package):
    """Contents, where to begin, permitted imports; the module to begin with exists."""
    module = importlib.import_module(f"illada_jax.{package.name}")
    assert "Begin with" in module.__doc__ and "import" in module.__doc__
    assert f"`illada_jax.{package.name}`" in importlib.import_module("illada_jax").__doc__
    first = re.search(r"Begin with `(\w+)", module.__doc__).group(1)
    assert (package / f"{first}.py").exists() or hasattr(module, first)


def test_the_glossary_is_sorted_and_part_of_the_reference():
    terms = re.findall(r"^\*\*(.+?)\.\*\*", (PACKAGE / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(terms) > 20 and terms == sorted(terms, key=str.lower)
    assert ".. include:: glossary.md" in (PACKAGE / "__init__.py").read_text(encoding="utf-8")


def test_readme_is_short_and_answers_first():
    """The first screen says what the package is, how to start and where the loss is."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 160
    screen = "\n".join(lines[:45])
    assert "illada_jax/diffusion/" in screen and "pip install" in screen and "arxiv.org/abs/2502.09992" in screen


@pytest.mark.parametrize("name", ["quickstart", "tests"])
def test_commands_that_ci_takes_from_readme(name):
    """One fenced line after the marker, as `.ci/run` extracts it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(rf"^<!-- ci: {name} -->\n```bash\n(.+)\n```$", text, re.MULTILINE)
    assert "-m illada_jax.main" in command or "-m pytest" in command


@pytest.mark.parametrize("folder", ["", "benchmarks", "studies", "corpora", "tasks", "colab"])
def test_experiments_are_listed(folder):
    """Every script, config and notebook has its line in the README of the experiments."""
    text = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
    pattern = "*.ipynb" if folder == "colab" else "*.py"
    assert [path.name for path in (EXPERIMENTS / folder).glob(pattern) if path.name not in text] == []


def documented_settings() -> list[tuple[str, str]]:
    """(Document, key) of every `--config.key` and `config.section.key` that a document names."""
    key = re.compile(r"(?<![\w/.])(?:--)?config\.([a-z]+\.[a-z_0-9]+)(?![\w(/])")
    return sorted({(name(path), found) for path in DOCUMENTS if path.name != "CHANGELOG.md"
                   for found in key.findall(path.read_text(encoding="utf-8")) if found.split(".")[1] != "py"})


@pytest.mark.parametrize(("document", "key"), documented_settings())
def test_settings_in_documents_exist(document, key):
    values = config_lib.to_dict(config_lib.Config())
    section, field = key.split(".")
    assert field in values[section], document


def test_version_has_a_changelog_entry():
    version = importlib.import_module("illada_jax").__version__
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
