"""Exact match after 3, 6, 9 and 12 epochs of fine-tuning, as in the paper's figure.

    python experiments/studies/epochs.py

The same examples 12 times in iLLaDA's format, with the rate decaying at the end; held-out prompts are decoded during
training. Shares its cells with variable_length.py: 3 cells of about a minute on one core.
"""

import pathlib

import study
from study import SEEDS, Cell

CELLS = [Cell(seed=seed) for seed in SEEDS]


def report(done: dict[Cell, dict], directory: pathlib.Path) -> str:
    """Exact match and share of unfinished answers, by epoch."""
    curves = [result["curve"] for result in done.values()]
    rows = [[f"{points[0]['epoch']:.2g}", study.spread([point["exact_match"] for point in points]),
             study.spread([point["unfinished"] for point in points])] for points in zip(*curves, strict=True)]

    def draw(axes):
        for cell, result in done.items():
            axes.plot([p["epoch"] for p in result["curve"]], [p["exact_match"] for p in result["curve"]], "o-",
                      label=f"seed {cell.seed}")
        axes.set(xlabel="epochs", ylabel="exact match on held-out prompts", ylim=(0, 1))
        axes.legend()

    study.plot(directory / "epochs.png", draw)
    return study.write_table(directory / "epochs.md", ["epochs", "exact match", "unfinished"], rows)


if __name__ == "__main__":
    study.main(__doc__, CELLS, report)
