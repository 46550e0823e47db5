"""A workdir in object storage: a whole run, its resumption, and the uses of its checkpoint."""

import ast
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from tests.compilation import FAST_COMPILATION
from tests.training.bucket import Objects
from tests.training.test_hosts import CONFIG

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def command(text_file, tmp_path_factory, tmp_path):
    """command(name, *flags) runs a command where gs:// is the directory `tmp_path / objects`."""
    (tmp_path / "config.py").write_text(CONFIG.format(text=text_file, cache=tmp_path_factory.getbasetemp() / "cache"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
                   "XLA_FLAGS": FAST_COMPILATION,
                   "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_DEBUG_LOG_MODULES": "jax._src.compiler"}

    def command(name, *flags):
        return subprocess.run([sys.executable, "-m", "tests.training.bucket", tmp_path / "objects", name, *flags],
                              env=environment, capture_output=True, text=True, timeout=240)

    return command


@pytest.mark.slow
def test_a_run_lives_in_a_bucket(run, command, tmp_path):
    _, expected = run(tmp_path / "local", train__log_every=1)
    flags = [f"--config={tmp_path / 'config.py'}", "--workdir=gs://bucket/runs/one", "--config.checkpoint.every=2",
             "--config.checkpoint.keep=2", "--config.train.tensorboard=True", "--compilation_cache=gs://bucket/compiled"]
    first = command("main", *flags, "--config.train.stop_step=5", "--profile_steps=2:3")
    assert first.returncode == 0, first.stderr
    objects = Objects(tmp_path / "objects")
    assert {name.split("/")[0] for name in objects.names()} == {"bucket"}
    assert any(name.startswith("bucket/runs/one/profile/") and name.endswith(".xplane.pb") for name in objects.names())
    assert any(name.startswith("bucket/compiled/") and "train_step" in name for name in objects.names())
    assert "cache hit for 'jit_train_step'" not in first.stderr

    second = command("main", *flags)
    assert second.returncode == 0, second.stderr
    assert "cache hit for 'jit_train_step'" in second.stderr
    lines = [json.loads(line) for line in objects.file("bucket/runs/one/metrics.jsonl").read_text().splitlines()]
    got = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    want = {line["step"]: line["train/loss"] for line in expected if "train/loss" in line}
    np.testing.assert_allclose([got[step] for step in want], list(want.values()), rtol=1e-5)
    names = objects.names("bucket/runs/one/")
    assert {name.split("/")[4] for name in names if "/checkpoints/" in name} == {"8", "10"}
    rest = {name.split("/")[3].split(".")[0] for name in names}
    assert rest == {"checkpoints", "config", "events", "metrics", "profile", "tokenizer"}, "no lock, nothing partial"
    assert not (pathlib.Path.cwd() / "gs:").exists() and not (tmp_path / "gs:").exists()

    written = command("generate", "--checkpoint=gs://bucket/runs/one", "--prompt=mask", "--max_new_tokens=4",
                      "--output=json")
    assert written.returncode == 0, written.stderr
    assert json.loads(written.stdout.splitlines()[-1])["prompt"] == "mask"


# What of training, by file, uses the local file system, and why that is no path of a workdir.
LOCAL = {
    ("training/memory.py", "os.cpu_count"): "no path",
    ("training/metrics.py", "tempfile.mkdtemp"): "where lines are kept until they are published",
    ("training/metrics.py", "open"): "the same",
    ("training/saved_model.py", "pathlib.Path"): "the files of a local checkpoint",
    ("training/profiler.py", "tempfile.mkdtemp"): "the profiler writes to local paths only",
    ("training/profiler.py", "pathlib.Path"): "the same",
    ("training/profiler.py", "shutil.rmtree"): "the same",
    ("training/run.py", "os.path.relpath"): "the interpreter, in a command to type",
}
HARMLESS = {"os.fspath", "os.sysconf", "os.getpid", "os.kill", "os.fstat", "os.strerror", "os.PathLike", "io.BytesIO"}


def test_workdirs_are_reached_through_epath_alone():
    found = set()
    package = ROOT / "illada_jax"
    files = [*package.glob("training/*.py"), *package.glob("parallel/*.py"),
             package / "main.py", package / "evaluation" / "evaluators.py"]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if re.fullmatch(r"open|(os|shutil|pathlib|glob|tempfile|io)(\.\w+)+", name):
                    found.add((str(path.relative_to(package)), name))
    assert {use for use in found if use[1] not in HARMLESS} == LOCAL.keys()
