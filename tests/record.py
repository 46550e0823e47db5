"""Records of all results that a rewrite must not change, and their comparison.

    python -m tests.record make RECORD.json
    python -m tests.record compare BEFORE.json AFTER.json [--map=RENAMED.json]

A record holds arrays (as hashes of their bytes) and metrics of 60-step runs, tokens of the demo models under every
strategy and cache, scores, the files of an export and the resolved 8B configs. It is made through commands and the
Python interface alone. The map renames what a rewrite has renamed, before the comparison: `{"keys": {old: new},
"values": {old: new}}`; a key that maps to null is dropped from both records. The map from 0.1 to
0.2 is `tests/fixtures/renamed_keys_0.2.json`.
"""

import argparse
import hashlib
import importlib.util
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

STEPS = 60
TIMES = ("goodput/", "train/tokens_per_second")
# Runs: arguments of `main`. Where a run stops early its schedule is that of the whole one.
RUNS = {
    "quickstart": ["--config=experiments/quickstart.py"],
    "sudoku": ["--config=experiments/sudoku.py"],
    "sft_llada": ["--config=experiments/sft_quickstart.py"],
    "sft_illada": ["--config=experiments/sft_quickstart.py", "--config.sft.format=illada"],
    "mixture": ["--config=experiments/sudoku.py", "--config.data.sources=('prepared:{root}/a','prepared:{root}/b')",
                "--config.data.weights=(0.25,0.75)", "--config.eval.evaluators=('bits_per_byte',)",
                "--config.eval.windows=64"],
}
PROMPTS = ["Return the", "The with statement", "Raise", "A list is", "If the file", "When an exception", "This module",
           "The following", "Note that", "Each class", "An iterator", "The default value", "In Python", "You can",
           "Strings are", "The name of", "Use the", "For example", "A function", "Objects"]
CONFIGS = ("pretrain_8b", "sft_8b", "llada_8b")


def digest(array) -> str:
    """Type, shape and a hash of the bytes of an array."""
    array = np.asarray(array)
    return f"{array.dtype}{list(array.shape)}:{hashlib.sha256(array.tobytes()).hexdigest()[:24]}"


def command(module: str, *arguments: str) -> str:
    """Standard output of a command of the package."""
    done = subprocess.run([sys.executable, "-m", f"illada_jax.{module}", *arguments], capture_output=True, text=True,
                          check=False)
    if done.returncode:
        sys.exit(f"{module} {' '.join(arguments)} exited with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def checkpoint_arrays(workdir: pathlib.Path) -> dict[str, str]:
    """Digests of all arrays of the newest checkpoint, by path; read by Orbax, not by the package."""
    import jax
    import orbax.checkpoint as ocp

    newest = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    found = {"step": newest.name}
    for item in ("params", "optimizer", "ema"):
        if (newest / item).is_dir():
            tree = ocp.PyTreeCheckpointer().restore(newest / item)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                found[f"{item}/{jax.tree_util.keystr(path, simple=True, separator='/')}"] = digest(leaf)
    return found


def metrics(workdir: pathlib.Path) -> list[dict]:
    """The lines of metrics, times aside."""
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    return [{key: value for key, value in json.loads(line).items() if not key.startswith(TIMES)}
            for line in lines if line]


def runs(root: pathlib.Path) -> dict:
    """Arrays and metrics of the runs."""
    for name in "ab":
        source = {"a": "sudoku", "b": f"text:{os.path.dirname(json.__file__)}/*.py"}[name]
        command("prepare", f"--source={source}", f"--target={root / name}", "--tokenizer=bytes", "--processes=1")
    found = {}
    for name, arguments in RUNS.items():
        workdir = root / name
        command("main", *(argument.format(root=root) for argument in arguments), f"--workdir={workdir}",
                f"--config.train.stop_step={STEPS}", "--config.train.log_every=20", "--config.train.plateau_window=0",
                "--config.train.tensorboard=False", "--config.eval.rows=16", "--config.eval.final=()",
                "--config.optimizer.ema_decay=0.9")
        found[name] = {"arrays": checkpoint_arrays(workdir), "metrics": metrics(workdir)}
    return found


def strategies(top_k: str) -> dict[str, dict]:
    """Settings of the decoder by name."""
    reveals = {"schedule": {"reveal": top_k, "steps_per_block": 4}, "threshold": {"reveal": "threshold"},
               "factor": {"reveal": "factor"}, "entropy_bound": {"reveal": "entropy_bound"}}
    confidences = ("low_confidence", "margin", "entropy", "random")
    found = {f"{reveal},{confidence}": {**reveals[reveal], "confidence": confidence}
             for reveal, confidence in itertools.product(reveals, confidences)}
    for cache, (name, reveal) in itertools.product(("prefix", "dual"), reveals.items()):
        found[f"{name},{cache}"] = {**reveal, "cache": cache, "confidence": "low_confidence"}
    found["sampled"] = {"temperature": 0.8, "top_p": 0.9, "seed": 3}
    found["guided"] = {"cfg_scale": 1.0}
    found["fixed,prefix"] = {"length": "fixed", "cache": "prefix"}
    found["fixed,dual"] = {"length": "fixed", "cache": "dual", "cache_refresh": 2}
    return found


def decoded(top_k: str) -> dict:
    """Tokens of the demo models under every strategy, gaps, a conversation, scores."""
    import illada_jax

    found = {}
    for name in ("demo", "demo-chat"):
        lm = illada_jax.load(name)
        for title, settings in strategies(top_k).items():
            results = lm.generate(PROMPTS, max_new_tokens=16, block_length=8, **{"temperature": 0.0, **settings})
            found[f"{name},{title}"] = [[r.tokens, r.nfe, r.stopped_by, r.reveal_step] for r in results]
        gaps = [f"{prompt} [[mask:3]] of the [[mask:2]]." for prompt in PROMPTS[:5]]
        found[f"{name},infill"] = [r.text for r in lm.infill(gaps)]
        candidates = [f" {prompt.lower()}" for prompt in PROMPTS]
        for method, settings in (("confidence", {}), ("monte_carlo", {"mc_num": 16}),
                                 ("confidence", {"cfg_scale": 0.5}), ("confidence", {"tokens_per_step": 2})):
            scores = lm.score("Return a list of", candidates, method=method, **settings)
            found[f"{name},{method},{settings}"] = [[score.value.hex(), repr(score.greedy)] for score in scores]
    chat = illada_jax.load("demo-chat").chat([{"role": "user", "content": "What is a generator?"}], max_new_tokens=32)
    found["chat"] = [chat.text, chat.tokens]
    return found


def exported(root: pathlib.Path) -> dict[str, str]:
    """Hashes of the files of an export."""
    command("convert", f"--source={root / 'quickstart'}", f"--target={root / 'exported'}")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:24]
            for path in sorted((root / "exported").iterdir())}


