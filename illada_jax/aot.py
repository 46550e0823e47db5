"""Compiles the training step, the decoder or the scorer for TPUs that need not be there: what fits, how fast it can be.

    python -m illada_jax.aot --config=experiments/pretrain_8b.py --topology=v5p:4x4x4
    python -m illada_jax.aot --config=experiments/pretrain_8b.py:v5p-128 --topology=v5p:4x4x4 --num_slices=2 --search
    python -m illada_jax.aot --config=experiments/pretrain_8b.py --topology=v5e:2x2 --mode=decode \\
        --config.mesh.fsdp=1 --config.mesh.tensor=4 --canvas=4096
    python -m illada_jax.aot --config=experiments/pretrain_8b.py --topology=v5e:1x1 --mode=decode --quantize=int8
    python -m illada_jax.aot --compare=tpu/cases.json --json=tpu/report.json --markdown=tpu/REPORT.md

Needs `pip install 'illada_jax[tpu]'`, a processor, 3 GiB of memory and one to two minutes for each program; no TPU, no
corpus, no tokenizer. `--compare` reads a list of {"name", "config", "topology"} with, if wanted, "num_slices", "mode",
"canvas", "quantize" and "set" (fields of the config). Both files are written after each case: stop it when you like;
what the JSON file has for the same case, config, options and versions is not compiled again.
"""

import dataclasses
import importlib.util
import json
import pathlib
import time
from typing import Any

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

from illada_jax import cli
from illada_jax.config import Config, from_config_dict
from illada_jax.errors import ConfigError, InputError
from illada_jax.parallel.fingerprints import digest
from illada_jax.planning import chips
from illada_jax.planning.plan import Options, make_plan
from illada_jax.planning.programs import DoesNotFit
from illada_jax.planning.render import as_markdown, as_text

CONFIG = config_flags.DEFINE_config_file("config", None, "experiment file; fields are set with --config.section.name")
TOPOLOGY = flags.DEFINE_string("topology", None, "chips and shape of a slice, such as v5p:4x4x4")
NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "slices, joined by the data centre network")
MODE = flags.DEFINE_enum("mode", "train", ["train", "decode", "score"], "the program that is compiled")
CANVAS = flags.DEFINE_integer("canvas", 0, "columns of decoding and scoring; 0: the context of the model", 0)
QUANTIZE = cli.quantize_flag()
SEARCH = flags.DEFINE_bool("search", False, "also find the most rows that fit on a device (three or more compilations)")
EFFICIENCY = flags.DEFINE_float("kernel_efficiency", 0.7, "share of the peak that attention kernels reach", 0.01, 1.0)
PRICE = flags.DEFINE_float("price", 0.0, "price per chip and hour; adds a line with the cost", 0.0)
COMPARE = flags.DEFINE_string("compare", "", "JSON file of cases that are compared")
JSON = flags.DEFINE_string("json", "", "file for the plan, or the compared plans, as JSON")
MARKDOWN = flags.DEFINE_string("markdown", "", "file for the compared plans as tables")
CASE_KEYS = {"name", "config", "topology", "num_slices", "mode", "canvas", "quantize", "set"}


def main(argv: list[str]) -> None:
    """Makes one plan and prints it, or compares several."""
    del argv
    # Whatever this machine has: arrays are never made.
    jax.config.update("jax_platforms", "cpu")
    if bool(COMPARE.value) == bool(TOPOLOGY.value):
        raise InputError("give --config and --topology, or --compare=FILE")
    if COMPARE.value:
        return compare(pathlib.Path(COMPARE.value))
    if CONFIG.value is None:
        raise InputError("--config is required, for example --config=experiments/pretrain_8b.py")
    chips.parse(TOPOLOGY.value)
    try:
        config = from_config_dict(CONFIG.value)
    except OSError as error:
        raise InputError(f"--config: {' '.join(str(error).split())}") from error
    options = _options(MODE.value, CANVAS.value, QUANTIZE.value)
    plan = make_plan(config, chips.get_topology(TOPOLOGY.value, NUM_SLICES.value), options)
    print(as_text(plan))
    if JSON.value:
        _write(JSON.value, json.dumps(plan, indent=1) + "\n")
    return None


