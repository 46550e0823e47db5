"""Evaluates a model on tasks of lm-evaluation-harness (extra: eval), with every knob recorded.

    python -m illada_jax.evaluate --checkpoint=workdirs/sudoku --include_path=tasks --tasks=local_arc_easy --limit=100
    python -m illada_jax.evaluate --checkpoint=GSAI-ML/iLLaDA-8B-Base --dtype=bfloat16 --preset=illada-base/hellaswag
    python -m illada_jax.evaluate --checkpoint=… --preset=illada-instruct/math --set=max_new_tokens=512
    python -m illada_jax.evaluate --list_presets

A preset is the settings behind one published number: its task, examples, scorer and sampler. Flags go before it, and
`--set` before its settings; `--set=help` lists them. `--output_dir` gets `results.json`, with the manifest of the run,
`results.md` and `samples/`; what is finished is kept there, and the same command goes on after an interruption.
Generated programs are run by the tasks that ask for it only with `--allow_code_execution`, in a sandbox.

On several hosts start the same command on each with `--processes`: requests are spread over them, and the numbers are
those of one process, which process 0 writes.
"""

import dataclasses
import datetime
import json
import os
from typing import Any

import jax
from absl import flags
from etils import epath

from illada_jax import api, cli
from illada_jax import config as config_lib
from illada_jax.config import DecodeConfig
from illada_jax.errors import InputError
from illada_jax.evaluation import code_execution, presets, settings
from illada_jax.evaluation import manifest as manifests
from illada_jax.evaluation.work import Work
from illada_jax.files import write_atomically
from illada_jax.parallel import hosts
from illada_jax.scoring.scorer import ScoreConfig

MODEL = cli.model_flags()
PROCESSES = cli.processes_flag()
TASKS = flags.DEFINE_list("tasks", [], "tasks of lm-eval, or of --include_path")
PRESET = flags.DEFINE_string("preset", "", "settings of a published number, see --list_presets")
LIST_PRESETS = flags.DEFINE_bool("list_presets", False, "print the presets and exit")
INCLUDE_PATH = flags.DEFINE_string("include_path", None, "directory of further tasks")
NUM_FEWSHOT = flags.DEFINE_integer("num_fewshot", None, "examples in the prompt", lower_bound=0)
LIMIT = flags.DEFINE_integer("limit", None, "items of each task, from the first", lower_bound=1)
SET = flags.DEFINE_multi_string("set", [], "settings of scorer and sampler: key=value,key=value")
APPLY_CHAT_TEMPLATE = flags.DEFINE_bool("apply_chat_template", None, "prompts are conversations; default: the preset's")
FEWSHOT_AS_MULTITURN = flags.DEFINE_bool("fewshot_as_multiturn", True, "with a chat template: examples are turns")
SYSTEM_INSTRUCTION = flags.DEFINE_string("system_instruction", None, "with a chat template: the system message")
FEWSHOT_SEED = flags.DEFINE_integer("fewshot_seed", 1234, "seed of the choice of examples")
OUTPUT_DIR = flags.DEFINE_string("output_dir", "", "where results are written; empty: they are printed only")
ALLOW_CODE = flags.DEFINE_enum("allow_code_execution", "none", code_execution.MODES,
                               "run generated programs: in a bubblewrap sandbox, or as lm-eval does, without isolation")


def main(argv: list[str]) -> int | None:
    """Checks everything, loads the model, runs the tasks, writes the results."""
    del argv
    if LIST_PRESETS.value:
        print(presets.list_presets())
        return None
    knobs, evaluation = plan()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    manager = load_tasks(evaluation)
    program_tasks = code_execution.program_tasks(manager.task_index, evaluation["tasks"])
    if program_tasks and ALLOW_CODE.value == "none":
        raise InputError(f"task {program_tasks[0]}: runs generated programs; allow it with "
                         "--allow_code_execution=sandbox")
    hosts.join(PROCESSES.value)
    lm = MODEL.load()
    manifest = manifests.make_manifest(lm, MODEL.checkpoint.value, knobs, evaluation)
    directory = epath.Path(OUTPUT_DIR.value) if OUTPUT_DIR.value else None
    if directory is not None and jax.process_index() == 0:
        claim(directory, manifest)
    fingerprint = manifests.manifest_fingerprint(manifest)
    work = Work(None if directory is None else directory / "chunks", fingerprint)
    started = datetime.datetime.now(datetime.UTC)
    with code_execution.metric_for(ALLOW_CODE.value, manager, program_tasks):
        results = run(lm, knobs, work, manager, evaluation)
    if jax.process_index() == 0:
        times = {"started": started.isoformat(), "finished": datetime.datetime.now(datetime.UTC).isoformat()}
        write(directory, {"manifest": manifest, "manifest_fingerprint": fingerprint, **results, "times": times})
    return None


def plan() -> tuple[settings.Settings, dict[str, Any]]:
    """(The knobs, what is evaluated) of preset and flags.

    Raises:
      InputError: something does not fit; nothing has been loaded yet.
    """
    preset = presets.find_preset(PRESET.value) if PRESET.value else None
    if preset and preset.autoregressive:
        raise InputError(f"--preset={preset.name}: is not a diffusion model; its command is: {preset.command}")
    values = dict(preset.settings) if preset else {}
    for text in SET.value:
        if text == "help":
            raise InputError(f"--set takes: {', '.join(sorted(known_settings()))}")
        values |= settings.parse_settings(text)
    tasks = TASKS.value or ([preset.tasks] if preset else [])
    if not tasks:
        raise InputError("--tasks: give at least one, or a --preset")
    chat = APPLY_CHAT_TEMPLATE.value
    if chat is None:
        chat = bool(preset and preset.chat)
    if SYSTEM_INSTRUCTION.value and not chat:
        raise InputError("--system_instruction: is for --apply_chat_template")
    shots = NUM_FEWSHOT.value
    if shots is None and preset:
        shots = preset.num_fewshot
    if ALLOW_CODE.value == "sandbox":
        code_execution.check_supported()
    return settings.make_settings(values), {
        "tasks": tasks, "preset": PRESET.value, "num_fewshot": shots, "limit": LIMIT.value, "apply_chat_template": chat,
        "fewshot_as_multiturn": chat and FEWSHOT_AS_MULTITURN.value, "system_instruction": SYSTEM_INSTRUCTION.value,
        "fewshot_seed": FEWSHOT_SEED.value, "allow_code_execution": ALLOW_CODE.value,
        "dtype": MODEL.dtype.value, "quantize": MODEL.quantize.value,
        "published": preset.target if preset else None, "metric": preset.metric if preset else None,
    }


