"""Compiles the training step, decoder or scorer for TPUs, with none attached: memory, and bounds on speed.

    python -m illada_jax.aot --config=experiments/pretrain_8b.py --topology=v5p:4x4x4
    python -m illada_jax.aot --config=experiments/pretrain_8b.py:v5p-128 --topology=v5p:4x4x4 --num_slices=2 --search
    python -m illada_jax.aot --config=experiments/pretrain_8b.py --topology=v5e:2x2 --mode=decode \\
        --config.mesh.fsdp=1 --config.mesh.tensor=4 --canvas=4096
    python -m illada_jax.aot --config=experiments/pretrain_8b.py --topology=v5e:1x1 --mode=decode --quantize=int8
    python -m illada_jax.aot --compare=tpu/cases.json --json=tpu/report.json --markdown=tpu/REPORT.md

Needs `pip install 'illada_jax[tpu]'`, a CPU, 3 GiB of memory and one to two minutes per program; no TPU, no corpus and
no tokenizer. `--compare` reads a list of {"name", "config", "topology"} with optional "num_slices", "mode", "canvas",
"quantize" and "set" (fields of the config). Both files are written after each case, so the command may be interrupted:
cases in the JSON file with the same config, options and versions are not compiled again.
"""

import dataclasses
import json
import pathlib
import runpy
import time
from typing import Any

import jax
import ml_collections
from absl import flags
from etils import epath

from illada_jax import cli
from illada_jax.config import Config, from_config_dict
from illada_jax.errors import ConfigError, InputError
from illada_jax.files import read_json, write_atomically
from illada_jax.parallel.fingerprints import digest
from illada_jax.planning import chips
from illada_jax.planning.plan import Options, make_plan
from illada_jax.planning.programs import DoesNotFit
from illada_jax.planning.render import as_markdown, as_text

CONFIG = cli.ConfigFlag("experiments/pretrain_8b.py")
TOPOLOGY = flags.DEFINE_string("topology", None, "chips and shape of a slice, such as v5p:4x4x4")
NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "slices, connected by the data centre network")
MODE = flags.DEFINE_enum("mode", "train", ["train", "decode", "score"], "the program to compile")
CANVAS = flags.DEFINE_integer("canvas", 0, "columns of the canvas to decode or score; 0: the context length", 0)
QUANTIZE = cli.quantize_flag()
SEARCH = flags.DEFINE_bool("search", False, "also find the most rows that fit on a device (three or more compilations)")
EFFICIENCY = flags.DEFINE_float("kernel_efficiency", 0.7, "share of the peak that attention kernels reach", 0.01, 1.0)
PRICE = flags.DEFINE_float("price", 0.0, "price per chip and hour; adds a line with the cost", 0.0)
PREEMPTION_HOURS = flags.DEFINE_float("preemption_hours", 6.0, "mean hours between interruptions", 0.01)
SAVE_GBPS = flags.DEFINE_float("save_gbps", 0.5, "GB/s that a host writes to the storage of checkpoints", 0.001)
COMPARE = flags.DEFINE_string("compare", "", "JSON file of cases to compare")
JSON = flags.DEFINE_string("json", "", "file for the plan, or the compared plans, as JSON")
MARKDOWN = flags.DEFINE_string("markdown", "", "file for the compared plans as tables")
_REQUIRED = {"name", "config", "topology"}
_OPTIONAL = {"num_slices", "mode", "canvas", "quantize", "set"}
_CHOICES = {"mode": ("train", "decode", "score"), "quantize": ("none", "int8")}


def main(argv: list[str]) -> None:
    """Makes one plan and prints it, or compares several."""
    del argv
    jax.config.update("jax_platforms", "cpu")  # no arrays are made: leave the accelerators of this machine alone
    jax.config.update("jax_enable_compilation_cache", False)  # programs for a topology cannot be read back from it
    if bool(COMPARE.value) == bool(TOPOLOGY.value):
        raise InputError("give --config and --topology, or --compare=FILE")
    if COMPARE.value:
        compare(pathlib.Path(COMPARE.value))
        return
    config, _ = CONFIG.read()
    topology = chips.get_topology(TOPOLOGY.value, NUM_SLICES.value)
    plan = make_plan(config, topology, _options(mode=MODE.value, canvas=CANVAS.value, quantize=QUANTIZE.value))
    print(as_text(plan))
    if JSON.value:
        _write(JSON.value, json.dumps(plan, indent=1) + "\n")


