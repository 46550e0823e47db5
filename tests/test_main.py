"""The training command as users type it: in a separate process, with a tiny model."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.compilation import FAST_COMPILATION

ROOT = pathlib.Path(__file__).parent.parent
WORDS = ["mask", "token", "noise", "time", "model", "text", "reveal", "block", "sure", "end"]
ENVIRONMENT = {**os.environ, "XLA_FLAGS": FAST_COMPILATION, "JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory with text and a corpus cache."""
    path = tmp_path_factory.mktemp("main")
    rng = np.random.default_rng(0)
    (path / "text").mkdir()
    for i in range(40):
        (path / "text" / f"{i:02}.txt").write_text(" ".join(rng.choice(WORDS, 120)) + ".\n")
    return path


def command(directory, *changes, config="experiments/quickstart.py", module="main"):
    tiny = {
        "data.sources": f"('text:{directory}/text',)", "data.tokenizer": "bytes", "data.heldout_fraction": 0.2,
        "data.cache_dir": directory / "cache", "data.length": 32, "data.batch_size": 8, "model.d_model": 16,
        "model.num_layers": 2, "model.num_heads": 4, "model.num_kv_heads": 4, "model.head_dim": 8, "model.d_ff": 32,
        "model.scan_unroll": 1, "train.steps": 4, "train.logits_chunk": 0, "optimizer.warmup_steps": 1,
        "optimizer.decay_steps": 2, "eval.windows": 4, "eval.every": 100, "checkpoint.every": 100,
        "eval.gaps": 2, "eval.gap_length": 2, "decode.max_new_tokens": 8, "decode.block_length": 8,
        "decode.steps_per_block": 8,
    }
    return [sys.executable, "-m", f"illada_jax.{module}", f"--config={config}",
            *(f"--config.{key}={value}" for key, value in tiny.items()), *changes]


def run(arguments, cwd=ROOT):
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    return subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


MORE_BAD_INPUT = [
    (["--config.data.batch_size=7", "--config.mesh.fsdp=2"], "must multiply to the number of devices"),
    (["--colour=red"], "colour"),
    (["--config.data.sources=('text:/nowhere/at/all',)"], "/nowhere/at/all"),
    (["--workdir=/dev/null/run"], "/dev/null/run"),
    (["--config.eval.final=('poems',)"], "'poems'; known: bits_per_byte"),
    (["--config.init.checkpoint=/nowhere"], "/nowhere: not a checkpoint"),
    (["--config.data.length=2000", "--config.model.max_length=2000", "--config.data.heldout_fraction=0.03"],
     "needs a held-out window of config.data.length = 2000 tokens"),
    (["--config.eval.final=('exact_match',)"], "config.eval.separator = '='"),
    (["--config.model.vocab_size=4000000", "--config.model.d_model=1000000"], "does not fit"),
]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--config.train.stepz=3"], "stepz"),
        (["--config.train.steps=many"], "steps"),
        (["--config.model.d_model=18"], "config.model.d_model = 18: must be divisible by model.num_heads = 4"),
        (["--config.diffusion.mask_id=300", "--config.model.vocab_size=264"], "config.diffusion.mask_id = 300"),
        (["more"], "'more'"),
        *(pytest.param(changes, message, marks=pytest.mark.slow) for changes, message in MORE_BAD_INPUT),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(directory, tmp_path, changes, message):
    result = run(command(directory, f"--workdir={tmp_path / 'w'}", *changes))
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "w").exists()


def test_a_broken_config_is_named(tmp_path):
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    (tmp_path / "empty.py").write_text("x = 1\n")
    for name, message in (("broken.py", "broken.py, line 1: invalid syntax"), ("empty.py", "get_config")):
        result = run([sys.executable, "-m", "illada_jax.main", f"--config={tmp_path / name}"])
        assert result.returncode == 2, result.stderr
        assert message in result.stderr
        assert "Traceback" not in result.stderr