def known_settings() -> set[str]:
    """Every key of --set."""
    return {field.name for section in (ScoreConfig, DecodeConfig, settings.LmEvalConfig)
            for field in dataclasses.fields(section)}


def load_tasks(evaluation: dict[str, Any]) -> Any:
    """The harness's task manager, which knows all tasks asked for.

    Raises:
      InputError: the harness is not installed, or there is no such task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(f"lm-evaluation-harness is not installed ({error.name}): pip install 'illada_jax[eval]'"
                         ) from error
    if INCLUDE_PATH.value and not epath.Path(INCLUDE_PATH.value).is_dir():
        raise InputError(f"--include_path={INCLUDE_PATH.value}: no such directory")
    if INCLUDE_PATH.value:
        # The harness has some 14,000 tasks: to read their files takes longer than a small evaluation.
        manager = TaskManager(include_path=INCLUDE_PATH.value, include_defaults=False)
        if set(evaluation["tasks"]) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=INCLUDE_PATH.value)
    for task in evaluation["tasks"]:
        if task not in manager.all_tasks:
            raise InputError(f"--tasks={task}: unknown{settings.near(task, manager.all_tasks)}")
    return manager


def claim(directory: epath.Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest first, so that a directory holds one evaluation only.

    Raises:
      InputError: it holds another one.
    """
    path = directory / "manifest.json"
    if path.exists():
        different = config_lib.differences(json.loads(path.read_text()), manifest)
        if different:
            raise InputError(f"--output_dir={directory}: holds another evaluation ({'; '.join(different[:3])}); "
                             "choose another directory")
        return
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(manifest, indent=1) + "\n")


def run(lm: api.LanguageModel, knobs: settings.Settings, work: Work, manager: Any,
        evaluation: dict[str, Any]) -> dict[str, Any]:
    """Runs the harness; the results without manifest and times."""
    import lm_eval
    from lm_eval import evaluator

    from illada_jax.evaluation.lm_eval_model import LmEvalModel

    adapter = LmEvalModel(lm, knobs, work)
    describe = evaluator.add_env_info
    evaluator.add_env_info = lambda results: None  # our manifest does; the harness would look at PyTorch
    try:
        found = lm_eval.simple_evaluate(
            model=adapter, tasks=list(evaluation["tasks"]), task_manager=manager,
            num_fewshot=evaluation["num_fewshot"], limit=evaluation["limit"], log_samples=True,
            apply_chat_template=evaluation["apply_chat_template"],
            fewshot_as_multiturn=evaluation["fewshot_as_multiturn"],
            system_instruction=evaluation["system_instruction"], fewshot_random_seed=evaluation["fewshot_seed"],
            torch_random_seed=None,  # PyTorch takes no part
            confirm_run_unsafe_code=ALLOW_CODE.value != "none")
    finally:
        evaluator.add_env_info = describe
    kept = {name: found[name] for name in ("results", "groups", "configs", "versions", "n-shot", "n-samples")
            if name in found}
    return json.loads(json.dumps({
        **kept, "network_evaluations": work.evaluations, "truncated_contexts": dict(adapter.truncated),
        "samples": found["samples"]}, default=str))


def write(directory: epath.Path | None, report: dict[str, Any]) -> None:
    """Prints the table, and writes results and samples."""
    table = markdown(report)
    print(table)
    if directory is None:
        return
    samples = report.pop("samples")
    (directory / "samples").mkdir(parents=True, exist_ok=True)
    for task, rows in samples.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(directory / "samples" / f"{task}.jsonl", lines)
    write_atomically(directory / "results.md", table + "\n")
    write_atomically(directory / "results.json", json.dumps(report, indent=1) + "\n")


def markdown(report: dict[str, Any]) -> str:
    """The results as a table with standard errors."""
    evaluation = report["manifest"]["evaluation"]
    lines = ["| task | shots | items | metric | filter | value | ± s.e. |", "|---|---|---|---|---|---|---|"]
    for task, metrics in {**report["results"], **report.get("groups", {})}.items():
        items = report["n-samples"].get(task, {}).get("effective", "")
        for key, value in metrics.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = metrics.get(f"{metric}_stderr,{chosen}")
            shown = f"{error:.4f}" if isinstance(error, (int, float)) else ""
            lines.append(f"| {task} | {report['n-shot'].get(task, '')} | {items} | {metric} | {chosen} | {value:.4f} | "
                         f"{shown} |")
    lines += ["", f"network evaluations: {report['network_evaluations']:,}; manifest {report['manifest_fingerprint']}"]
    if evaluation["published"] is not None:
        lines.append(f"published: {evaluation['published']} % ({evaluation['metric']}, {evaluation['preset']})")
    for kind, count in report["truncated_contexts"].items():
        lines.append(f"{count} contexts ({kind}) were longer than the model's and lost their beginning")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