def compare(path: pathlib.Path) -> None:
    """Compiles the missing plans of a file of cases and prints all; writes the outputs after each plan."""
    cases = {}
    for case in read_cases(path):
        config = load_config(case["config"], case.get("set", {}))
        options = _options(**{key: case[key] for key in ("mode", "canvas", "quantize") if key in case})
        identity = {"name": case["name"], "case": case, "versions": chips.versions(),
                    "options": dataclasses.asdict(options),
                    "config": digest(pathlib.Path(case["config"].partition(":")[0]).read_text())}
        cases[_key(identity)] = identity, config, options
    results = {_key(result): result for result in _read_results(JSON.value)}
    for key, (identity, config, options) in cases.items():
        if key not in results:
            plan = _plan_case(identity["case"], config, options)
            results[key] = {**identity, "date": time.strftime("%Y-%m-%d"), **plan}
        made = [results[key] for key in cases if key in results]
        missing = [identity["name"] for key, (identity, *_) in cases.items() if key not in results]
        if JSON.value:
            _write(JSON.value, json.dumps(made, indent=1) + "\n")
        if MARKDOWN.value:
            _write(MARKDOWN.value, _head(made, missing) + as_markdown(made))
    print(as_markdown(made))


def _key(result: dict[str, Any]) -> str:
    """A key of all that a result depends on except the code of this package: if that changes, delete the JSON file."""
    return json.dumps([result[key] for key in ("case", "versions", "options", "config")], sort_keys=True)


def _read_results(path: str) -> list[dict[str, Any]]:
    if not path or not pathlib.Path(path).exists():
        return []
    try:
        results = read_json(path, kind=list)
        return [result for result in results if _key(result)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--json={path}: exists but holds no compared plans; choose another file") from error


def _head(results: list[dict[str, Any]], missing: list[str]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results[0]["versions"].items())
    dates = sorted({result["date"] for result in results})
    rest = f"Not compiled yet: {'; '.join(missing)}.\n\n" if missing else ""
    return (f"# Compiled for TPUs\n\nMade by `python -m illada_jax.aot --compare={COMPARE.value} --json={JSON.value} "
            f"--markdown={MARKDOWN.value}` with {versions}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}. "
            f"Nothing here ran on a TPU: memory is the compiler's, times are bounds.\n\n{rest}")


def read_cases(path: pathlib.Path) -> list[dict[str, Any]]:
    """The cases of a file for `--compare`. Raises InputError naming the file and the invalid case."""
    cases = read_json(path, kind=list)
    for index, case in enumerate(cases or [None]):
        if not isinstance(case, dict) or not _REQUIRED <= case.keys() <= _REQUIRED | _OPTIONAL:
            raise InputError(f"{path}, case {index}: must be an object with name, config and topology, and may have "
                             f"{', '.join(sorted(_OPTIONAL))}")
        for key, choices in _CHOICES.items():
            if key in case and case[key] not in choices:
                raise InputError(f"{path}, case {index}: {key} = {case[key]!r}: must be one of {', '.join(choices)}")
        chips.parse(case["topology"])
    return cases


def load_config(name: str, changes: dict[str, Any]) -> Config:
    """The config `FILE` or `FILE:VARIANT`, with fields changed. Raises InputError if there is no such file or field."""
    path, _, variant = name.partition(":")
    try:
        get_config = runpy.run_path(path)["get_config"]
    except (OSError, KeyError) as error:
        raise InputError(f"config {name}: cannot be read, or has no get_config: {error}") from error
    config: ml_collections.ConfigDict = get_config(variant) if variant else get_config()
    try:
        config.update_from_flattened_dict(changes)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"config {name}: {str(error).splitlines()[0]}") from error
    return from_config_dict(config)


def _options(**values: Any) -> Options:
    return Options(**values, kernel_efficiency=EFFICIENCY.value, price=PRICE.value, search=SEARCH.value,
                   preemption_hours=PREEMPTION_HOURS.value, save_bandwidth=1e9 * SAVE_GBPS.value)


def _plan_case(case: dict[str, Any], config: Config, options: Options) -> dict[str, Any]:
    """{"plan": …}, or {"error": …} so that the other cases are still compared."""
    try:
        return {"plan": make_plan(config, chips.get_topology(case["topology"], case.get("num_slices", 1)), options)}
    except DoesNotFit as error:
        return {"error": str(error)}
    except ConfigError as error:
        raise InputError(f"case {case['name']}: {error}") from error
    except jax.errors.JaxRuntimeError as error:
        return {"error": f"{case['topology']}: not compiled: {' '.join(str(error).split())[:300]}"}


def _write(path: str, text: str) -> None:
    try:
        write_atomically(epath.Path(path), text)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    cli.run(main)
