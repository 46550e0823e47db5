"""Variable length: iLLaDA's format and decoding against LLaDA's, at the same training compute.

    python experiments/studies/variable_length.py

Four tasks with answers of 1 to more than 100 characters. Models trained in either format answer held-out prompts in
three ways, always one token a step: `variable` appends blocks of 16 until EOS; `canvas` starts from 128 masks and
denoises them in any order, as published for LLaDA; `canvas in blocks` has the same 128 masks, but denoises blocks of 16
and stops after the one that holds EOS. Writes a table and a plot; 6 cells of about a minute on one core, after a base
model of ten.
"""

import pathlib

import study
from study import SEEDS, Cell

CELLS = [Cell(format=form, seed=seed) for form in ("llada", "illada") for seed in SEEDS]
COLUMNS = {"exact match": "exact_match", "evaluations": "evaluations", "tokens computed": "tokens",
           "processor seconds": "processor_seconds", "unfinished": "unfinished", "longer than right": "too_long"}


def report(done: dict[Cell, dict], directory: pathlib.Path) -> str:
    """The table, with computed tokens relative to those of iLLaDA's format and decoding with the same seed."""
    rows, points = [], []
    yardstick = {cell.seed: result["decoded"]["variable"]["tokens"] for cell, result in done.items()
                 if cell.format == "illada"}
    for form in ("illada", "llada"):
        cells = {cell.seed: result["decoded"] for cell, result in done.items() if cell.format == form}
        results = list(cells.values())
        for decoding in results[0] if results else ():
            columns = [study.spread([result[decoding][key] for result in results]) for key in COLUMNS.values()]
            ratios = [result[decoding]["tokens"] / yardstick[seed] for seed, result in cells.items()
                      if seed in yardstick]
            rows.append([form, decoding, *columns, study.spread(ratios) if ratios else ""])
            points.append((form, decoding, results))
    text = study.write_table(directory / "variable_length.md",
                             ["format", "decoding", *COLUMNS, "tokens / iLLaDA's"], rows)

    def draw(axes):
        for form, decoding, results in points:
            axes.plot([result[decoding]["tokens"] for result in results],
                      [result[decoding]["exact_match"] for result in results],
                      "o" if form == "illada" else "s", label=f"{form}, {decoding}")
        axes.set(xscale="log", xlabel="tokens computed per answer", ylabel="exact match on held-out prompts")
        axes.legend()

    study.plot(directory / "variable_length.png", draw)
    return "\n\n".join([text, *_by_task(done)])


def _by_task(done: dict[Cell, dict]) -> list[str]:
    """Exact match of variable-length decoding by task, one line per format."""
    lines = []
    for form in ("illada", "llada"):
        found = [result["decoded"]["variable"]["by_task"] for cell, result in done.items() if cell.format == form]
        if found:
            lines.append(f"{form}, variable, by task: " + ", ".join(
                f"{task} {study.spread([each[task] for each in found])}" for task in found[0]))
    return lines


if __name__ == "__main__":
    study.main(__doc__, CELLS, report)
