import dataclasses
import errno
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from illada_jax.config import DataConfig
from illada_jax.data import corpus as corpus_module
from illada_jax.data.corpus import open_corpus
from illada_jax.data.manifest import Manifest, open_shards
from illada_jax.data.preparing import jobs, text
from illada_jax.data.preparing.jobs import make_locally
from illada_jax.data.preparing.settings import Settings
from illada_jax.data.preparing.text import prepare
from illada_jax.data.sources.registry import Document
from illada_jax.errors import ConfigError, InputError
from tests.util import documents

NUM_FILES = 12


@pytest.fixture
def texts(tmp_path):
    """A directory of twelve files of 40 documents, some of them repeated."""
    directory = tmp_path / "texts"
    directory.mkdir()
    for n in range(NUM_FILES):
        lines = [json.dumps({"text": f"Document {(n * 35 + i) % 400}: the quick brown fox\n" * (1 + i % 3)})
                 for i in range(40)]
        (directory / f"{n:02}.jsonl").write_text("\n".join(lines))
    return directory


def settings_for(texts, **values):
    """Settings that make a shard of every two or three files."""
    return Settings(**{"sources": (f"jsonl:{texts}",), "tokenizer": "sentencepiece", "vocab_size": 300,
                       "heldout_fraction": 0.1, "shard_bytes": 10_000} | values)


def contents(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def stored_texts(directory):
    """The documents of each split, decoded."""
    _, tokenizer, streams = open_shards(directory)
    return {split: [tokenizer.decode(stream.document(i)) for i in range(stream.num_documents)]
            for split, stream in streams.items()}


@pytest.mark.parametrize("shard_bytes", [10_000, 2**30])
@pytest.mark.parametrize("tokenizer", ["bytes", "sentencepiece"])
def test_every_document_is_on_one_side_and_counts_are_exact(texts, tmp_path, shard_bytes, tokenizer):
    settings = settings_for(texts, shard_bytes=shard_bytes, tokenizer=tokenizer)
    manifest = prepare(settings, tmp_path / "out", progress=False)
    assert (len(manifest.splits["train"]) > 3) == (shard_bytes == 10_000)
    stored = stored_texts(tmp_path / "out")
    everything = [document.text for document in documents(settings.sources[0])]
    assert sorted(stored["train"] + stored["heldout"]) == sorted(everything)
    assert not set(stored["train"]) & set(stored["heldout"])
    assert 0.03 < len(stored["heldout"]) / len(everything) < 0.25
    assert stored["train"] == [text for text in everything if text not in set(stored["heldout"])]
    _, opened, streams = open_shards(tmp_path / "out")
    for split, stream in streams.items():
        assert stream.num_bytes == sum(len(text.encode()) for text in stored[split])
        assert stream.num_tokens == sum(len(opened.encode(text)) + 1 for text in stored[split])


def test_groups_are_held_out_as_a_whole(tmp_path):
    prepare(Settings(("sudoku",), "bytes", 0, 0.1), tmp_path / "out", progress=False)
    grids = {split: {text.split("=")[1] for text in stored} for split, stored in stored_texts(tmp_path / "out").items()}
    assert not grids["train"] & grids["heldout"]
    assert len(grids["train"]) + len(grids["heldout"]) == 288 and len(grids["heldout"]) > 10


@pytest.mark.parametrize("drop_duplicates", [False, True])
def test_processes_do_not_change_a_byte(texts, tmp_path, drop_duplicates):
    settings = settings_for(texts, drop_duplicates=drop_duplicates)
    for processes in (1, 2):
        engine = functools.partial(make_locally, num_processes=processes, progress=False)
        prepare(settings, tmp_path / str(processes), engine, progress=False)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@pytest.mark.parametrize("shard_bytes", [10_000, 2**30])
def test_duplicates_are_dropped_on_request(texts, tmp_path, shard_bytes):
    settings = settings_for(texts, drop_duplicates=True, shard_bytes=shard_bytes)
    everything = [document.text for document in documents(settings.sources[0])]
    assert len(set(everything)) < len(everything)
    prepare(settings, tmp_path / "out", progress=False)
    stored = stored_texts(tmp_path / "out")
    assert sorted(stored["train"] + stored["heldout"]) == sorted(set(everything))
    assert stored["train"] == [text for text in dict.fromkeys(everything) if text in set(stored["train"])]


KILLED = """
import os, pathlib, signal, sys
from illada_jax import files
write = files.write_atomically
def write_or_die(path, content):
    if path.name == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, content)
files.write_atomically = write_or_die
from illada_jax.data.preparing import text
text.prepare(text.Settings((sys.argv[1],), "sentencepiece", 300, 0.1, shard_bytes=10_000),
             pathlib.Path(sys.argv[2]), progress=False)
"""


@pytest.mark.parametrize("when", ["000002.json", "manifest.json"])
def test_killed_and_repeated_is_as_never_killed(texts, tmp_path, when):
    settings, target = settings_for(texts), tmp_path / "killed"
    killed = subprocess.run([sys.executable, "-c", KILLED, settings.sources[0], target, when], check=False)
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(InputError, match="never finished"):
        open_shards(target)
    first = target / "train-000000.array_record"
    made = first.stat().st_mtime_ns
    (target / "train-000009.array_record.tmp-1").write_text("half-written")
    prepare(settings, target, progress=False)
    assert first.stat().st_mtime_ns == made
    prepare(settings, tmp_path / "whole", progress=False)
    assert contents(target) == contents(tmp_path / "whole")


def test_a_mounted_bucket_that_renames_no_directories_will_do(texts, tmp_path, monkeypatch):
    """By default gcsfuse refuses it with EMFILE."""
    def without_directories(rename):
        def checked(source, target, **more):
            if os.path.isdir(source):
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), source)
            return rename(source, target, **more)
        return checked

    settings = settings_for(texts)
    prepare(settings, tmp_path / "disk", progress=False)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, without_directories(getattr(os, name)))
    # Killed while the tokenizer was being saved, it begins again.
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(jobs, "train_sentencepiece", lambda *_: HalfSaved())
        prepare(settings, tmp_path / "bucket", progress=False)
    prepare(settings, tmp_path / "bucket", progress=False)
    assert contents(tmp_path / "bucket") == contents(tmp_path / "disk")


