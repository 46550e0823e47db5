"""Confidence-based scoring beside Monte-Carlo likelihood: accuracy and cost, on tasks that a model has learned.

  python -m illada_jax.main --config=experiments/sudoku.py
  python experiments/tasks/own.py --checkpoint=workdirs/sudoku --target=tasks
  python experiments/studies/scoring.py --task workdirs/sudoku tasks/own_sudoku.jsonl

The paper's ablation at a small size. `--task CHECKPOINT ITEMS` may be repeated; items are JSON lines with context,
choices and the index of the answer, and candidates are compared by their sums per token. `choice by confidence` finds
the best candidate without finishing those that cannot win (`Scorer.choose`). `agrees` is the share of choices equal to
those of the confidence score, `evaluations` the rows that the network computes for an item; times are processor times
without compiling. Finished rows are saved in the results directory and not computed again. Some minutes on one core.
"""

import argparse
import json
import math
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import study

from illada_jax import api
from illada_jax.errors import InputError

CHOICE = "choice by confidence"
METHODS: dict[str, dict[str, Any]] = {
    "confidence": {"method": "confidence"},
    CHOICE: {"method": "confidence"},
    **{f"confidence, {count} a step": {"method": "confidence", "tokens_per_step": count} for count in (2, 4)},
    **{f"Monte-Carlo, {count}": {"method": "monte_carlo", "mc_num": count} for count in (1, 4, 16, 128)},
    "confidence with cached contexts": {"method": "confidence", "context_cache": True},
    "Monte-Carlo with cached contexts, 128": {"method": "monte_carlo", "mc_num": 128, "context_cache": True},
}
BATCH = 64


def evaluate(lm: api.LanguageModel, items: Sequence[dict[str, Any]], method: str) -> dict[str, Any]:
    """The choices of one method, and their cost."""
    scorer = lm.scorer(batch_size=BATCH, **METHODS[method])
    questions = [[lm.encode_pair(item["context"], choice) for choice in item["choices"]] for item in items]
    lengths = [[len(candidate) for _, candidate in pairs] for pairs in questions]

    def choose() -> list[int]:
        if method == CHOICE:
            return scorer.choose(questions, lengths)
        scores = iter(scorer.score([pair for pairs in questions for pair in pairs]))
        return [int(np.argmax([next(scores).value / length for length in row])) for row in lengths]

    choose()  # compiles
    scorer.evaluator.evaluations, start = 0, time.process_time()
    chosen = choose()
    return {"chosen": chosen, "seconds": (time.process_time() - start) / len(items),
            "evaluations": scorer.evaluator.evaluations / len(items)}


def read_items(path: str, limit: int) -> list[dict[str, Any]]:
    """The first items of a file."""
    try:
        items = [json.loads(line) for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines()[:limit]]
        assert items and all(0 <= item["answer"] < len(item["choices"]) for item in items)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise InputError(f"{path}: not JSON lines with context, choices and answer: {error}") from error
    return items


def report(found: dict[str, dict[str, Any]], results: pathlib.Path) -> str:
    """Table and plot."""
    rows, curves = [], {}
    for name, task in found.items():
        answers = np.array(task["answers"])
        exact = np.array(task["methods"]["confidence"]["chosen"])
        for method in METHODS:
            got = task["methods"][method]
            right = np.array(got["chosen"]) == answers
            accuracy, error = right.mean(), math.sqrt(right.var() / (len(right) - 1))
            curves.setdefault((name, method.partition(",")[0]), []).append((got["evaluations"], accuracy, error))
            rows.append([name, method, f"{accuracy:.3f} ± {error:.3f}", f"{np.mean(exact == got['chosen']):.3f}",
                         f"{got['evaluations']:.1f}", f"{1000 * got['seconds']:.1f}"])

    def draw(axes):
        for number, name in enumerate(found):
            for kind, style in (("confidence", "o-"), (CHOICE, "*"), ("Monte-Carlo", "s--")):
                cost, accuracy, error = zip(*sorted(curves[name, kind]), strict=True)
                axes.errorbar(cost, accuracy, error, fmt=style, color=f"C{number}", capsize=3, markersize=5,
                              label=f"{name}: {kind}")
        axes.set(xscale="log", xlabel="evaluations of the network for a question", ylabel="accuracy", ylim=(0, 1))
        axes.legend(loc="lower center", ncols=len(found), fontsize="small")

    study.plot(results / "scoring.png", draw)
    header = ["items", "method", "accuracy", "agrees", "evaluations", "ms an item"]
    return study.write_table(results / "scoring.md", header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the missing rows and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs=2, action="append", metavar=("CHECKPOINT", "ITEMS"), required=True)
    parser.add_argument("--limit", type=int, default=200, help="items of each task (default: %(default)s)")
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path("workdirs/scoring"),
                        help="directory for finished rows, table and plot (default: %(default)s)")
    arguments = parser.parse_args(argv)
    arguments.results.mkdir(parents=True, exist_ok=True)
    found = {}
    for checkpoint, path in arguments.task:
        items, name = read_items(path, arguments.limit), pathlib.Path(path).stem
        saved = arguments.results / f"{name}-{len(items)}.json"
        task = json.loads(saved.read_text()) if saved.exists() else {
            "answers": [item["answer"] for item in items], "methods": {}}
        for method in METHODS:
            if method not in task["methods"]:
                task["methods"][method] = evaluate(api.load(checkpoint), items, method)
                saved.write_text(json.dumps(task))
                print(f"{name}: {method} is finished", flush=True)
        found[name] = task
    print(report(found, arguments.results))


if __name__ == "__main__":
    try:
        main()
    except InputError as wrong:
        sys.exit(f"error: {wrong}")
