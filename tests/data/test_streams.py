"""Files as they are found: cut off, without line ends, among others, with nulls; read in bounded memory."""

import gzip
import json
import random
import re
import subprocess
import sys

import pytest
import zstandard

from illada_jax.config import DataConfig
from illada_jax.data.corpus import open_corpus
from illada_jax.data.preparing import text as preparing
from illada_jax.data.preparing.settings import Settings
from illada_jax.data.preparing.text import prepare
from illada_jax.data.sources import examples, files, registry
from illada_jax.errors import InputError
from tests.util import documents


def texts(spec):
    return [document.text for document in documents(spec)]


def frame(content, **options):
    return zstandard.ZstdCompressor(**options).compress(content)


NOISE = random.Random(0).randbytes(300_000).hex().encode()
SKIPPABLE = (0x184D2A53).to_bytes(4, "little") + (70_000).to_bytes(4, "little") + bytes(70_000)
FRAMES = [frame(b""), frame(b"some text\n" * 9), frame(b"\0" * 500_000, write_checksum=True),
          frame(NOISE[:200_000], write_content_size=False), SKIPPABLE, frame(NOISE, level=19)]


def test_several_frames_are_one_file(tmp_path):
    (tmp_path / "a.txt.zst").write_bytes(b"".join(FRAMES))
    whole = b"some text\n" * 9 + b"\0" * 500_000 + NOISE[:200_000] + NOISE
    assert "".join(texts(f"text:{tmp_path}/a.txt.zst")).encode() == whole


@pytest.mark.parametrize("number", range(len(FRAMES)))
def test_a_frame_that_is_cut_off_is_an_error_wherever_it_is_cut(tmp_path, number):
    before, last = FRAMES[1], FRAMES[number]
    cuts = {*range(1, min(len(last), 24)), *range(max(len(last) - 8, 1), len(last)),
            *random.Random(number).sample(range(1, len(last)), min(8, len(last) - 1))}
    for cut in sorted(cuts):
        for name in ("a.txt.zst", "a.jsonl.zst"):
            (tmp_path / name).write_bytes(before + last[:cut])
        with pytest.raises(InputError, match=r"a\.txt\.zst: cannot be read: .*cut off"):
            texts(f"text:{tmp_path}/a.txt.zst")
        with pytest.raises(InputError, match=r"a\.jsonl\.zst: cannot be read: .*cut off"):
            [example for part in examples.parts(f"chat:{tmp_path}/a.jsonl.zst") for example in part.read()]


@pytest.mark.parametrize("damage", [b"\x28\xb5\x2f\xfd\xff\xff", b"text after the frame", b"\x00" * 99])
def test_damage_behind_a_frame_is_an_error(tmp_path, damage):
    (tmp_path / "a.txt.zst").write_bytes(FRAMES[1] + damage)
    with pytest.raises(InputError, match=r"a\.txt\.zst: cannot be read"):
        texts(f"text:{tmp_path}/a.txt.zst")


def as_before(content):
    """Documents of files whose lines are short, as they always were."""
    size, lines, found = 0, [], []
    for line in content.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if (size >= 16384 and not line.strip()) or size >= 32768:
            found.append(b"".join(lines).decode())
            size, lines = 0, []
    return found + [b"".join(lines).decode()] * bool(lines)