def test_a_missing_config_is_named():
    result = run([sys.executable, "-m", "illada_jax.main", "--config=experiments/nothing.py"])
    assert result.returncode == 2
    assert "experiments/nothing.py" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_trained_stopped_resumed_and_used(directory, tmp_path):
    """SIGTERM saves and exits with 75; the same command continues; the result can be decoded."""
    workdir = tmp_path / "w"
    arguments = command(directory, f"--workdir={workdir}", "--config.train.steps=4000", "--config.train.log_every=10",
                        "--config.optimizer.decay_steps=0", "--config.train.tensorboard=False")
    process = subprocess.Popen(arguments, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not (workdir / "metrics.jsonl").exists() or not (workdir / "metrics.jsonl").read_text():
        assert process.poll() is None, process.stdout.read().decode()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 75, output
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir())
    assert 0 < saved < 4000

    result = run([*arguments, f"--config.train.stop_step={saved + 5}"])
    assert result.returncode == 0, result.stderr
    assert f"at step {saved + 5:,}" in result.stdout
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == saved + 5
    assert "illada_jax.generate" in result.stdout

    result = run([sys.executable, "-m", "illada_jax.generate", f"--checkpoint={workdir}", "--prompt=mask token",
                  "--max_new_tokens=8", "--output=json"])
    assert result.returncode == 0, result.stderr
    assert {"prompt", "text", "tokens", "nfe", "seconds"} <= json.loads(result.stdout).keys()


@pytest.mark.slow
def test_the_final_report_infills_and_samples(directory, tmp_path):
    """Without --workdir, outputs go to workdirs/NAME in the current directory."""
    result = run(command(directory, "--config.eval.final=('bits_per_byte','infill','samples')",
                         config=ROOT / "experiments" / "quickstart.py"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "workdirs" / "quickstart" / "checkpoints" / "4").is_dir()
    generated = run([sys.executable, "-m", "illada_jax.generate", "--checkpoint=workdirs/quickstart", "--infill",
                     "--prompt=mask [[mask:2]] time"], cwd=tmp_path)
    assert generated.returncode == 0, generated.stderr
    assert generated.stdout.startswith("mask ")
    assert "bits per byte (bound ± standard error)" in result.stdout
    assert "gzip" in result.stdout
    # d_model = 16 and 4 heads, but heads of 8: said at the start.
    assert result.stdout.count("note: this model cannot be exported to a public layout by illada_jax.convert: "
                               "config.model.head_dim = 8: a checkpoint of the family 'illada' needs ") == 1
    assert result.stdout.count("⟦") == 2 + 3 * 2
    assert "[3]" in result.stdout


def test_the_8b_recipe_is_planned_without_corpus_or_accelerator():
    result = run([sys.executable, "-m", "illada_jax.main", "--config=experiments/pretrain_8b.py", "--dry_run"])
    assert result.returncode == 0, result.stderr
    assert "7,615,025,152 (7.62 B)" in result.stdout
    assert "= 12.00 T tokens" in result.stdout
    assert "missing" in result.stdout and "note:" not in result.stdout
    result = run([sys.executable, "-m", "illada_jax.main", "--config=experiments/pretrain_8b.py",
                  "--workdir=/dev/null/w"])
    assert result.returncode == 2
    for part in ("does not fit", "--dry_run", "illada_jax.aot --config", "experiments/quickstart.py", "tpu/README.md"):
        assert part in result.stderr


@pytest.mark.parametrize(("flag", "message"), [
    ("--config.decode.reveal=typo", "config.decode.reveal = 'typo': must be one of"),
    pytest.param("--config.decode.stop_ids=(100000,)",
                 "config.decode.stop_ids: id 100000 is outside the vocabulary of", marks=pytest.mark.slow),
    pytest.param("--config.decode.block_length=1000", "must", marks=pytest.mark.slow),
])
def test_bad_decode_settings_are_refused_before_training(directory, tmp_path, flag, message):
    for dry in ([], ["--dry_run"]):
        result = run(command(directory, f"--workdir={tmp_path / 'run'}", flag, *dry))
        assert result.returncode == 2 and message in result.stderr, result.stderr[-2000:]
        assert not (tmp_path / "run").exists()
