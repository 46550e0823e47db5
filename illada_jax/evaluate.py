"""Evaluates a model on tasks of lm-evaluation-harness (extra: eval) and records every setting.

    python -m illada_jax.evaluate --checkpoint=workdirs/sudoku --include_path=tasks --tasks=own_sudoku --limit=100
    python -m illada_jax.evaluate --checkpoint=GSAI-ML/iLLaDA-8B-Base --dtype=bfloat16 --preset=illada-base/hellaswag
    python -m illada_jax.evaluate --checkpoint=… --preset=illada-instruct/math --set=max_new_tokens=512
    python -m illada_jax.evaluate --checkpoint=demo --tasks='arc_*',my/task.yaml --limit=0.1
    python -m illada_jax.evaluate --list_presets

A preset holds the setup of one published number: task, examples, scorer and sampler. Flags override it, and `--set`
overrides its settings; `--set=help` lists them. `--output_dir` gets `results.json`, which includes a manifest,
`results.md` and `samples/`. Finished requests are saved there: after an interruption the same command resumes.
Tasks whose answers are programs need `--allow_code_execution=sandbox`, which runs them in bubblewrap.

On several hosts, start the same command on each with `--processes`. They share the requests; the results do not depend
on their number, and process 0 writes them.
"""

import datetime
import glob
import json
import os
import pathlib
import sys
from typing import Any

from absl import flags
from etils import epath
from rich.console import Console
from rich.markdown import Markdown

from illada_jax import api, cli
from illada_jax import config as config_lib
from illada_jax.errors import InputError
from illada_jax.evaluation import code_execution, presets
from illada_jax.evaluation.manifest import make_manifest
from illada_jax.evaluation.settings import KNOWN_SETTINGS, Settings, did_you_mean, make_settings, parse_settings
from illada_jax.evaluation.work import Work
from illada_jax.files import read_json, write_atomically
from illada_jax.parallel import hosts
from illada_jax.parallel.fingerprints import digest

MODEL = cli.ModelFlags()
PROCESSES = cli.processes_flag()
TASKS = flags.DEFINE_list("tasks", [], "tasks, groups and tags of lm-eval or of --include_path, patterns of their "
                          "names, and their YAML files or directories")
PRESET = flags.DEFINE_string("preset", "", "setup of a published number, see --list_presets")
LIST_PRESETS = flags.DEFINE_bool("list_presets", False, "print the presets and exit")
INCLUDE_PATH = flags.DEFINE_string("include_path", None, "directory with additional tasks")
NUM_FEWSHOT = flags.DEFINE_integer("num_fewshot", None, "examples in the prompt", lower_bound=0)
LIMIT = flags.DEFINE_float("limit", None, "number of the first items of each task to evaluate; below 1 a share of them")
SET = flags.DEFINE_multi_string("set", [], "settings: key=value,key=value; help lists them")
APPLY_CHAT_TEMPLATE = flags.DEFINE_bool("apply_chat_template", None, "prompts are conversations; default: preset's")
FEWSHOT_AS_MULTITURN = flags.DEFINE_bool("fewshot_as_multiturn", True, "with a chat template: examples are turns")
SYSTEM_INSTRUCTION = flags.DEFINE_string("system_instruction", None, "with a chat template: the system message")
FEWSHOT_SEED = flags.DEFINE_integer("fewshot_seed", 1234, "seed for choosing few-shot examples")
OUTPUT_DIR = flags.DEFINE_string("output_dir", "", "directory for results; empty: print them only")
ALLOW_CODE = flags.DEFINE_enum("allow_code_execution", "none", code_execution.MODES,
                               "run generated programs: in a bubblewrap sandbox, or as lm-eval does, without isolation")


def main(argv: list[str]) -> int | None:
    """Checks the flags, loads the model, runs the tasks and writes the results."""
    del argv
    if LIST_PRESETS.value:
        table = presets.list_presets()
        if sys.stdout.isatty():
            Console(file=sys.__stdout__).print(Markdown(table))  # sys.stdout would show its colours as text
        else:
            print(table)
        return None
    settings, evaluation = read_flags()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    manager, evaluation["tasks"] = load_tasks(evaluation["tasks"])
    program_tasks = code_execution.program_tasks(manager.task_index, evaluation["tasks"])
    if program_tasks and ALLOW_CODE.value == "none":
        raise InputError(f"task {program_tasks[0]}: runs generated programs; allow it with "
                         "--allow_code_execution=sandbox")
    hosts.join(PROCESSES.value)
    lm = MODEL.load()
    manifest = make_manifest(lm, MODEL.checkpoint.value, settings, evaluation)
    directory = epath.Path(OUTPUT_DIR.value) if OUTPUT_DIR.value else None
    if directory and hosts.is_primary():
        write_manifest(directory, manifest)
    fingerprint = digest(json.dumps(manifest, sort_keys=True))
    work = Work(directory and directory / "chunks", fingerprint)
    started = datetime.datetime.now(datetime.UTC)
    with code_execution.metric_for(ALLOW_CODE.value, manager, program_tasks):
        results = run(lm, settings, work, manager, evaluation)
    if hosts.is_primary():
        times = {"started": started.isoformat(), "finished": datetime.datetime.now(datetime.UTC).isoformat()}
        write_results(directory, {"manifest": manifest, "manifest_fingerprint": fingerprint, **results, "times": times})
    return None


