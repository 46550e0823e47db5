"""Untrusted files run no code: nothing is unpickled, evaluated or imported when they are loaded."""

import ast
import json
import os
import pathlib
import pickle
import re
import resource
import shutil

import jax
import pytest

from illada_jax.config import DataConfig
from illada_jax.data.corpus import open_corpus
from illada_jax.data.preparing.settings import Settings
from illada_jax.data.preparing.text import prepare
from illada_jax.data.sources import examples
from illada_jax.data.tokenizers import ByteTokenizer
from illada_jax.errors import InputError
from illada_jax.interop import load_model, open_model
from illada_jax.training.saved_model import checksum
from tests.evaluation import lm_eval_toys

ROOT = pathlib.Path(__file__).parent.parent
FIXTURE = ROOT / "tests" / "fixtures" / "checkpoints" / "illada-gqa-tied"
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch", "transformers", "yaml"}
CALLS = {"eval", "exec", "compile", "__import__", "extractall", "import_module", "resolve_name"}
# Where code is run on purpose: a generated program in its sandbox; a scorer that the user's own config names; the
# standard library's own documentation.
ALLOWED = {"evaluation/code_runner.py": {"exec", "compile"}, "evaluation/answer_metrics.py": {"resolve_name"},
           "data/sources/builtin.py": {"import_module"}}


@pytest.mark.parametrize("path", sorted((ROOT / "illada_jax").rglob("*.py")),
                         ids=lambda path: str(path.relative_to(ROOT / "illada_jax")))
def test_no_module_loads_code_from_data(path):
    name = str(path.relative_to(ROOT / "illada_jax"))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert MODULES.isdisjoint(alias.name.split(".")[0] for alias in node.names), ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in MODULES, ast.unparse(node)
        elif isinstance(node, ast.Call):
            function = node.func
            called = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
            # Methods named compile belong to regular expressions and lowered programs.
            if called in CALLS and (called != "compile" or isinstance(function, ast.Name)):
                assert called in ALLOWED.get(name, set()), f"{name}, line {node.lineno}: {ast.unparse(node)}"
            for keyword in node.keywords:
                unsafe = keyword.arg in ("allow_pickle", "trust_remote_code")
                assert not unsafe or ast.unparse(keyword.value) == "False", ast.unparse(node)


@pytest.fixture
def no_pickle(monkeypatch):
    """Makes unpickling fail."""
    def refuse(*_, **__):
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)


def test_nothing_is_unpickled(no_pickle, tmp_path):
    lm_eval_toys.save(tmp_path / "run")
    assert load_model(tmp_path / "run").step == 1
    shutil.copytree(FIXTURE, tmp_path / "checkpoint")
    ByteTokenizer().save(tmp_path / "checkpoint")
    open_model(str(tmp_path / "checkpoint")).restore(jax.numpy.dtype("float32"), None)
    (tmp_path / "text").mkdir()
    for i in range(3):
        (tmp_path / "text" / f"{i}.txt").write_text(f"some text {i} " * 9)
    prepare(Settings((f"text:{tmp_path}/text",), "bytes", 0, 0.3), tmp_path / "corpus", progress=False)
    corpus = open_corpus(DataConfig(sources=(f"prepared:{tmp_path}/corpus",)))
    assert corpus.train.read(0, 5).shape == (5,)
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}))
    assert len(list(examples.parts(f"chat:{tmp_path}/x.jsonl")[0].read())) == 1


@pytest.mark.parametrize("changes", [{"vocab_size": 2**31}, {"num_layers": 10**6}, {"d_model": 2**20}],
                         ids=["rows", "layers", "width"])
def test_a_checkpoint_that_claims_to_be_larger_than_its_arrays_is_refused(tmp_path, changes):
    """Shapes are compared before anything of their size is allocated."""
    lm_eval_toys.save(tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "1"
    meta, tokenizer_files = (json.loads((checkpoint / item / "metadata").read_text()) for item in ("meta", "tokenizer"))
    meta["config"]["model"] |= changes
    del meta["checksum"]
    forged = {**meta, "checksum": checksum(meta, tokenizer_files)}
    (checkpoint / "meta" / "metadata").write_text(json.dumps(forged))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=r"checkpoints/1: corrupt: .*there is no other checkpoint"):
        load_model(tmp_path / "run")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB


ODD = {"directory": lambda path: path.mkdir(), "FIFO": os.mkfifo, "deep": lambda path: path.write_text("[" * 10**5),
       "deep object": lambda path: path.write_text('{"a":' * 500 + "1" + "}" * 500),
       "half a character": lambda path: path.write_bytes(b'{"a": "\xe2\x82'),
       "a list": lambda path: path.write_text("[]")}


def replaced(directory, name, kind):
    """Puts something odd in the place of a file."""
    (directory / name).unlink(missing_ok=True)
    ODD[kind](directory / name)


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json",
                                  "special_ids.json", "tokenizer.json", "tokenizer_config.json",
                                  "model-00001-of-00003.safetensors"])
def test_a_hugging_face_directory_with_an_odd_file_is_refused_by_name(tmp_path, name, kind):
    directory = tmp_path / "checkpoint"
    shutil.copytree(FIXTURE, directory)
    ByteTokenizer().save(directory)
    replaced(directory, name, kind)
    with pytest.raises(InputError, match=re.escape(str(directory))) as error:
        open_model(str(directory))
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", ["manifest.json", "tokenizer/special_ids.json"])
def test_a_prepared_corpus_with_an_odd_file_is_refused_by_name(tmp_path, name, kind):
    (tmp_path / "x.txt").write_text("some text")
    prepare(Settings((f"text:{tmp_path}/x.txt",), "bytes", 0, 0.0), tmp_path / "corpus", progress=False)
    replaced(tmp_path / "corpus", name, kind)
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "corpus"))):
        open_corpus(DataConfig(sources=(f"prepared:{tmp_path}/corpus",)))


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("item", ["meta", "tokenizer"])
def test_a_checkpoint_with_an_odd_file_is_refused_by_name(tmp_path, item, kind):
    lm_eval_toys.save(tmp_path / "run")
    replaced(tmp_path / "run" / "checkpoints" / "1", f"{item}/metadata", kind)
    with pytest.raises(InputError, match=r"checkpoints/1: corrupt: "):
        load_model(tmp_path / "run")