@pytest.mark.parametrize("seed", range(8))
def test_files_of_short_lines_give_the_documents_that_they_always_gave(tmp_path, seed):
    draw = random.Random(seed)
    lines = [draw.choice("aé漢🙂 ") * draw.choice([0, 0, 1, 40, 3000, 32767 // 4]) + "\n" for _ in range(150)]
    content = "".join([*lines, "the end"][: 150 + seed % 2]).encode()
    (tmp_path / "a.txt").write_bytes(content)
    assert texts(f"text:{tmp_path}/a.txt") == as_before(content)


@pytest.mark.parametrize("unit", ["a", "é", "漢", "🙂", "a b ", "\r", "é" * 20_000 + " ", "漢" * 30_000 + "\n"])
@pytest.mark.parametrize("shift", range(4))
def test_long_lines_are_cut_at_characters_or_spaces(tmp_path, unit, shift):
    whole = "a" * shift + unit * (200_000 // len(unit.encode()))
    (tmp_path / "a.txt").write_bytes(whole.encode())
    found = texts(f"text:{tmp_path}/a.txt")
    assert "".join(found) == whole
    assert all(len(text.encode()) <= 2 * 32768 for text in found)
    assert all(len(text.encode()) >= 16384 for text in found[:-1]) or "\n" in unit
    if " " in unit:
        assert all(text.endswith(" ") for text in found[:-1] if " " in text[len(text) // 2 :])


def test_bytes_that_are_no_text_are_named_within_a_long_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a" * 100_001 + b"\xff" + b"\x80" * 100_000)
    with pytest.raises(InputError, match=r"not UTF-8 at byte 100001 \(0xFF\)"):
        texts(f"text:{tmp_path}/a.txt")


@pytest.mark.parametrize("part_bytes", [1, 50, 1000, 10_000])
def test_a_line_that_is_too_long_is_an_error_in_any_part(tmp_path, monkeypatch, part_bytes):
    monkeypatch.setattr(files, "_JSONL_PART_BYTES", part_bytes)
    line = '{"text": "' + "x" * 500 + '"}\n'
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n' + line + '{"text": "b"}\n')
    spec = f"jsonl:{tmp_path}/a.jsonl"
    assert [d.text for part in registry.parts(spec, len(line)) for d in part.read()] == ["a", "x" * 500, "b"]
    with pytest.raises(InputError, match=r"a\.jsonl, line 3: longer than max_document_megabytes = 0\.00038"):
        [d for part in registry.parts(spec, 400) for d in part.read()]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json"])
def test_byte_order_marks_blank_lines_nulls_and_arrays(tmp_path, name):
    records = [{"text": "a"}, {"text": None}, {"text": "é\n"}, {"text": ""}]
    lines = b"\xef\xbb\xbf\r\n" + "\n\n \n\ufeff".join(json.dumps(record) for record in records).encode()
    content = b"\xef\xbb\xbf" + json.dumps(records, indent=1).encode() if name == "a.json" else lines
    compress = {"gz": gzip.compress, "zst": zstandard.compress}.get(name.rpartition(".")[2], bytes)
    (tmp_path / name).write_bytes(compress(content))
    assert texts(f"jsonl:{tmp_path / name}") == ["a", "", "é\n", ""]


def test_a_directory_gives_the_files_of_the_kind(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    hub = tmp_path / "hub"
    (hub / "data").mkdir(parents=True)
    for name in ("README.md", ".gitattributes", "dataset_infos.json", "data/dataset_info.json", "data/LICENSE"):
        (hub / name).write_text("# not data\n")
    with pytest.raises(InputError, match=r"no file in the directory ends in \.jsonl, \.ndjson, \.json \(or that and "
                                         r"\.gz or \.zst\); it holds "):
        texts(f"jsonl:{hub}")
    (hub / "data" / "b.jsonl").write_text('{"text": "b", "prompt": "p", "response": "b"}\n')
    (hub / "data" / "a.json.gz").write_bytes(gzip.compress(b'[{"text": "a", "prompt": "p", "response": "a"}]'))
    parquet.write_table(pyarrow.table({"text": ["c"], "prompt": ["p"], "response": ["c"]}), hub / "data" / "c.parquet")
    assert texts(f"jsonl:{hub}") == ["a", "b"] and texts(f"parquet:{hub}") == ["c"]
    assert texts(f"jsonl:{hub}/data/c.parquet") == ["c"]
    found = [example.response for part in examples.parts(f"chat:{hub}") for example in part.read()]
    assert found == ["a", "b", "c"]
    (hub / "data" / "part-0").write_text('{"text": "named by a glob"}\n')
    assert texts(f"jsonl:{hub}/data/part-*") == ["named by a glob"]


def test_parquet_columns(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "v:2").mkdir()
    path = tmp_path / "v:2" / "a.parquet"
    body = [f"{n}é" * (n % 7) if n % 5 else None for n in range(100)]
    parquet.write_table(pyarrow.table({"text": [str(n) for n in range(100)], "body": body, "n": list(range(100))}),
                        path, row_group_size=30)
    assert texts(f"parquet:{path}") == texts(f"jsonl:{path}") == [str(n) for n in range(100)]
    assert texts(f"parquet:{path}:body") == texts(f"jsonl:{path}#body") == [text or "" for text in body]
    assert texts(f"parquet:{path.parent}:body") == [text or "" for text in body]
    for spec, message in ((f"parquet:{path}:nope", "no column 'nope'; its columns: text, body, n"),
                          (f"parquet:{path}:n", "row 1: no text in the field 'n'"),
                          (f"parquet:{path}x", "no such file")):
        with pytest.raises(InputError, match=message):
            texts(spec)
    with pytest.raises(InputError, match=r"row 4: longer than max_document_megabytes"):
        [d for part in registry.parts(f"parquet:{path}:body", 5) for d in part.read()]


@pytest.mark.parametrize("shard_bytes", [1, 2**30])
def test_texts_that_are_null_or_empty_are_counted(tmp_path, shard_bytes):
    for name in "ab":
        records = [{"text": f"{name}{n}" if n % 4 else [None, ""][n % 8 == 0]} for n in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    manifests = [prepare(Settings((f"jsonl:{tmp_path}/*.jsonl",), "bytes", 0, 0.2, drop, shard_bytes),
                         tmp_path / f"out-{drop}", progress=False) for drop in (False, True)]
    for manifest in manifests:
        assert len(manifest.dropped) == 1
        assert manifest.dropped[0].startswith("20 of 80 documents left out: no text (null or empty): ")
        assert sum(info.num_documents for infos in manifest.splits.values() for info in infos) == 60
    corpus = open_corpus(DataConfig(sources=(f"prepared:{tmp_path}/out-True",)))
    assert corpus.dropped == manifests[1].dropped[0]


def test_text_that_is_larger_than_its_file_is_not_held_in_memory(tmp_path, monkeypatch):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(
        "".join(f"some text {n}\n" * 1400 + "\n" for n in range(30)).encode()))
    settings = Settings((f"text:{tmp_path}/a.txt.gz",), "sentencepiece", 280, 0.2)
    small = prepare(settings, tmp_path / "small", progress=False)
    monkeypatch.setattr(preparing, "_IN_MEMORY_CHARACTERS", 50_000)
    monkeypatch.setattr(preparing, "_statistics", None)  # it needs the whole text
    large = prepare(settings, tmp_path / "large", progress=False)
    assert small.statistics and not large.statistics
    assert large.fingerprint == small.fingerprint


@pytest.mark.parametrize(("lengths", "warned"), [([100] * 200, False), ([100] * 40 + [100_000], True), ([9], None)])
def test_a_held_out_share_far_from_what_was_asked_is_said(tmp_path, lengths, warned):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{n:04}" + "x" * length}) + "\n"
                                              for n, length in enumerate(lengths)))
    fraction = 0.5 if warned is not None else 0.0
    prepare(Settings((f"jsonl:{tmp_path}/a.jsonl",), "bytes", 0, fraction), tmp_path / "out", progress=False)
    warning = open_corpus(DataConfig(sources=(f"prepared:{tmp_path}/out",))).split_warning
    assert bool(warning) == bool(warned)
    if warned:
        assert re.search(r"out: warning: (2|97)\.\d\d% of the text is held out, not 50\.00%", warning)


READ_ALL = """
import resource, sys
from illada_jax.data.sources import examples, registry
from illada_jax.errors import InputError
try:
    import pyarrow.parquet  # its memory is not that of the file
except ImportError:
    pass
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for spec in sys.argv[1:]:
    try:
        list_parts = examples.parts if spec.startswith("chat:") else registry.parts
        print(spec.rpartition("/")[2], sum(1 for part in list_parts(spec, 2**20) for _ in part.read()))
    except InputError as error:
        print(str(error).rpartition("/")[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="units of ru_maxrss")
def test_memory_does_not_depend_on_the_file(tmp_path):
    megabytes, specs = 16, []
    for kind, head, tail in (("text", b"", b""), ("jsonl", b'{"text": "', b'"}\n'),
                             ("chat", b'{"prompt": "x", "response": "', b'"}\n{"prompt": "x", "response": "y"}\n')):
        content = head + b"a" * (megabytes * 2**20) + tail
        for suffix, compress in ((".gz", lambda content: gzip.compress(content, 1)), (".zst", frame), ("", bytes)):
            path = tmp_path / f"{kind}.jsonl{suffix}"
            path.write_bytes(compress(content))
            specs.append(f"{kind}:{path}")
    done = subprocess.run([sys.executable, "-c", READ_ALL, *specs], capture_output=True, text=True, check=True)
    *lines, growth = done.stdout.splitlines()
    assert [line for line in lines if "line 1: longer than max_document_megabytes = 1" in line] == lines[3:6]
    assert [line.split()[1] for line in lines[6:]] == ["2"] * 3 and int(lines[0].split()[1]) > 500
    assert int(growth) < megabytes * 1024 // 2, done.stdout  # KiB
