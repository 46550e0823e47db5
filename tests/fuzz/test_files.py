"""Untrusted files are read or refused with a message that names them, whatever they contain."""

import json
import pathlib
import shutil
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from illada_jax.data import shards
from illada_jax.data.manifest import open_shards
from illada_jax.data.tokenizers import ByteTokenizer, tokenizer_from_files, train_sentencepiece
from illada_jax.errors import InputError
from illada_jax.interop.hf_model import open_hf_model
from illada_jax.interop.tensors import INDEX, TensorDirectory
from tests.data.test_shards import random_documents, write_corpus
from tests.data.test_tokenizers import byte_level_json
from tests.fuzz.strategies import JUNK, corrupted

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "checkpoints"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus")
    write_corpus(directory, [random_documents(0, 2000, 90), random_documents(1, 20, 30)])
    return directory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint") / "c"
    shutil.copytree(FIXTURES / "illada-gqa-tied", directory)
    ByteTokenizer().save(directory)
    return directory


@given(data=st.data())
def test_a_manifest_is_read_or_refused(corpus, tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("m") / "corpus"
    shutil.copytree(corpus, directory)
    manifest = json.loads((directory / "manifest.json").read_text())
    changed = data.draw(corrupted(manifest) | JUNK)
    (directory / "manifest.json").write_text(json.dumps(changed))
    try:
        stream = open_shards(directory)[2]["train"]
        stream.read(0, min(stream.num_tokens, 100))
        stream.document(stream.num_documents - 1)
    except InputError as error:
        assert str(directory) in str(error) and "\n" not in str(error)
    shutil.rmtree(directory)


def test_a_manifest_cannot_name_files_elsewhere(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "corpus")
    (tmp_path / "corpus" / "train-0").rename(tmp_path / "outside")
    path = tmp_path / "corpus" / "manifest.json"
    for name in ("../outside", str(tmp_path / "outside")):
        manifest = json.loads((corpus / "manifest.json").read_text())
        manifest["splits"]["train"][0]["name"] = name
        path.write_text(json.dumps(manifest))
        with pytest.raises(InputError, match=r"manifest\.json: malformed: .* is not the name of a file"):
            open_shards(tmp_path / "corpus")


@given(data=st.data())
def test_a_flipped_bit_in_a_token_shard_is_detected(corpus, tmp_path_factory, data):
    """Every record has a checksum: the tokens are those written, or an error names the shard."""
    whole = open_shards(corpus)[2]["train"]
    directory = tmp_path_factory.mktemp("s") / "corpus"
    shutil.copytree(corpus, directory)
    shard = directory / data.draw(st.sampled_from(["train-0", "train-1"]))
    content = bytearray(shard.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    shard.write_bytes(content)
    stream = open_shards(directory)[2]["train"]
    for start in range(0, whole.num_tokens, shards.CHUNK_TOKENS // 2):
        stop = min(start + shards.CHUNK_TOKENS // 2, whole.num_tokens)
        try:
            np.testing.assert_array_equal(stream.read(start, stop), whole.read(start, stop))
        except InputError as error:
            assert str(shard) in str(error)
    shutil.rmtree(directory)


TOKENIZERS = {
    "bytes": ByteTokenizer().files(),
    "sentencepiece": train_sentencepiece(["some text to train on"] * 3, 280).files(),
    "huggingface": {**tokenizer_from_files({"tokenizer.json": byte_level_json()}).files(),
                    "tokenizer_config.json": json.dumps({
                        "bos_token": "<s>", "eos_token": {"content": "</s>"},
                        "chat_template": "{{ messages }}"}).encode()},
}


@given(data=st.data(), kind=st.sampled_from(sorted(TOKENIZERS)))
def test_tokenizer_files_are_read_or_refused(data, kind):
    files = dict(TOKENIZERS[kind])
    name = data.draw(st.sampled_from(sorted(files)))
    if name.endswith(".json"):
        content = json.loads(files[name])
        if name == "tokenizer.json":  # smaller, for speed
            content["model"]["vocab"] = dict(list(content["model"]["vocab"].items())[:300])
            content["model"]["merges"] = []
        files[name] = json.dumps(data.draw(corrupted(content) | JUNK)).encode()
    else:
        content = bytearray(files[name])
        for _ in range(data.draw(st.integers(1, 20))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        files[name] = bytes(content)
    try:
        tokenizer = tokenizer_from_files(files)
        ids = tokenizer.encode("a text\n with 漢字 and </s>")
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        tokenizer.decode(ids)
        assert tokenizer.special_tokens and len(tokenizer.unused_ids) <= tokenizer.vocab_size
    except InputError as error:
        assert "\n" not in str(error)


@given(data=st.data(), name=st.sampled_from(["config.json", INDEX, "special_ids.json", "generation_config.json"]))
def test_files_of_a_checkpoint_are_read_or_refused(checkpoint, data, name):
    path = checkpoint / name
    before = path.read_bytes() if path.exists() else None
    changed = data.draw(corrupted(json.loads(before or '{"eos_token_id": [1, 2], "bos_token_id": 0}')) | JUNK)
    path.write_text(json.dumps(changed))
    try:
        open_hf_model(checkpoint)
    except InputError as error:
        assert str(checkpoint) in str(error) and "\n" not in str(error)
    finally:
        path.unlink() if before is None else path.write_bytes(before)


WEIGHTS = save({"a": np.ones((3, 4), np.float32), "b": np.zeros(5, np.float16)})
HEADER = json.loads(WEIGHTS[8 : 8 + struct.unpack("<Q", WEIGHTS[:8])[0]])


@given(data=st.data())
def test_safetensors_headers_are_read_or_refused(tmp_path_factory, data):
    """Sizes are checked before anything of that size is allocated."""
    directory = tmp_path_factory.mktemp("w")
    start = 8 + struct.unpack("<Q", WEIGHTS[:8])[0]
    kind = data.draw(st.sampled_from(["header", "length", "bytes"]))
    if kind == "header":
        header = json.dumps(data.draw(corrupted(HEADER) | JUNK)).encode()
        content = struct.pack("<Q", len(header)) + header + WEIGHTS[start:]
    elif kind == "length":
        content = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1))) + WEIGHTS[8:]
    else:
        content = bytearray(WEIGHTS)
        for _ in range(data.draw(st.integers(1, 5))):
            content[data.draw(st.integers(0, start))] = data.draw(st.integers(0, 255))
    (directory / "model.safetensors").write_bytes(content)
    try:
        tensors = TensorDirectory(directory)
        for name, tensor in tensors.tensors.items():
            assert tensor.nbytes <= len(content)
            array = tensors.read(name, tuple(slice(None) for _ in tensor.shape))
            assert array.nbytes == tensor.nbytes
    except InputError as error:
        assert str(directory) in str(error) and "\n" not in str(error)
    shutil.rmtree(directory)
