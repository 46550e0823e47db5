import gzip
import json
import re

import pytest
import zstandard

from illada_jax.data.sources import builtin, files, registry
from illada_jax.data.sources.registry import Document, Part
from illada_jax.errors import InputError
from tests.util import documents


def compress(name: str, content: bytes) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(content)
    return zstandard.compress(content) if name.endswith(".zst") else content


def texts(spec):
    return [document.text for document in documents(spec)]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_text_file(tmp_path, name):
    (tmp_path / name).write_bytes(compress(name, "Größe\r\n\x00tab\t".encode()))
    assert texts(f"text:{tmp_path / name}") == ["Größe\r\n\x00tab\t"]


def test_directories_and_globs_are_read_in_order(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(f"text:{tmp_path}") == ["a.txt", "b.txt", "sub/c.txt"]
    assert texts(f"text:{tmp_path}/*.txt") == ["a.txt", "b.txt"]
    assert texts(f"text:{tmp_path}/**/*.txt") == ["a.txt", "b.txt", "sub/c.txt"]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
@pytest.mark.parametrize("paragraph", ["é" * 997 + "\n\n", "x" * 999 + "\n", "no end of line "])
def test_long_files_are_cut_without_loss(tmp_path, name, paragraph):
    whole = paragraph * 100
    (tmp_path / name).write_bytes(compress(name, whole.encode()))
    found = texts(f"text:{tmp_path / name}")
    assert "".join(found) == whole
    if paragraph.endswith("\n"):
        assert len(found) > 2 and all(text.endswith(paragraph[-2:]) for text in found)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_jsonl(tmp_path, name):
    lines = [{"text": "one\nline", "other": "x"}, {"text": "two", "other": "y"}]
    content = "\n\n".join(json.dumps(line) for line in lines).encode()
    (tmp_path / name).write_bytes(compress(name, content))
    assert texts(f"jsonl:{tmp_path / name}") == ["one\nline", "two"]
    assert texts(f"jsonl:{tmp_path / name}#other") == ["x", "y"]


@pytest.mark.parametrize("part_bytes", [1, 7, 20, 64, 10_000])
def test_jsonl_ranges_hold_every_line_once(tmp_path, monkeypatch, part_bytes):
    monkeypatch.setattr(files, "_JSONL_PART_BYTES", part_bytes)
    expected = [f"é{i}" * (i % 4) + "." for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in expected))
    assert texts(f"jsonl:{tmp_path}/a.jsonl") == expected


BAD_FILES = [
    ("text", "a.txt", b"good\nbad \xff", r"a\.txt: not UTF-8 at byte 9 \(0xFF\)"),
    ("text", "a.txt", b"x" * 40_000 + b"\n\n" + b"\xc3(", r"not UTF-8 at byte 40002 \(0xC3\)"),
    ("text", "a.txt.gz", b"not gzip", r"a\.txt\.gz: cannot be read: Not a gzipped file"),
    # mtime: the time of day in a parameter would be another name for the test in each worker.
    ("text", "a.txt.gz", gzip.compress(b"cut off" * 999, mtime=0)[:-9],
     r"a\.txt\.gz: cannot be read: Compressed file ended"),
    ("text", "a.txt.zst", b"not zstd", r"a\.txt\.zst: cannot be read"),
    ("jsonl", "a.jsonl", b'{"text": "a"}\n\n{"text": ', r"a\.jsonl, line 3: not JSON"),
    ("jsonl", "a.jsonl", b'{"text": "a"}\n{"body": "a"}\n',
     r"a\.jsonl, line 2: no text in the field 'text' \(its keys: body\)"),
    ("jsonl", "a.jsonl", b'[1]\n', r"a\.jsonl, line 1: no text in the field 'text'"),
    ("jsonl", "a.jsonl", b'{"text": 3}\n', r"a\.jsonl, line 1: no text in the field 'text'"),
    ("jsonl", "a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl, line 1: .*surrogate"),
    ("jsonl", "a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl: not UTF-8 at byte 24"),
]


