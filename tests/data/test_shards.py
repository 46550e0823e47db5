import json

import numpy as np
import pytest

from illada_jax.data import shards
from illada_jax.data.manifest import Manifest, open_shards
from illada_jax.data.shards import ExampleSet, ShardWriter, TokenStream
from illada_jax.data.tokenizers import ByteTokenizer, train_sentencepiece
from illada_jax.errors import InputError

CHUNK = 16


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(shards, "CHUNK_TOKENS", CHUNK)


def write_corpus(directory, documents_of_shards, tokenizer=None):
    """Documents are lists of ids without EOS. Returns all tokens."""
    tokenizer = tokenizer or ByteTokenizer()
    infos, tokens = [], []
    for n, documents in enumerate(documents_of_shards):
        writer = ShardWriter(directory / f"train-{n}", tokenizer.vocab_size)
        for ids in documents:
            writer.add([*ids, tokenizer.eos_id], len(ids))
            tokens += [*ids, tokenizer.eos_id]
        infos.append(writer.close())
    tokenizer.save(directory / "tokenizer")
    Manifest(("test",), tokenizer.fingerprint, tokenizer.vocab_size, 0.0, {"train": tuple(infos), "heldout": ()},
             {"gzip -9": 2.0}).save(directory)
    return tokens


def random_documents(seed, count, longest):
    draw = np.random.default_rng(seed)
    return [draw.integers(4, 260, draw.integers(0, longest)).tolist() for _ in range(count)]


@pytest.fixture
def corpus(tmp_path):
    documents = [random_documents(n, count, longest) for n, (count, longest) in enumerate([(40, 30), (1, 3), (3, 90)])]
    return tmp_path, write_corpus(tmp_path, documents), [ids for shard in documents for ids in shard]


def test_any_stretch_is_what_was_written(corpus):
    directory, tokens, _ = corpus
    stream = open_shards(directory)[2]["train"]
    assert stream.num_tokens == len(tokens)
    draw = np.random.default_rng(0)
    for _ in range(300):
        start, stop = sorted(draw.integers(0, len(tokens) + 1, 2))
        assert stream.read(start, stop).tolist() == tokens[start:stop]
    assert stream.read(0, len(tokens)).dtype == np.int32


def test_documents(corpus):
    directory, _, documents = corpus
    _, tokenizer, streams = open_shards(directory)
    stream = streams["train"]
    assert stream.num_documents == len(documents)
    assert stream.num_bytes == sum(map(len, documents))
    for i, ids in enumerate(documents):
        assert stream.document(i).tolist() == [*ids, tokenizer.eos_id]
    for index in (-1, len(documents)):
        with pytest.raises(IndexError):
            stream.document(index)
    with pytest.raises(IndexError):
        stream.read(0, stream.num_tokens + 1)


def test_streams_are_concatenated_in_order(tmp_path):
    tokens = []
    for name in "ab":
        (tmp_path / name).mkdir()
        tokens += write_corpus(tmp_path / name, [random_documents(ord(name), 5, 30)])
    stream = TokenStream.concatenate([open_shards(tmp_path / name)[2]["train"] for name in "ab"])
    assert stream.read(0, stream.num_tokens).tolist() == tokens


def test_few_files_are_open_however_many_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_OPEN_READERS", 2)
    tokens = write_corpus(tmp_path, [[[i + 4] * 9] for i in range(12)])
    stream = open_shards(tmp_path)[2]["train"]
    assert stream._reader.cache_info().currsize == 0
    for start in (100, 0, 70, 5):
        assert stream.read(start, start + 20).tolist() == tokens[start : start + 20]
    assert stream._reader.cache_info().currsize == 2


def test_large_vocabularies_take_four_bytes(tmp_path):
    for vocab_size in (2**16, 2**16 + 1):
        writer = ShardWriter(tmp_path / "shard", vocab_size)
        writer.add([vocab_size - 1, 5, 2], 2)
        stream = TokenStream([(tmp_path, writer.close())], vocab_size, eos_id=2)
        assert stream.read(0, 3).tolist() == [vocab_size - 1, 5, 2]


