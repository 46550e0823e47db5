"""Relative paths become absolute; remote paths are unchanged."""

import os

from etils import epath

from illada_jax.training.saved_model import absolute_path


def test_remote_paths_are_absolute_already(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert os.fspath(absolute_path(epath.Path("gs://bucket/run"))) == "gs://bucket/run"
    assert os.fspath(absolute_path(epath.Path("run"))) == str(tmp_path / "run")
