"""Meshes, shardings and the rows of a host."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from illada_jax import model
from illada_jax.config import Config, MeshConfig, ModelConfig
from illada_jax.errors import ConfigError
from illada_jax.parallel.mesh import local_rows, make_mesh
from illada_jax.parallel.sharding import RULES, batch_sharding, like_params, param_shardings
from illada_jax.training.step import abstract_state

SMALL = ModelConfig(vocab_size=64, d_model=16, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=8, d_ff=32)


def test_an_open_axis_takes_the_remaining_devices():
    assert dict(make_mesh(MeshConfig(fsdp=-1, tensor=2)).shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    with pytest.raises(ConfigError, match=r"data=1 × fsdp=-1 × tensor=3: must multiply to the number of devices, 8"):
        make_mesh(MeshConfig(fsdp=-1, tensor=3))


def test_every_axis_of_every_param_has_a_rule_and_no_mesh_axis_twice():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    axes = model.param_axes(SMALL)
    for spec in jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, PartitionSpec)):
        assert set(spec) <= RULES.keys()
    for sharding in jax.tree.leaves(param_shardings(mesh, axes)):
        used = [name for name in sharding.spec if name is not None]
        assert len(used) == len(set(used))


def test_only_norms_are_replicated():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    shapes = model.abstract_params(SMALL)
    shardings = param_shardings(mesh, model.param_axes(SMALL))
    for path, x in jax.tree_util.tree_leaves_with_path(shapes):
        sharding = dict(jax.tree_util.tree_leaves_with_path(shardings))[path]
        share = np.prod(sharding.shard_shape(x.shape)) / x.size
        assert share == (1 if path[-1].key == "scale" else 1 / 8), path


def test_optimizer_state_has_the_sharding_of_its_params():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    state = abstract_state(Config(model=SMALL), mesh)
    large = [x for x in jax.tree.leaves(state.opt_state) if x.size > 64]
    assert len(large) == 2 * len([x for x in jax.tree.leaves(state.params) if x.size > 64])
    assert all(np.prod(x.sharding.shard_shape(x.shape)) == x.size // 8 for x in large)


def test_other_arrays_are_replicated():
    mesh = make_mesh(MeshConfig(fsdp=8))
    sharded = batch_sharding(mesh)
    tree = {"count": np.zeros(()), "mu": {"w": np.zeros((8, 2))}, "w": np.zeros(())}
    found = like_params(mesh, tree, {"w": sharded})
    assert found["mu"]["w"] is sharded
    assert found["count"].is_fully_replicated
    assert found["w"].is_fully_replicated


@pytest.mark.parametrize(("fsdp", "tensor"), [(8, 1), (4, 2), (1, 8)])
def test_one_process_holds_all_rows(fsdp, tensor):
    mesh = make_mesh(MeshConfig(fsdp=fsdp, tensor=tensor))
    np.testing.assert_array_equal(local_rows(batch_sharding(mesh), 16), np.arange(16))
