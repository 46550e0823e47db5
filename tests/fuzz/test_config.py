"""An invalid config is refused before anything is compiled; an accepted one can be compiled."""

import json

import jax
from hypothesis import given

from illada_jax import config as config_lib
from illada_jax.config import Config
from illada_jax.errors import ConfigError, InputError
from illada_jax.parallel.mesh import check_divisible, make_mesh
from illada_jax.training import run
from illada_jax.training.optimizer import make_optimizer, make_schedule
from illada_jax.training.plateau import PlateauWatch
from illada_jax.training.step import abstract_state
from tests.fuzz.strategies import corrupted

VALUES = config_lib.to_dict(Config())
VALUES["model"]["vocab_size"] = 264


@given(corrupted(VALUES))
def test_no_edit_reaches_the_compiler_with_a_bad_value(values):
    try:
        config = config_lib.from_dict(values)
        mesh = make_mesh(config.mesh, jax.devices())
        check_divisible(config, mesh)
        run.check_memory(config, mesh)
    except InputError as error:
        assert "\n" not in str(error)
        return
    if not config.train.steps:
        return
    make_optimizer(config)
    abstract_state(config, mesh)
    schedule = make_schedule(config, config.optimizer.learning_rate)
    for step in (0, 1, config.optimizer.warmup_steps, config.decay_start, config.train.steps):
        assert 0 <= float(schedule(step)) < float("inf")
    PlateauWatch.of(config)
    json.dumps(config_lib.to_dict(config), allow_nan=False)
    assert config_lib.from_dict(json.loads(json.dumps(config_lib.to_dict(config)))) == config


@given(corrupted(json.loads(json.dumps(VALUES))))
def test_a_saved_config_is_loaded_or_refused(values):
    try:
        config_lib.from_saved(values)
    except ConfigError as error:
        assert "\n" not in str(error)