def read_flags() -> tuple[Settings, dict[str, Any]]:
    """(Settings, the manifest's section `evaluation`) from preset and flags. Raises InputError for an invalid flag."""
    preset = presets.find_preset(PRESET.value) if PRESET.value else None
    if preset and preset.autoregressive:
        raise InputError(f"--preset={preset.name}: not a diffusion model; run instead: {preset.command}")
    values = dict(preset.settings) if preset else {}
    for text in SET.value:
        if text == "help":
            raise InputError(f"--set takes: {', '.join(sorted(KNOWN_SETTINGS))}")
        values |= parse_settings(text)
    tasks = TASKS.value or ([preset.task] if preset else [])
    if not tasks:
        raise InputError("--tasks: give at least one task, or a --preset")
    chat, shots = APPLY_CHAT_TEMPLATE.value, NUM_FEWSHOT.value
    if preset:
        chat = preset.chat if chat is None else chat
        shots = preset.num_fewshot if shots is None else shots
    if SYSTEM_INSTRUCTION.value and not chat:
        raise InputError("--system_instruction: requires --apply_chat_template")
    if ALLOW_CODE.value == "sandbox":
        code_execution.check_supported()
    limit = LIMIT.value
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and limit.is_integer())):
        raise InputError(f"--limit={limit:g}: must be a number of items, or a share of them between 0 and 1")
    recorded = (PRESET, SYSTEM_INSTRUCTION, FEWSHOT_SEED, ALLOW_CODE, MODEL.dtype, MODEL.quantize)
    return make_settings(values), {
        "tasks": tasks, "num_fewshot": shots, "apply_chat_template": bool(chat),
        "fewshot_as_multiturn": bool(chat) and FEWSHOT_AS_MULTITURN.value,
        "limit": int(limit) if limit is not None and limit >= 1 else limit,
        **{flag.name: flag.value for flag in recorded},
        "published": preset.target if preset else None, "metric": preset.metric if preset else None,
    }


def load_tasks(tasks: list[str]) -> tuple[Any, list[str]]:
    """The harness's task manager, and the names of the tasks in place of patterns and files.

    Raises InputError if the harness is not installed, a task is unknown, or a file has none.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(f"lm-evaluation-harness is not installed ({error.name}): pip install 'illada_jax[eval]'"
                         ) from error
    if INCLUDE_PATH.value and not epath.Path(INCLUDE_PATH.value).is_dir():
        raise InputError(f"--include_path={INCLUDE_PATH.value}: no such directory")
    # Reading the harness's own 14,000 task files takes longer than a small evaluation.
    manager = TaskManager(include_path=INCLUDE_PATH.value, include_defaults=False)
    if not all(task in manager.task_index or is_path(task) for task in tasks):
        manager = TaskManager(include_path=INCLUDE_PATH.value)
    names: list[str] = []
    for task in tasks:
        known = [task] if task in manager.task_index else manager.match_tasks([task])
        found = read_task_files(task, manager) if is_path(task) else known
        if not found:
            raise InputError(f"--tasks={task}: unknown{did_you_mean(task, manager.all_tasks)}")
        names += found
    # A pattern may match a group and its members, which the harness refuses to evaluate twice.
    members = {name: {*code_execution.task_configs(manager.task_index, [name])} for name in names}
    return manager, [name for name in members if not any(
        members[name] < others or (members[name] == others and other < name) for other, others in members.items())]


def is_path(task: str) -> bool:
    """True for the path of a task's file, a pattern of such paths, or a directory written with a slash."""
    return task.endswith((".yaml", ".yml")) or ("/" in task and pathlib.Path(task).is_dir())


