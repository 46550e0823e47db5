"""Configs are checked: keys, types, values, combinations; and every field is used."""

import ast
import dataclasses
import importlib.util
import inspect
import json
import pathlib

import pytest

from illada_jax import config as config_lib
from illada_jax.config import (
    Config,
    ModelConfig,
    check_resumable,
    defaults,
    from_config_dict,
    from_dict,
    from_saved,
    to_dict,
)
from illada_jax.errors import ConfigError
from tests.fixtures.make_configs import CONFIGS

ROOT = pathlib.Path(__file__).parent.parent


def changed(key, value):
    values = to_dict(Config())
    *sections, name = key.split(".")
    target = values
    for section in sections:
        target = target[section]
    target[name] = value
    return values


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.d_modell", 3),
        ("sead", 3),
        ("train.steps", "many"),
        ("train.steps", 0),
        ("train.steps", 1.5),
        ("train.tensorboard", 1),
        ("model.d_model", 130),
        ("model.num_kv_heads", 3),
        ("model.head_dim", 7),
        ("model.dtype", "float16"),
        ("data.sources", "python_docs"),
        ("data.length", 10_000),
        ("data.heldout_fraction", 1.5),
        ("diffusion.eps", 1.0),
        ("diffusion.time_sampling", "golden"),
        ("optimizer.learning_rate", 0),
        ("optimizer.warmup_steps", -1),
        ("train.microbatches", 3),
        ("train.logits_chunk", 7),
        ("train.stop_step", 10_000),
        ("mesh.fsdp", 0),
        ("faults.action", "ignore"),
        ("faults.rate_scale", 0.0),
        ("faults.max_times", -1),
        ("decode.steps_per_block", 64),
        ("decode.max_new_tokens", 0),
        ("model", 3),
    ],
)
def test_a_bad_value_is_an_error_that_names_key_and_value(key, value):
    with pytest.raises(ConfigError) as error:
        from_dict(changed(key, value))
    message = str(error.value)
    assert f"config.{key}" in message or key == "data.sources"
    assert "\n" not in message
    if not key.endswith(("modell", "sead")):
        assert repr(value) in message


def test_mask_outside_the_vocabulary_is_refused():
    values = changed("model.vocab_size", 100)
    values["diffusion"]["mask_id"] = 100
    with pytest.raises(ConfigError, match=r"config\.diffusion\.mask_id = 100"):
        from_dict(values)


def test_a_missing_key_is_refused():
    values = to_dict(Config())
    del values["train"]["steps"]
    with pytest.raises(ConfigError, match=r"config\.train\.steps: missing"):
        from_dict(values)


def test_a_saved_config_may_lack_younger_fields_but_has_no_others():
    values = to_dict(Config())
    del values["optimizer"]["muon_momentum"]
    assert config_lib.from_saved(values) == Config()
    values["optimizer"]["lr"] = 1.0
    with pytest.raises(ConfigError, match=r"config\.optimizer\.lr: unknown key"):
        config_lib.from_saved(values)


def test_json_and_back_is_the_same_config():
    config = dataclasses.replace(Config(), seed=7)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_the_width_of_a_head_follows_from_the_model_unless_it_is_given():
    config = defaults()
    config.model.update(d_model=96, num_heads=6)
    assert from_config_dict(config).model.head_dim == 16
    config.model.head_dim = 20
    resolved = from_config_dict(config)
    assert resolved.model.head_dim == 20 and from_saved(json.loads(json.dumps(to_dict(resolved)))) == resolved
    config.model.update(d_model=6, num_heads=2, num_kv_heads=1, head_dim=0)
    with pytest.raises(ConfigError, match=r"config\.model\.head_dim = 3: must be even"):
        from_config_dict(config)


@pytest.mark.parametrize("name", ["d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_ff",
                                  "max_length", "vocab_size"])
def test_sizes_of_a_model_are_bounded(name):
    with pytest.raises(ConfigError, match=rf"config\.model\.{name} = 1000000000000: must be at most"):
        ModelConfig(**{name: 10**12})


def test_experiments_are_locked_and_start_from_the_defaults():
    config = defaults()
    with pytest.raises(AttributeError):
        config.train.stepz = 3
    assert from_config_dict(config) == Config()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_experiment_is_valid_and_says_its_command(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    assert config.is_locked
    from_config_dict(config)
    assert f"--config=experiments/{path.name}" in module.__doc__


def test_every_field_is_read():
    """Every field is read by a module other than config.py."""
    read = set()
    for path in (ROOT / "illada_jax").rglob("*.py"):
        tree = ast.parse(path.read_text())
        if path.name == "config.py":
            # Validation reads everything; only the derived properties count here.
            tree = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config")
            methods = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name != "__post_init__"]
            tree = ast.Module(methods, [])
        read |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    for section in dataclasses.fields(Config):
        assert section.name in read, section.name
        if dataclasses.is_dataclass(section.type):
            for field in dataclasses.fields(section.type):
                assert field.name in read, f"nothing reads config.{section.name}.{field.name}"


def test_every_field_is_documented():
    """Every field has a comment beside or above it, except two whose names suffice."""
    for cls in (f.type for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type)):
        lines = inspect.getsource(cls).splitlines()
        for field in dataclasses.fields(cls):
            at = next(i for i, line in enumerate(lines) if line.startswith(f"    {field.name}: "))
            documented = "  # " in lines[at] or lines[at - 1].startswith("    # ")
            assert documented or field.name in ("muon_momentum", "decay_shape"), f"{cls.__name__}.{field.name}"


def test_resume_refuses_other_configs_with_a_list_of_what_differs():
    old = Config()
    new = from_dict(changed("optimizer.b2", 0.5))
    with pytest.raises(ConfigError, match=r"optimizer\.b2: 0\.95 → 0\.5"):
        check_resumable(old, new, 10)
    check_resumable(old, new, 10, allowed=("optimizer.b2",))
    check_resumable(old, from_dict(changed("checkpoint.every", 7)), 10)


def test_resume_may_move_the_decay_only_before_it_starts():
    values = changed("optimizer.decay_steps", 100)
    new = from_dict(values)
    check_resumable(Config(), new, 900)
    with pytest.raises(ConfigError, match="decay"):
        check_resumable(Config(), new, 901)