def test_examples_have_an_answer_mask_and_a_source(tmp_path):
    draw = np.random.default_rng(0)
    shards_written, written = [], []
    for source, count in enumerate((30, 1, 12)):
        writer = ShardWriter(tmp_path / f"train-{source}", 2**24, has_answers=True, source=source)
        for _ in range(count):
            ids = draw.integers(0, 2**24, draw.integers(1, 60))
            written.append((ids.tolist(), (draw.random(len(ids)) < 0.5).tolist(), source))
            writer.add(*written[-1][:1], 7, written[-1][1])
        shards_written.append((tmp_path, writer.close()))
    examples = ExampleSet(shards_written, 2**24, eos_id=2)
    assert examples.num_documents == 43 and examples.num_bytes == 7 * 43
    assert examples.sources_N.tolist() == [source for *_, source in written]
    assert examples.lengths_N.tolist() == [len(ids) for ids, *_ in written]
    for index in draw.permutation(43):
        ids, is_answer, _ = written[index]
        assert examples.document(index).tolist() == ids and examples.document(index).dtype == np.int32
        assert examples.is_answer(index).tolist() == is_answer
    assert examples.read(0, examples.num_tokens).tolist() == [i for ids, *_ in written for i in ids]
    for index in (-1, 43):
        with pytest.raises(IndexError):
            examples.document(index)
        with pytest.raises(IndexError):
            examples.is_answer(index)
    empty = ExampleSet([], 2**24, eos_id=2)
    assert empty.num_documents == len(empty.lengths_N) == len(empty.sources_N) == 0


def test_writing_is_reproducible_and_atomic(tmp_path):
    documents = random_documents(0, 50, 40)
    for name in "ab":
        writer = ShardWriter(tmp_path / name, 260)
        for ids in documents:
            writer.add([*ids, 2], len(ids))
        assert not (tmp_path / name).exists()
        writer.close()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert ShardWriter(tmp_path / "empty", 260).close() is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def change_manifest(directory, **values):
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def truncate(directory):
    path = directory / "train-0"
    path.write_bytes(path.read_bytes()[:-1])


def wrong_bytes(directory):
    path = directory / "train-0"
    path.write_bytes(b"\x00" * path.stat().st_size)


def other_tokenizer(directory):
    train_sentencepiece(["some text to train on"], 280).save(directory / "tokenizer")
    (directory / "tokenizer" / "special_ids.json").write_text(
        json.dumps({"kind": "sentencepiece", "bos": 0, "pad": 1, "eos": 2, "mask": 4}))


@pytest.mark.parametrize(("damage", "message"), [
    (truncate, r"train-0: has \d+ bytes, the manifest says \d+: truncated"),
    (wrong_bytes, r"train-0: (cannot be read|has \d+ records|record)"),
    (lambda d: (d / "train-1").unlink(), "train-1: shard of the manifest cannot be opened: No such file"),
    (lambda d: (d / "manifest.json").unlink(), "no prepared corpus"),
    (lambda d: (d / "manifest.json").write_text("{"), r"manifest\.json: not JSON"),
    (lambda d: (d / "manifest.json").write_text("[]"), r"manifest\.json: must be a JSON object"),
    (lambda d: change_manifest(d, format_version=99), r"manifest\.json: format version 99, this program reads 2"),
    (lambda d: change_manifest(d, splits={}), r"manifest\.json: malformed: 'train'"),
    (lambda d: change_manifest(d, has_answers=True), r"train-0: record 0 holds \d+ ids, the manifest says 16"),
    (other_tokenizer, r"manifest\.json: made with another tokenizer"),
    (lambda d: (d / "tokenizer" / "special_ids.json").unlink(), "no tokenizer among"),
])
def test_damage_is_named(corpus, damage, message):
    directory, *_ = corpus
    damage(directory)
    with pytest.raises(InputError, match=message) as caught:
        open_shards(directory)[2]["train"].read(0, 1)
    assert "\n" not in str(caught.value)


def test_the_fingerprint_follows_the_shards(tmp_path):
    fingerprints = set()
    for n, documents in enumerate([[[5, 6]], [[5, 7]], [[5, 6], [5, 6]]]):
        (tmp_path / str(n)).mkdir()
        write_corpus(tmp_path / str(n), [documents])
        fingerprints.add(Manifest.load(tmp_path / str(n)).fingerprint)
    assert len(fingerprints) == 3
