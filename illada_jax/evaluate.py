"""Evaluates a model on tasks of lm-evaluation-harness (extra: eval) and records every setting.

    python -m illada_jax.evaluate --checkpoint=workdirs/sudoku --include_path=tasks --tasks=local_arc_easy --limit=100
    python -m illada_jax.evaluate --checkpoint=GSAI-ML/iLLaDA-8B-Base --dtype=bfloat16 --preset=illada-base/hellaswag
    python -m illada_jax.evaluate --checkpoint=… --preset=illada-instruct/math --set=max_new_tokens=512
    python -m illada_jax.evaluate --list_presets

A preset holds the setup of one published number: task, examples, scorer and sampler. Flags override it, and `--set`
overrides its settings; `--set=help` lists them. `--output_dir` gets `results.json`, which includes a manifest,
`results.md` and `samples/`. Finished requests are saved there: after an interruption the same command resumes.
Tasks whose answers are programs need `--allow_code_execution=sandbox`, which runs them in bubblewrap.

On several hosts, start the same command on each with `--processes`. They share the requests; the results do not depend
on their number, and process 0 writes them.
"""

import datetime
import json
import os
from typing import Any

import jax
from absl import flags
from etils import epath

from illada_jax import api, cli
from illada_jax import config as config_lib
from illada_jax.errors import InputError
from illada_jax.evaluation import code_execution, presets
from illada_jax.evaluation.manifest import make_manifest, manifest_fingerprint
from illada_jax.evaluation.settings import Settings, did_you_mean, known_settings, make_settings, parse_settings
from illada_jax.evaluation.work import Work
from illada_jax.files import write_atomically
from illada_jax.parallel import hosts

MODEL = cli.ModelFlags()
PROCESSES = cli.processes_flag()
TASKS = flags.DEFINE_list("tasks", [], "tasks of lm-eval or of --include_path")
PRESET = flags.DEFINE_string("preset", "", "setup of a published number, see --list_presets")
LIST_PRESETS = flags.DEFINE_bool("list_presets", False, "print the presets and exit")
INCLUDE_PATH = flags.DEFINE_string("include_path", None, "directory of more tasks")
NUM_FEWSHOT = flags.DEFINE_integer("num_fewshot", None, "examples in the prompt", lower_bound=0)
LIMIT = flags.DEFINE_integer("limit", None, "evaluate the first items of each task only", lower_bound=1)
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
        print(presets.list_presets())
        return None
    settings, evaluation = read_flags()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    manager = load_tasks(evaluation)
    program_tasks = code_execution.program_tasks(manager.task_index, evaluation["tasks"])
    if program_tasks and ALLOW_CODE.value == "none":
        raise InputError(f"task {program_tasks[0]}: runs generated programs; allow it with "
                         "--allow_code_execution=sandbox")
    hosts.join(PROCESSES.value)
    lm = MODEL.load()
    manifest = make_manifest(lm, MODEL.checkpoint.value, settings, evaluation)
    directory = epath.Path(OUTPUT_DIR.value) if OUTPUT_DIR.value else None
    if directory is not None and jax.process_index() == 0:
        write_manifest(directory, manifest)
    fingerprint = manifest_fingerprint(manifest)
    work = Work(None if directory is None else directory / "chunks", fingerprint)
    started = datetime.datetime.now(datetime.UTC)
    with code_execution.metric_for(ALLOW_CODE.value, manager, program_tasks):
        results = run(lm, settings, work, manager, evaluation)
    if jax.process_index() == 0:
        times = {"started": started.isoformat(), "finished": datetime.datetime.now(datetime.UTC).isoformat()}
        write_results(directory, {"manifest": manifest, "manifest_fingerprint": fingerprint, **results, "times": times})
    return None


