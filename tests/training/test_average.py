"""The moving average of the params: its values, its checkpoints, and its uses."""

import jax
import numpy as np
import pytest

from illada_jax.config import from_dict, to_dict
from illada_jax.errors import ConfigError
from illada_jax.interop import load_model
from illada_jax.parallel.mesh import make_mesh
from illada_jax.training.step import abstract_state
from tests.training.conftest import make_config


def tree_equal(a, b, atol=0.0):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=0, atol=atol), a, b)


def test_it_is_the_average_of_the_params_of_every_step(run, tmp_path):
    """Against a plain loop; the first step changes nothing (the rate starts at 0) and so shows the initial params."""
    params = []

    def spy(each, step):
        params.append(jax.device_get(each))
        return {}

    changes = {"train__stop_step": 4, "eval__every": 1}
    run(tmp_path / "w", evaluators={"spy": spy}, **changes)
    averaged, _ = run(tmp_path / "ema", optimizer__ema_decay=0.2, **changes)
    tree_equal(averaged.state.params, params[-1], atol=1e-6)  # two programs: rounding may differ
    average = params[0]
    for step, each in enumerate(params):
        decay = min(0.2, (1 + step) / (10 + step))
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, each)  # noqa: B023
    tree_equal(averaged.state.ema, average, atol=1e-6)


@pytest.mark.slow
def test_it_is_saved_restored_and_used(run, tmp_path):
    seen = {}

    def spy(params, step):
        seen[step] = jax.device_get(params)
        return {}

    changes = {"optimizer__ema_decay": 0.9, "eval__every": 5}
    whole, _ = run(tmp_path / "whole", 8, evaluators={"spy": spy}, **changes)
    run(tmp_path / "parts", 8, **changes, train__stop_step=5)
    resumed, _ = run(tmp_path / "parts", 8, **changes)
    tree_equal(whole.state, resumed.state)
    tree_equal(seen[10], whole.state.ema)
    tree_equal(load_model(tmp_path / "whole").params, whole.state.ema)
    assert max(np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in zip(
        jax.tree.leaves(whole.state.ema), jax.tree.leaves(whole.state.params), strict=True)) > 1e-4
    jax.tree.map(lambda a, b: a.sharding == b.sharding or pytest.fail(f"{a.sharding}"),
                 whole.state.ema, whole.state.params)
    started, _ = run(tmp_path / "next", 8, train__steps=1, init__checkpoint=str(tmp_path / "whole"),
                     optimizer__warmup_steps=1, optimizer__decay_steps=0)
    tree_equal(started.state.params, whole.state.ema)


@pytest.mark.slow
def test_it_can_begin_and_end_with_a_restart(run, tmp_path):
    before, _ = run(tmp_path / "w", train__stop_step=5)
    plain = jax.device_get(before.state.params)
    refused = pytest.raises(ConfigError, match=r"optimizer\.ema_decay: 0\.0 → 0\.9")
    with refused:
        run(tmp_path / "w", optimizer__ema_decay=0.9)
    allowed = ("optimizer.ema_decay",)
    begun, _ = run(tmp_path / "w", allowed=allowed, optimizer__ema_decay=0.9, train__stop_step=6)
    decay = 6 / 15
    tree_equal(begun.state.ema, jax.tree.map(lambda a, p: decay * a + (1 - decay) * np.asarray(p), plain,
                                             begun.state.params), atol=1e-6)
    ended, _ = run(tmp_path / "w", allowed=allowed)
    assert ended.state.ema is None
    tree_equal(load_model(tmp_path / "w").params, ended.state.params)


def test_off_it_takes_no_memory_and_on_one_copy_sharded_as_the_params(text_file):
    config = make_config(text_file, "")
    values = to_dict(config)
    values["optimizer"]["ema_decay"] = 0.999
    mesh = make_mesh(config.mesh)
    off, on = (abstract_state(c, mesh) for c in (config, from_dict(values)))
    assert not jax.tree.leaves(off.ema)
    assert jax.tree.leaves(on.ema) == jax.tree.leaves(on.params)
