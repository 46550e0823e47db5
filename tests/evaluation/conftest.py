"""Fixtures for the tests of the evaluation command. The harness must find no network, and nobody's cache."""

import os
import tempfile

import pytest
from absl import flags

from illada_jax import api, evaluate
from tests.evaluation import lm_eval_toys as toys

os.environ["HF_HOME"] = tempfile.mkdtemp()
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """(Checkpoint, directory of tasks)."""
    root = tmp_path_factory.mktemp("evaluate")
    return toys.save(root / "model"), toys.write_tasks(root / "tasks")


@pytest.fixture(scope="module")
def lm():
    return api.LanguageModel(toys.CONFIG, toys.params(), toys.TOKENIZER)


@pytest.fixture
def run(lm, places, monkeypatch, capsys):
    """Runs the command with flags on the model in memory; returns what it prints."""
    monkeypatch.setattr(api, "load", lambda path, dtype, mesh, quantize, special_ids: lm)

    def call(*arguments):
        flags.FLAGS.unparse_flags()
        for flag in flags.FLAGS.get_key_flags_for_module(evaluate):
            flag.unparse()
        flags.FLAGS(["evaluate", "--checkpoint=x", f"--include_path={places[1]}", *arguments])
        assert evaluate.main([]) is None
        return capsys.readouterr().out

    return call