def configs() -> dict:
    """The resolved 8B configs."""
    from illada_jax.config import from_config_dict, to_dict

    found = {}
    for name in CONFIGS:
        spec = importlib.util.spec_from_file_location(name, f"experiments/{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found[name] = to_dict(from_config_dict(module.get_config()))
    return found


def make(target: str, top_k: str) -> None:
    """Makes a record."""
    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory)
        os.environ["XDG_CACHE_HOME"] = str(root / "cache")
        record = {"configs": configs(), "runs": runs(root), "export": exported(root), "decoded": decoded(top_k)}
    pathlib.Path(target).write_text(json.dumps(record, indent=1, sort_keys=True))


def flat(node, keys: dict, values: dict, prefix: str = "") -> dict[str, object]:
    """A record as {path: value}, renamed."""
    if isinstance(node, dict):
        parts = {}
        for key, child in node.items():
            path = f"{prefix}/{key}" if prefix else str(key)
            renamed = next((new if new is None else path.replace(old, new) for old, new in keys.items() if old in path),
                           path)
            if renamed is not None:
                parts |= flat(child, keys, values, renamed)
        return parts
    if isinstance(node, list):
        return {path: value for number, child in enumerate(node)
                for path, value in flat(child, keys, values, f"{prefix}/{number}").items()}
    return {prefix: values.get(node, node) if isinstance(node, str) else node}


def compare(before: str, after: str, renamed: str | None) -> int:
    """Prints every difference; the exit code says whether there was one."""
    names = json.loads(pathlib.Path(renamed).read_text()) if renamed else {}
    old, new = (flat(json.loads(pathlib.Path(path).read_text()), names.get("keys", {}), names.get("values", {}))
                for path in (before, after))
    different = [path for path in sorted(old.keys() | new.keys()) if old.get(path) != new.get(path)]
    for path in different:
        print(f"{path}: {old.get(path)!r} → {new.get(path)!r}"[:300])
    print(f"{len(old.keys() | new.keys()):,} values, {len(different)} differ")
    return int(bool(different))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("target")
    making.add_argument("--schedule", default="top_k", help="the name of the fixed schedule among the reveals")
    comparing = commands.add_parser("compare")
    comparing.add_argument("before")
    comparing.add_argument("after")
    comparing.add_argument("--map")
    given = parser.parse_args()
    if given.command == "make":
        make(given.target, given.schedule)
    else:
        sys.exit(compare(given.before, given.after, given.map))