def compare(path: pathlib.Path) -> None:
    """Makes the plans of all cases of a file that are not made yet; files are written after each, so it can be stopped.

    Raises:
      InputError: the file is no list of cases, or the JSON file is none of ours.
    """
    cases = {}
    for case in read_cases(path):
        config = load_config(case["config"], case.get("set", {}))
        options = _options(case.get("mode", "train"), case.get("canvas", 0), case.get("quantize", "none"))
        asked = {"name": case["name"], "case": case, "versions": chips.versions(),
                 "options": dataclasses.asdict(options),
                 "config": digest(pathlib.Path(case["config"].partition(":")[0]).read_text())}
        cases[_key(asked)] = asked, config, options
    made = {_key(old): old for old in _read_made(JSON.value)}
    for key, (asked, config, options) in cases.items():
        if key not in made:
            made[key] = {**asked, "date": time.strftime("%Y-%m-%d"), **_plan_case(asked["case"], config, options)}
            _write_compared(cases, made)
    _write_compared(cases, made)
    print(as_markdown([made[key] for key in cases]))


def _write_compared(cases: dict[str, Any], made: dict[str, Any]) -> None:
    """Writes the files with what has been made so far."""
    results = [made[key] for key in cases if key in made]
    missing = [asked["name"] for key, (asked, *_) in cases.items() if key not in made]
    if JSON.value:
        _write(JSON.value, json.dumps(results, indent=1) + "\n")
    if MARKDOWN.value:
        _write(MARKDOWN.value, _head(results, missing) + as_markdown(results))


def _key(result: dict[str, Any]) -> str:
    """What a result depends on: case, compilers, flags, config file. Whoever changes the package removes the JSON."""
    return json.dumps([result[key] for key in ("case", "versions", "options", "config")], sort_keys=True)


def _read_made(path: str) -> list[dict[str, Any]]:
    if not path or not pathlib.Path(path).exists():
        return []
    try:
        made = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        return [result for result in made if _key(result)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--json={path}: exists and holds no compared plans; name another file") from error


def _head(results: list[dict[str, Any]], missing: list[str]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results[0]["versions"].items())
    dates = sorted({result["date"] for result in results})
    rest = f"Not compiled yet: {'; '.join(missing)}.\n\n" if missing else ""
    return (f"# Compiled for TPUs\n\nMade by `python -m illada_jax.aot --compare={COMPARE.value} --json={JSON.value} "
            f"--markdown={MARKDOWN.value}` with {versions}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}. "
            f"Nothing here ran on a TPU: memory is the compiler's, times are bounds.\n\n{rest}")


def read_cases(path: pathlib.Path) -> list[dict[str, Any]]:
    """The cases of a file for `--compare`. Raises InputError naming the file and the case that is wrong."""
    try:
        cases = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--compare={path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"--compare={path}: not JSON ({error})") from error
    for index, case in enumerate(cases if isinstance(cases, list) else [None]):
        if not isinstance(case, dict) or not {"name", "config", "topology"} <= case.keys() <= CASE_KEYS:
            raise InputError(f"{path}, case {index}: must be an object with name, config and topology, and may have "
                             f"{', '.join(sorted(CASE_KEYS - {'name', 'config', 'topology'}))}")
        for key, known in (("mode", ("train", "decode", "score")), ("quantize", ("none", "int8"))):
            if case.get(key, known[0]) not in known:
                raise InputError(f"{path}, case {index}: {key} = {case[key]!r}: must be one of {', '.join(known)}")
        chips.parse(case["topology"])
    return cases


def load_config(name: str, changes: dict[str, Any]) -> Config:
    """The config of an experiment file, `FILE` or `FILE:VARIANT`, with fields set as by flags.

    Raises:
      InputError: there is no such file or field.
    """
    path, _, variant = name.partition(":")
    try:
        spec = importlib.util.spec_from_file_location("experiment", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (OSError, AttributeError) as error:
        raise InputError(f"config {name}: cannot be read: {error}") from error
    config: ml_collections.ConfigDict = module.get_config(variant) if variant else module.get_config()
    try:
        config.update_from_flattened_dict(changes)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"config {name}: {str(error).splitlines()[0]}") from error
    return from_config_dict(config)


def _options(mode: str, canvas: int, quantize: str) -> Options:
    return Options(mode=mode, canvas=canvas, quantize=quantize, kernel_efficiency=EFFICIENCY.value, price=PRICE.value,
                   search=SEARCH.value)


def _plan_case(case: dict[str, Any], config: Config, options: Options) -> dict[str, Any]:
    try:
        return {"plan": make_plan(config, chips.get_topology(case["topology"], case.get("num_slices", 1)), options)}
    except DoesNotFit as error:
        return {"error": str(error)}
    except ConfigError as error:
        raise InputError(f"case {case['name']}: {error}") from error
    except jax.errors.JaxRuntimeError as error:  # the others are worth their time all the same
        return {"error": f"{case['topology']}: not compiled: {' '.join(str(error).split())[:300]}"}


def _write(path: str, text: str) -> None:
    try:
        pathlib.Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    cli.run(main)