def read_task_files(path: str, manager: Any) -> list[str]:
    """Adds the tasks and groups of files to the manager; returns their names. Raises InputError if there is none."""
    from lm_eval.tasks._index import TaskIndex
    from lm_eval.tasks._yaml_loader import load_yaml

    found: dict[str, Any] = {}
    try:
        if pathlib.Path(path).is_dir():
            found = TaskIndex.build([pathlib.Path(path).absolute()])
        for each in [path] if pathlib.Path(path).is_file() else sorted(glob.glob(path)):
            if pathlib.Path(each).is_file():
                TaskIndex.process_cfg(load_yaml(each, resolve_func=False), pathlib.Path(each).absolute(), found)
    except Exception as error:  # of the YAML parser, or of a file with another content
        raise InputError(f"--tasks={path}: not the file of a task: {' '.join(str(error).split())}") from error
    if not found:
        raise InputError(f"--tasks={path}: no such file, or no task in it")
    manager.task_index.update(found)
    return [name for name, entry in found.items() if entry.yaml_path]  # a tag has no file


def write_manifest(directory: epath.Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest before the evaluation. Raises InputError if the directory holds another evaluation."""
    path = directory / "manifest.json"
    if path.exists():
        different = config_lib.differences(read_json(path), manifest)
        if different:
            raise InputError(f"--output_dir={directory}: holds another evaluation ({'; '.join(different[:3])}); "
                             "choose another directory")
        return
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(manifest, indent=1) + "\n")


def run(lm: api.LanguageModel, settings: Settings, work: Work, manager: Any,
        evaluation: dict[str, Any]) -> dict[str, Any]:
    """Runs the harness and returns its results, without manifest and times."""
    import lm_eval
    from lm_eval import evaluator

    from illada_jax.evaluation.lm_eval_model import LmEvalModel

    adapter = LmEvalModel(lm, settings, work)
    same = ("tasks", "num_fewshot", "limit", "apply_chat_template", "fewshot_as_multiturn", "system_instruction")
    describe = evaluator.add_env_info
    evaluator.add_env_info = lambda results: None  # the manifest has it, and the harness would import PyTorch
    try:
        found = lm_eval.simple_evaluate(
            model=adapter, task_manager=manager, **{name: evaluation[name] for name in same}, log_samples=True,
            fewshot_random_seed=evaluation["fewshot_seed"], torch_random_seed=None,  # PyTorch is not used
            confirm_run_unsafe_code=ALLOW_CODE.value != "none")
    finally:
        evaluator.add_env_info = describe
    kept = ("results", "groups", "configs", "versions", "n-shot", "n-samples", "samples")
    return json.loads(json.dumps({
        **{name: found[name] for name in kept if name in found}, "network_evaluations": work.evaluations,
        "truncated_contexts": dict(adapter.truncated)}, default=str))


def write_results(directory: epath.Path | None, report: dict[str, Any]) -> None:
    """Prints the table; writes results and samples if there is a directory."""
    table = results_table(report)
    print(table)
    if directory is None:
        return
    (directory / "samples").mkdir(parents=True, exist_ok=True)
    for task, rows in report.pop("samples").items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(directory / "samples" / f"{task}.jsonl", lines)
    write_atomically(directory / "results.md", table + "\n")
    write_atomically(directory / "results.json", json.dumps(report, indent=1) + "\n")


def results_table(report: dict[str, Any]) -> str:
    """The results with standard errors, as a Markdown table."""
    evaluation = report["manifest"]["evaluation"]
    lines = ["| task | shots | items | metric | filter | value | ± s.e. |", "|---|---|---|---|---|---|---|"]
    for task, metrics in {**report["results"], **report.get("groups", {})}.items():
        head = f"{task} | {report['n-shot'].get(task, '')} | {report['n-samples'].get(task, {}).get('effective', '')}"
        numbers = {key: f"{value:.4f}" for key, value in metrics.items() if isinstance(value, (int, float))}
        for key, value in numbers.items():
            metric, comma, chosen = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                error = numbers.get(f"{metric}_stderr,{chosen}", "")
                lines.append(f"| {head} | {metric} | {chosen} | {value} | {error} |")
    lines += ["", f"network evaluations: {report['network_evaluations']:,}; manifest {report['manifest_fingerprint']}"]
    if evaluation["published"] is not None:
        lines.append(f"published: {evaluation['published']} % ({evaluation['metric']}, {evaluation['preset']})")
    for kind, count in report["truncated_contexts"].items():
        what = "candidates" if kind == "candidates" else f"contexts ({kind})"
        lines.append(f"{count} {what} were too long for the model and lost their beginning")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
