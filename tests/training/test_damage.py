"""Corrupt checkpoints are detected, named, set aside and never used; the previous one is used instead."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from illada_jax.errors import InputError
from illada_jax.interop import load_model
from illada_jax.parallel import fingerprints as fingerprint_module
from illada_jax.parallel.fingerprints import fingerprints

COMMON = {"train__steps": 6, "checkpoint__every": 2, "checkpoint__keep": 3}


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """A workdir with the checkpoints of steps 2, 4 and 6, and the params after step 6."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    outcome, _ = run(workdir, **COMMON)
    return workdir, jax.device_get(outcome.state.params)


def largest(directory):
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path, where=0.5):
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 4
    path.write_bytes(content)


def half_copied(step):
    files = sorted(path for path in step.rglob("*") if path.is_file())
    for path in files[len(files) // 2 :]:
        path.unlink()


DAMAGE = {
    "a flipped bit in the params": lambda step: flip(largest(step / "params")),
    "a flipped bit in the optimizer": lambda step: flip(largest(step / "optimizer"), 0.3),
    "a flipped bit in the config": lambda step: flip(step / "meta" / "metadata"),
    "a flipped bit in the tokenizer": lambda step: flip(step / "tokenizer" / "metadata"),
    "a truncated file": lambda step: largest(step / "params").write_bytes(largest(step / "params").read_bytes()[:99]),
    "an empty file": lambda step: largest(step / "params").write_bytes(b""),
    "a missing file": lambda step: largest(step / "params").unlink(),
    "a missing item": lambda step: shutil.rmtree(step / "optimizer"),
    "a half-copied directory": half_copied,
    "an empty directory": lambda step: [shutil.rmtree(path) if path.is_dir() else path.unlink()
                                        for path in step.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_newest_whole_checkpoint_is_found(run, finished, tmp_path, capsys, damage):
    workdir, params = finished
    shutil.copytree(workdir, tmp_path / "run")
    DAMAGE[damage](tmp_path / "run" / "checkpoints" / "6")
    outcome, lines = run(tmp_path / "run", **COMMON)
    warning = capsys.readouterr().err
    assert f"{tmp_path}/run/checkpoints/6: corrupt: " in warning
    assert f"moved to {tmp_path}/run/corrupt/6.0" in warning and (tmp_path / "run" / "corrupt" / "6.0").is_dir()
    assert outcome.step == 6
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(outcome.state.params), params)
    assert [line["step"] for line in lines if "train/loss" in line] == [2, 3, 4, 6]


def test_without_a_whole_checkpoint_nothing_is_trained(run, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    for step in (2, 4, 6):
        flip(largest(tmp_path / "run" / "checkpoints" / str(step) / "params"))
    with pytest.raises(InputError, match=r"all checkpoints are corrupt and were moved to .*6\.0, .*4\.0, .*2\.0; use"):
        run(tmp_path / "run", **COMMON)


@pytest.mark.parametrize("damage", [name for name in DAMAGE if "optimizer" not in name and name != "a missing item"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_corrupt_checkpoint_is_not_loaded(finished, tmp_path, damage, dtype):
    """The message names it, and the other checkpoints."""
    shutil.copytree(finished[0], tmp_path / "run")
    DAMAGE[damage](tmp_path / "run" / "checkpoints" / "6")
    with pytest.raises(InputError, match=r"run/checkpoints/6(/params)?: (corrupt: |not a checkpoint)"):
        load_model(tmp_path / "run", dtype)
    assert load_model(tmp_path / "run" / "checkpoints" / "4", dtype).step == 4


def test_a_fingerprint_takes_no_memory_beside_its_array():
    x = np.zeros((512, 64), jnp.bfloat16)
    assert fingerprint_module._sums.lower(x).compile().memory_analysis().temp_size_in_bytes < x.nbytes / 8


def test_every_bit_counts_and_the_mesh_does_not():
    x = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("a", "b")))
    assert fingerprints({"x": sharded}) == fingerprints({"x": x})
    seen = {fingerprints(x)[""]}
    for index in range(x.size):
        for bit in (0, 13, 31):
            changed = x.copy()
            changed.view(np.uint32).reshape(-1)[index] ^= np.uint32(1 << bit)
            seen.add(fingerprints(changed)[""])
    swapped, negated = x.copy(), x.copy()
    swapped[[0, 1]] = x[[1, 0]]
    negated[0, :2] *= -1
    seen |= {fingerprints(y)[""] for y in (swapped, negated, x.T, x.view(np.int32))}
    assert len(seen) == 1 + 3 * x.size + 4
