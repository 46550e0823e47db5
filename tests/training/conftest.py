"""A tiny experiment on the byte-level text of a few files, trained by the real loop."""

import json

import jax
import numpy as np
import pytest
from etils import epath
from flax import traverse_util

from illada_jax.config import Config, from_dict, to_dict
from illada_jax.data.corpus import open_corpus
from illada_jax.data.pipeline import Pipeline
from illada_jax.evaluation.evaluators import make_evaluators
from illada_jax.parallel.mesh import make_mesh
from illada_jax.training import loop
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


# Sections and fields of a config that the step does not depend on: runs that differ only there share a compiled one.
_NOT_IN_THE_STEP = ("mesh", "data", "sft", "init", "eval", "checkpoint", "decode", "train.stop_step", "train.log_every",
                    "train.tensorboard", "train.plateau_window", "train.plateau_share", "train.watchdog_seconds")


@pytest.fixture(scope="session", autouse=True)
def shared_steps():
    """Compiles a training step once for all runs of the same network, objective and optimizer."""
    made = {}

    def share(make):
        def shared(config, mesh, *rate):
            values = traverse_util.flatten_dict(to_dict(config), sep=".")
            key = make, mesh, rate, str({k: v for k, v in values.items() if not k.startswith(_NOT_IN_THE_STEP)})
            if key not in made:
                made[key] = make(config, mesh, *rate)
            return made[key]

        return shared

    with pytest.MonkeyPatch.context() as patch:
        for name in ("make_train_step", "make_init"):
            patch.setattr(loop, name, share(getattr(loop, name)))
        yield


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
