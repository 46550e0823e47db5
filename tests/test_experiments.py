"""Every experiment is initialised abstractly; those of the papers have the published sizes and resolve as pinned."""

import json
import math
import pathlib
import runpy

import jax
import numpy as np
import pytest

from illada_jax import config as config_lib
from illada_jax.config import Config
from illada_jax.parallel.mesh import make_mesh
from illada_jax.training.optimizer import make_schedule
from illada_jax.training.step import abstract_state
from tests.fixtures.make_configs import CONFIGS, EXPERIMENTS, RECIPES, dump, load

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_experiment_is_initialised_abstractly(path):
    """The whole state with its shardings on eight devices; ids are those that the tokenizer will give."""
    values = config_lib.to_dict(load(path))
    values["model"]["vocab_size"] = values["model"]["vocab_size"] or values["data"]["tokenizer_vocab_size"]
    config = config_lib.from_dict(values)
    state = abstract_state(config, make_mesh(config.mesh))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
    moments = sum(math.prod(x.shape) for x in jax.tree.leaves(state.opt_state) if x.ndim)
    average = sum(math.prod(x.shape) for x in jax.tree.leaves(state.ema))
    # Adam has two moments for every param, Muon one for those that are its own.
    assert moments == 2 * count if config.optimizer.name == "adamw" else count < moments < 2 * count
    assert average == (count if config.optimizer.ema_decay else 0)
    if not config.train.steps:
        return  # as many as the examples need
    rates = [float(make_schedule(config, config.optimizer.learning_rate)(step))
             for step in (config.optimizer.warmup_steps, config.train.steps)]
    assert rates[0] == pytest.approx(config.optimizer.learning_rate)
    assert rates[1] == pytest.approx(
        config.optimizer.final_learning_rate if config.optimizer.decay_steps else config.optimizer.learning_rate)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize(("steps", "num_layers"), [(30, 2), (1, 1), (10**7, 7)])
def test_every_experiment_is_shortened_lengthened_and_resized_by_one_field(path, steps, num_layers):
    experiment = runpy.run_path(str(path))["get_config"]()
    experiment.train.update(steps=steps, epochs=0)
    experiment.eval.every_epochs = 0.0
    experiment.model.num_layers = num_layers
    config = config_lib.from_config_dict(experiment)
    at = np.array([0, config.warmup_steps, config.decay_start, steps])
    rates = np.broadcast_to(make_schedule(config, 1.0)(at), at.shape)
    assert rates[1] == 1 or steps == 1
    assert rates[-1] < 0.9 or not config.decay_steps
    assert (config.warmup_steps, config.schedule_scale) == (config.optimizer.warmup_steps, 1) or steps < 1000


@pytest.mark.parametrize(
    ("name", "parameters", "without_embedding", "tokens"),
    [
        ("pretrain_8b", "7.62", "6.98", 12e12),
        ("llada_8b", "8.02", "6.98", 2.3e12),
        ("pretrain_1b", "1.19", "0.87", 0.5e12),
    ],
)
def test_sizes_are_the_published_ones(name, parameters, without_embedding, tokens):
    config = load(EXPERIMENTS / f"{name}.py")
    facts = dump(config)
    embeddings = config.model.vocab_size * config.model.d_model * (1 if config.model.tied_head else 2)
    assert f"{facts['parameters'] / 1e9:.2f}" == parameters
    assert f"{(facts['parameters'] - embeddings) / 1e9:.2f}" == without_embedding
    assert facts["tokens"] == pytest.approx(tokens, rel=1e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_of_the_papers_resolve_as_pinned(name):
    """A field that is newer than the file may have its default; else `tests/fixtures/make_configs.py`."""
    golden = json.loads((FIXTURES / f"{name}.json").read_text())
    now = json.loads(json.dumps(dump(load(EXPERIMENTS / f"{name}.py"))))
    defaults = config_lib.to_dict(Config())
    for section, fields in now["config"].items():
        if isinstance(fields, dict):
            pinned = golden["config"].get(section, {})
            younger = {key: json.loads(json.dumps(defaults[section][key])) for key in fields if key not in pinned}
            golden["config"][section] = pinned | younger
    assert config_lib.differences(golden, now) == []
