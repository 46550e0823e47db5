"""A tiny experiment on the byte-level text of a few files, trained by the real loop."""

import json

import jax
import numpy as np
import pytest
from etils import epath

from illada_jax.config import Config, from_dict, to_dict
from illada_jax.data.corpus import open_corpus
from illada_jax.data.pipeline import Pipeline
from illada_jax.evaluation.evaluators import make_evaluators
from illada_jax.parallel.mesh import make_mesh
from illada_jax.training.loop import RunSetup, train
from illada_jax.training.run import resolve

WORDS = ["mask", "token", "noise", "time", "model", "text", "reveal", "block", "sure", "end"]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text")
    for i in range(40):
        (path / f"{i:02}.txt").write_text(" ".join(rng.choice(WORDS, 120)) + ".\n")
    return path


def make_config(text_file, cache_dir, **changes) -> Config:
    """A tiny experiment; `changes` are `section__field=value`."""
    values = to_dict(Config())
    values["data"] |= {"sources": (f"text:{text_file}",), "tokenizer": "bytes", "cache_dir": str(cache_dir),
                       "length": 32, "batch_size": 8, "heldout_fraction": 0.2}
    values["model"] |= {"vocab_size": 264, "d_model": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4,
                        "head_dim": 8, "d_ff": 32, "max_length": 64}
    values["train"] |= {"steps": 10, "log_every": 3, "tensorboard": False}
    values["optimizer"] |= {"learning_rate": 3e-3, "warmup_steps": 2, "decay_steps": 4}
    values["eval"] |= {"evaluators": (), "windows": 8}
    values["checkpoint"] |= {"every": 1000}
    for key, value in changes.items():
        section, name = key.split("__")
        assert name in values[section]
        values[section][name] = value
    return from_dict(values)


@pytest.fixture(scope="session")
def run(text_file, tmp_path_factory):
    """run(workdir, num_devices, evaluators, allowed, poison, **changes) trains: (outcome, metrics lines).

    `poison(pipeline)` may do something to the batches.
    """

    def run(workdir, num_devices=1, evaluators=None, allowed=(), poison=lambda pipeline: pipeline, **changes):
        config = make_config(text_file, tmp_path_factory.getbasetemp() / "cache", **changes)
        mesh = make_mesh(config.mesh, jax.devices()[:num_devices])
        corpus = open_corpus(config.data)
        config = resolve(config, corpus.tokenizer)
        pipeline = poison(Pipeline(config, corpus))
        evaluators = evaluators or make_evaluators(config.eval.evaluators, config, corpus, pipeline, mesh)
        outcome = train(RunSetup(config, epath.Path(workdir), mesh, pipeline, corpus.tokenizer, evaluators, allowed))
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().split("\n") if line]
        return outcome, lines

    return run