@pytest.mark.parametrize(("kind", "name", "content", "message"), BAD_FILES)
def test_bad_files_are_named(tmp_path, kind, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        texts(f"{kind}:{tmp_path / name}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("spec", "message"), [
    ("text:/nowhere/at/all.txt", "no such file"),
    ("text", "names no files"),
    ("jsonl:#field", "names no files"),
    ("poetry:x", "unknown kind 'poetry'; known: jsonl, parquet, python_docs, python_source, sudoku, text"),
    ("prepared:x", "already prepared"),
    ("sudoku:9", "takes no argument"),
])
def test_bad_specs(spec, message):
    with pytest.raises(InputError, match=re.escape(message)):
        texts(spec)


def test_a_new_kind_is_one_function_and_one_registration(monkeypatch):
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))

    @registry.register("letters")
    def _letters(argument):
        return [Part("letters", lambda: map(Document, argument), len(argument))]

    assert texts("letters:abc") == ["a", "b", "c"]


def test_python_docs_are_english_prose(monkeypatch):
    modules = {path.name: path for path in builtin._library_modules()}
    assert len(modules) > 300 and "antigravity.py" in modules
    # A few of them: all are read when the quickstart runs.
    chosen = tuple(modules[name] for name in ("posixpath.py", "textwrap.py", "antigravity.py"))
    monkeypatch.setattr(builtin, "_library_modules", lambda: chosen)
    found = texts("python_docs")
    starts = {text[:12]: index for index, text in enumerate(found)}
    topics, docstrings = found[: starts["Common opera"]], found[starts["Common opera"] :]
    assert 60 < len(topics) < 200 and sum(map(len, topics)) > 400_000
    assert any("An identifier occurring as an atom is a name." in text for text in topics)
    assert not any("def " in text for text in docstrings)
    # A document is a module's docstring, or those of a class with its methods: in the order of the source.
    assert starts["Text wrappin"] < starts["Object for w"]
    wrapper = found[starts["Object for w"]]
    assert wrapper.index("wrap(text : string)") < wrapper.index("fill(text : string)")
    assert "wrap(text : string)" not in found[starts["Text wrappin"]]


def test_python_source_skips_tests():
    found = texts("python_source")
    assert any("def namedtuple(" in text for text in found)
    assert not any("class TestJson" in text for text in found)


def test_sudokus_are_valid_unique_and_grouped_by_grid():
    found = list(documents("sudoku"))
    assert found == list(documents("sudoku"))
    grids = {document.group for document in found}
    assert len(grids) == 288
    for document in found[::97]:
        puzzle, solution = document.text.split("=")
        assert len(puzzle) == len(solution) == 16 and solution == document.group
        fitting = [g for g in grids if all(p in (".", d) for p, d in zip(puzzle, g, strict=True))]
        assert fitting == [solution]
        for i in range(4):
            assert len(set(solution[4 * i : 4 * i + 4])) == len(set(solution[i::4])) == 4
            corner = 8 * (i // 2) + 2 * (i % 2)
            assert len(set(solution[corner : corner + 2] + solution[corner + 4 : corner + 6])) == 4
    assert len({document.text for document in found}) > 0.95 * len(found)


def test_the_group_decides_the_split():
    assert Document("a", "g").split_hash == Document("b", "g").split_hash
    assert Document("a").split_hash != Document("b").split_hash
    fraction = sum(Document(str(i)).split_hash < 0.1 * 2**64 for i in range(20_000)) / 20_000
    assert abs(fraction - 0.1) < 4 * (0.1 * 0.9 / 20_000) ** 0.5


@pytest.mark.parametrize(("spec", "meant"), [
    ("books/", "text:books/"), ("books/a.txt", "text:books/a.txt"), ("books/*.txt", "text:books/*.txt"),
    ("web.jsonl.gz", "jsonl:web.jsonl.gz"), ("txt:books/", "text"),
])
def test_a_source_without_its_kind_is_suggested(spec, meant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text("a")
    (tmp_path / "web.jsonl.gz").touch()
    with pytest.raises(InputError, match=rf"unknown kind .*; did you mean {re.escape(meant)}\? known: jsonl"):
        registry.parts(spec)
