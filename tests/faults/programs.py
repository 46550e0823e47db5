"""Commands under test, as processes."""

import hashlib
import json
import os
import pathlib
import random
import subprocess
import sys

from tests.compilation import FAST_COMPILATION

ROOT = pathlib.Path(__file__).parents[2]
WORDS = ("mask", "token", "noise", "time", "model", "text", "reveal", "block", "sure", "end")
# Unoptimised programs compile in half the time; each is compiled once and cached next to the text.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
               "XLA_FLAGS": FAST_COMPILATION, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def write_text(directory: pathlib.Path, files: int = 40, words: int = 120) -> None:
    """Writes text files with fixed contents."""
    draw = random.Random(0)
    directory.mkdir(parents=True)
    for i in range(files):
        (directory / f"{i:03}.txt").write_text(" ".join(draw.choices(WORDS, k=words)) + ".\n")


def train_command(directory: pathlib.Path, workdir: pathlib.Path, *flags: str) -> list[str]:
    """The training command on the text in `directory`, which also caches corpora and compiled programs."""
    return [sys.executable, "-m", "illada_jax.main", f"--config={ROOT}/tests/faults/tiny.py", f"--workdir={workdir}",
            f"--config.data.sources=('text:{directory}/text',)", f"--config.data.cache_dir={directory}/cache",
            f"--compilation_cache={directory}/compiled", *flags]


def prepare_command(directory: pathlib.Path, target: pathlib.Path) -> list[str]:
    """The command that prepares the text in `directory` in many small shards."""
    return [sys.executable, "-m", "illada_jax.prepare", f"--source=text:{directory}/text", f"--target={target}",
            "--tokenizer=sentencepiece", "--vocab_size=300", "--shard_megabytes=0.02", "--processes=2"]


def start(command: list[str]) -> subprocess.Popen:
    """Starts a command in its own session, so that its children can be killed with it."""
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=True)


def run(command: list[str]) -> tuple[int, str]:
    """(Exit code, stdout and stderr) of a command."""
    process = start(command)
    output, error = process.communicate(timeout=1200)
    return process.returncode, output + error


def must(command: list[str]) -> str:
    """Output of a command that must succeed."""
    code, output = run(command)
    if code != 0:
        raise AssertionError(f"exit code {code} of {' '.join(command)}:\n{output}")
    return output


def lines(workdir: pathlib.Path) -> list[dict]:
    """The complete lines of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def timeless(workdir: pathlib.Path) -> list[dict]:
    """The lines of metrics.jsonl without times."""
    return [{name: value for name, value in line.items()
             if not name.startswith("goodput/") and name != "train/tokens_per_second"} for line in lines(workdir)]


def saved_steps(workdir: pathlib.Path) -> list[int]:
    """Steps with a checkpoint, ascending."""
    directory = workdir / "checkpoints"
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def final_arrays(workdir: pathlib.Path) -> dict[str, str]:
    """Checksums of the params and optimizer arrays of the last checkpoint, by name."""
    import numpy as np
    import orbax.checkpoint as ocp

    step = workdir.absolute() / "checkpoints" / str(saved_steps(workdir)[-1])
    found = {}
    for item in ("params", "optimizer"):
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.restore(step / item)
        for path, leaf in _leaves(tree):
            array = np.asarray(leaf)
            found[f"{item}/{path}"] = f"{array.dtype}{array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"
    return found


def _leaves(tree, path=""):
    if isinstance(tree, dict):
        for key in sorted(tree):
            yield from _leaves(tree[key], f"{path}/{key}")
    elif isinstance(tree, (list, tuple)):
        for i, item in enumerate(tree):
            yield from _leaves(item, f"{path}/{i}")
    elif tree is not None:
        yield path, tree


def tree_checksums(directory: pathlib.Path) -> dict[str, str]:
    """Checksums of all files below a directory, by path."""
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(directory.rglob("*")) if path.is_file()}
