"""Relative paths become absolute; remote ones stay what they are."""

import os

from etils import epath

from illada_jax.training.checkpoints import _absolute


def test_remote_paths_are_absolute_already(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert os.fspath(_absolute(epath.Path("gs://bucket/run"))) == "gs://bucket/run"
    assert os.fspath(_absolute(epath.Path("run"))) == str(tmp_path / "run")