class HalfSaved:
    def save(self, directory):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "sentencepiece.model").write_bytes(b"half")
        raise KeyboardInterrupt


def test_unfinished_work_of_other_settings_or_files_is_refused(texts, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    settings, target = settings_for(texts), tmp_path / "out"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(jobs, "make_shard", fail)
        prepare(settings, target, progress=False)
    before = contents(target)
    with pytest.raises(InputError, match="unfinished preparation with other sources, files or settings"):
        prepare(dataclasses.replace(settings, vocab_size=301), target, progress=False)
    status = (texts / "03.jsonl").stat()
    os.utime(texts / "03.jsonl", ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    with pytest.raises(InputError, match="unfinished preparation with other sources, files or settings"):
        prepare(settings, target, progress=False)
    assert contents(target) == before


def test_a_target_that_is_taken_is_refused(texts, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        prepare(settings_for(texts), target, progress=False)
    assert contents(target) == {"precious.txt": b"mine"}
    prepare(settings_for(texts), tmp_path / "second", progress=False)
    with pytest.raises(InputError, match="already holds a prepared corpus"):
        prepare(settings_for(texts), tmp_path / "second", progress=False)


@pytest.mark.parametrize("processes", [1, 2])
def test_bad_text_leaves_no_corpus_and_is_named(texts, tmp_path, processes):
    (texts / "07.jsonl").write_text('{"text": "fine"}\n{"body": 1}\n' + " " * 9000)
    engine = functools.partial(make_locally, num_processes=processes, progress=False)
    with pytest.raises(InputError, match=r"07\.jsonl, line 2: no text in the field 'text'"):
        prepare(settings_for(texts, tokenizer="bytes"), tmp_path / "out", engine, progress=False)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(("content", "fraction", "message"), [
    ("", 0.1, "empty; name a source that holds text"),
    ('{"text": ""}', 0.1, "empty; name a source that holds text"),
    ('{"text": "one"}', 0.1, "a single document cannot be split"),
])
def test_corpora_without_enough_text(tmp_path, content, fraction, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        prepare(Settings((f"jsonl:{tmp_path}/a.jsonl",), "bytes", 0, fraction), tmp_path / "out", progress=False)


def test_small_corpora_always_hold_something_out_and_something_in(tmp_path):
    for fraction in (1e-9, 0.999999):
        for count in (2, 3, 7):
            (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"{i}"}) for i in range(count)))
            target = tmp_path / f"{fraction}-{count}"
            prepare(Settings((f"jsonl:{tmp_path}/a.jsonl",), "bytes", 0, fraction), target, progress=False)
            stored = stored_texts(target)
            assert stored["train"] and stored["heldout"] and len(stored["train"] + stored["heldout"]) == count


def test_nothing_is_held_out_at_zero(texts, tmp_path):
    prepare(settings_for(texts, heldout_fraction=0.0), tmp_path / "out", progress=False)
    assert not stored_texts(tmp_path / "out")["heldout"]


@pytest.mark.parametrize("values", [{"heldout_fraction": 1.0}, {"heldout_fraction": -0.1}, {"shard_bytes": 0}])
def test_bad_settings(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        Settings(**{"sources": ("sudoku",), "tokenizer": "bytes", "vocab_size": 0, "heldout_fraction": 0.1} | values)


def test_statistics_are_those_of_the_text(tmp_path):
    statistics = text._statistics([Document("abab"), Document("cdcd")])
    assert statistics["order-0 entropy of bytes"] == pytest.approx(2.0)
    assert text._statistics([Document("a" * 10_000)])["gzip -9"] < 0.1


def data_config(texts, tmp_path, **values):
    return DataConfig(**{"sources": (f"jsonl:{texts}",), "tokenizer": "bytes", "cache_dir": str(tmp_path / "cache")}
                      | values)


def test_small_corpora_prepare_themselves_once(texts, tmp_path, monkeypatch, capfd):
    data = data_config(texts, tmp_path)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # bars are for terminals
    first = open_corpus(data)
    assert "tokenizing: 100%" in capfd.readouterr().err
    monkeypatch.setattr(corpus_module, "prepare", None)
    again = open_corpus(data)
    assert again.fingerprint == first.fingerprint and again.statistics == first.statistics != {}
    assert again.train.read(0, 100).tolist() == first.train.read(0, 100).tolist()
    assert [component.weight for component in first.components] == [1.0]


def test_the_cache_follows_content_and_settings(texts, tmp_path):
    data = data_config(texts, tmp_path)
    prints = [open_corpus(data, progress=False).fingerprint]
    prints.append(open_corpus(dataclasses.replace(data, heldout_fraction=0.2), progress=False).fingerprint)
    (texts / "00.jsonl").write_text('{"text": "changed"}')
    prints.append(open_corpus(data, progress=False).fingerprint)
    assert len(set(prints)) == 3


def test_an_interrupted_cache_is_not_taken_for_whole(texts, tmp_path, monkeypatch):
    data = data_config(texts, tmp_path)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Manifest, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        open_corpus(data, progress=False)
    assert not list((tmp_path / "cache").iterdir())
    assert open_corpus(data, progress=False).train.num_documents > 0


def test_too_much_to_prepare_on_the_fly(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "_LARGEST_BYTES", 100)
    with pytest.raises(InputError, match=r"too large to prepare on the fly; run: python -m illada_jax\.prepare"):
        open_corpus(data_config(texts, tmp_path))


@pytest.fixture
def two_corpora(texts, tmp_path):
    for name, pattern in (("a", "0[0-3]"), ("b", "1*")):
        prepare(Settings((f"jsonl:{texts}/{pattern}.jsonl",), "bytes", 0, 0.1), tmp_path / name, progress=False)
    return tuple(f"prepared:{tmp_path / name}" for name in "ab")


def test_prepared_corpora_are_mixed(two_corpora, tmp_path):
    mixed = open_corpus(DataConfig(sources=two_corpora, weights=(0.25, 0.75)))
    assert [component.weight for component in mixed.components] == [0.25, 0.75]
    single = [open_corpus(DataConfig(sources=(spec,))) for spec in two_corpora]
    assert mixed.train.num_tokens == sum(corpus.train.num_tokens for corpus in single)
    assert mixed.heldout.num_bytes == sum(corpus.heldout.num_bytes for corpus in single)
    assert len({mixed.fingerprint, *(corpus.fingerprint for corpus in single)}) == 3
    unweighted = open_corpus(DataConfig(sources=two_corpora))
    shares = [corpus.train.num_tokens / mixed.train.num_tokens for corpus in single]
    assert [component.weight for component in unweighted.components] == pytest.approx(shares)


def test_mixtures_that_cannot_be(two_corpora, texts, tmp_path):
    prepare(settings_for(texts), tmp_path / "other", progress=False)
    with pytest.raises(InputError, match="other: prepared with another tokenizer"):
        open_corpus(DataConfig(sources=(two_corpora[0], f"prepared:{tmp_path / 'other'}")))
    with pytest.raises(ConfigError, match="prepared corpora and others do not mix"):
        open_corpus(DataConfig(sources=(two_corpora[0], f"jsonl:{texts}")))
    with pytest.raises(ConfigError, match="weights are for prepared corpora"):
        open_corpus(DataConfig(sources=("sudoku",), weights=(1.0,)))
    with pytest.raises(InputError, match="nowhere: no prepared corpus"):
        open_corpus(DataConfig(sources=("prepared:/nowhere",)))


def test_a_missing_tokenizer_is_named(texts, tmp_path):
    with pytest.raises(InputError, match=r"tokenizer /nowhere\.model: cannot be read: No such file"):
        open_corpus(data_config(texts, tmp_path, tokenizer="/nowhere.model"), progress=False)
    assert not any(pathlib.Path(tmp_path / "cache").glob("*"))
