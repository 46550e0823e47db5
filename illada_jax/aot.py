"""Compiles the training step, the decoder or the scorer for TPUs that need not be there: what fits, how fast it can be.

  python -m illada_jax.aot --config=experiments/pretrain_8b.py --topology=v5p:4x4x4
  python -m illada_jax.aot --config=experiments/pretrain_8b.py:v5p-128 --topology=v5p:4x4x4 --num_slices=2 --search
  python -m illada_jax.aot --config=experiments/pretrain_8b.py --topology=v5e:2x2 --mode=decode \
      --config.mesh.fsdp=1 --config.mesh.tensor=4 --canvas=4096
  python -m illada_jax.aot --compare=tpu/cases.json --json=tpu/report.json --markdown=tpu/REPORT.md

Needs `pip install 'illada_jax[tpu]'`, a processor, 3 GiB of memory and one to two minutes for each program; no TPU, no
corpus, no tokenizer. `--compare` reads a list of {"name", "config", "topology"} with, if wanted, "num_slices", "mode",
"canvas" and "set" (fields of the config); what is in the JSON file already for the same case and versions is not
compiled again.
"""

import importlib.util
import json
import pathlib
from typing import Any

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

from illada_jax import cli
from illada_jax.config import Config, from_config_dict
from illada_jax.errors import ConfigError, InputError
from illada_jax.planning import chips
from illada_jax.planning.plan import Options, make_plan
from illada_jax.planning.programs import DoesNotFit
from illada_jax.planning.render import as_markdown, as_text

CONFIG = config_flags.DEFINE_config_file("config", None, "experiment file; fields are set with --config.section.name")
TOPOLOGY = flags.DEFINE_string("topology", None, "chips and shape of a slice, such as v5p:4x4x4")
NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "slices, joined by the data centre network")
MODE = flags.DEFINE_enum("mode", "train", ["train", "decode", "score"], "the program that is compiled")
CANVAS = flags.DEFINE_integer("canvas", 0, "columns of decoding and scoring; 0: the context of the model", 0)
SEARCH = flags.DEFINE_bool("search", False, "also find the most rows that fit on a device (three or more compilations)")
EFFICIENCY = flags.DEFINE_float("kernel_efficiency", 0.7, "share of the peak that attention kernels reach", 0.01, 1.0)
PRICE = flags.DEFINE_float("price", 0.0, "price per chip and hour; adds a line with the cost", 0.0)
COMPARE = flags.DEFINE_string("compare", "", "JSON file of cases that are compared")
JSON = flags.DEFINE_string("json", "", "file for the plan, or the compared plans, as JSON")
MARKDOWN = flags.DEFINE_string("markdown", "", "file for the compared plans as tables")
CASE_KEYS = {"name", "config", "topology", "num_slices", "mode", "canvas", "set"}


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
    options = Options(MODE.value, CANVAS.value, EFFICIENCY.value, PRICE.value, SEARCH.value)
    plan = make_plan(config, chips.get_topology(TOPOLOGY.value, NUM_SLICES.value), options)
    print(as_text(plan))
    if JSON.value:
        _write(JSON.value, json.dumps(plan, indent=1) + "\n")
    return None


def compare(path: pathlib.Path) -> None:
    """Makes the plans of all cases of a file that are not made yet, and writes the tables.

    Raises:
      InputError: the file is no list of cases.
    """
    cases = read_cases(path)
    versions = chips.versions()
    made = {}
    if JSON.value and pathlib.Path(JSON.value).exists():
        made = {json.dumps(old["case"], sort_keys=True): old for old in json.loads(pathlib.Path(JSON.value).read_text())
                if old["versions"] == versions}
    results = []
    for case in cases:
        key = json.dumps(case, sort_keys=True)
        if key not in made:
            made[key] = {"name": case["name"], "case": case, "versions": versions, **_plan_case(case)}
        results.append(made[key])
        if JSON.value:
            _write(JSON.value, json.dumps(results, indent=1) + "\n")
    text = as_markdown(results)
    print(text)
    if MARKDOWN.value:
        head = (f"# Compiled for TPUs\n\nMade by `python -m illada_jax.aot --compare={COMPARE.value} "
                f"--json={JSON.value} --markdown={MARKDOWN.value}` with "
                f"{', '.join(f'{name} {version}' for name, version in versions.items())}. Nothing here ran on a TPU: "
                "memory is the compiler's, times are bounds.\n\n")
        _write(MARKDOWN.value, head + text)


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


def _plan_case(case: dict[str, Any]) -> dict[str, Any]:
    config = load_config(case["config"], case.get("set", {}))
    options = Options(case.get("mode", "train"), case.get("canvas", 0), EFFICIENCY.value, PRICE.value, SEARCH.value)
    try:
        return {"plan": make_plan(config, chips.get_topology(case["topology"], case.get("num_slices", 1)), options)}
    except DoesNotFit as error:
        return {"error": str(error)}
    except ConfigError as error:
        raise InputError(f"case {case['name']}: {error}") from error


def _write(path: str, text: str) -> None:
    try:
        pathlib.Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    cli.run(main)