def read_flags() -> tuple[Settings, dict[str, Any]]:
    """(Settings, the manifest's section `evaluation`) from preset and flags.

    Raises:
      InputError: a flag is invalid, or flags contradict each other.
    """
    preset = presets.find_preset(PRESET.value) if PRESET.value else None
    if preset and preset.autoregressive:
        raise InputError(f"--preset={preset.name}: not a diffusion model; run instead: {preset.command}")
    values = dict(preset.settings) if preset else {}
    for text in SET.value:
        if text == "help":
            raise InputError(f"--set takes: {', '.join(sorted(known_settings()))}")
        values |= parse_settings(text)
    tasks = TASKS.value or ([preset.task] if preset else [])
    if not tasks:
        raise InputError("--tasks: give at least one task, or a --preset")
    chat = APPLY_CHAT_TEMPLATE.value
    if chat is None:
        chat = bool(preset and preset.chat)
    if SYSTEM_INSTRUCTION.value and not chat:
        raise InputError("--system_instruction: requires --apply_chat_template")
    shots = NUM_FEWSHOT.value
    if shots is None and preset:
        shots = preset.num_fewshot
    if ALLOW_CODE.value == "sandbox":
        code_execution.check_supported()
    return make_settings(values), {
        "tasks": tasks, "preset": PRESET.value, "num_fewshot": shots, "limit": LIMIT.value, "apply_chat_template": chat,
        "fewshot_as_multiturn": chat and FEWSHOT_AS_MULTITURN.value, "system_instruction": SYSTEM_INSTRUCTION.value,
        "fewshot_seed": FEWSHOT_SEED.value, "allow_code_execution": ALLOW_CODE.value,
        "dtype": MODEL.dtype.value, "quantize": MODEL.quantize.value,
        "published": preset.target if preset else None, "metric": preset.metric if preset else None,
    }


def load_tasks(evaluation: dict[str, Any]) -> Any:
    """The harness's task manager, with all requested tasks in its index.

    Raises:
      InputError: the harness is not installed, or a task is unknown.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(f"lm-evaluation-harness is not installed ({error.name}): pip install 'illada_jax[eval]'"
                         ) from error
    if INCLUDE_PATH.value and not epath.Path(INCLUDE_PATH.value).is_dir():
        raise InputError(f"--include_path={INCLUDE_PATH.value}: no such directory")
    if INCLUDE_PATH.value:
        # Reading the harness's own 14,000 task files takes longer than a small evaluation.
        manager = TaskManager(include_path=INCLUDE_PATH.value, include_defaults=False)
        if set(evaluation["tasks"]) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=INCLUDE_PATH.value)
    for task in evaluation["tasks"]:
        if task not in manager.all_tasks:
            raise InputError(f"--tasks={task}: unknown{did_you_mean(task, manager.all_tasks)}")
    return manager


def write_manifest(directory: epath.Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest before the evaluation starts, so that a directory holds one evaluation only.

    Raises:
      InputError: the directory holds another evaluation.
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


def run(lm: api.LanguageModel, settings: Settings, work: Work, manager: Any,
        evaluation: dict[str, Any]) -> dict[str, Any]:
    """Runs the harness and returns its results, without manifest and times."""
    import lm_eval
    from lm_eval import evaluator

    from illada_jax.evaluation.lm_eval_model import LmEvalModel

    adapter = LmEvalModel(lm, settings, work)
    describe = evaluator.add_env_info
    evaluator.add_env_info = lambda results: None  # the manifest has it, and the harness would import PyTorch
    try:
        found = lm_eval.simple_evaluate(
            model=adapter, tasks=list(evaluation["tasks"]), task_manager=manager,
            num_fewshot=evaluation["num_fewshot"], limit=evaluation["limit"], log_samples=True,
            apply_chat_template=evaluation["apply_chat_template"],
            fewshot_as_multiturn=evaluation["fewshot_as_multiturn"],
            system_instruction=evaluation["system_instruction"], fewshot_random_seed=evaluation["fewshot_seed"],
            torch_random_seed=None,  # PyTorch is not used
            confirm_run_unsafe_code=ALLOW_CODE.value != "none")
    finally:
        evaluator.add_env_info = describe
    kept = {name: found[name] for name in ("results", "groups", "configs", "versions", "n-shot", "n-samples")
            if name in found}
    return json.loads(json.dumps({
        **kept, "network_evaluations": work.evaluations, "truncated_contexts": dict(adapter.truncated),
        "samples": found["samples"]}, default=str))


def write_results(directory: epath.Path | None, report: dict[str, Any]) -> None:
    """Prints the table; writes results and samples if there is a directory."""
    table = results_table(report)
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


def results_table(report: dict[str, Any]) -> str:
    """The results with standard errors, as a Markdown table."""
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
        lines.append(f"{count} contexts ({kind}) were too long for the model and lost their beginning")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
