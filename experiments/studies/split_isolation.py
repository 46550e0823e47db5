"""Effect of splitting windows, and of isolating the examples of a window from each other, in fine-tuning.

    python experiments/studies/split_isolation.py

Six settings, three seeds, 12 epochs each in iLLaDA's format, decoded with variable length. The paper splits 30 % of the
windows and does not say whether examples in a window attend to each other. 18 cells of about 2 minutes on one core,
three of them shared with variable_length.py.
"""

import pathlib

import study
from study import SEEDS, Cell

SETTINGS = [(split, isolate) for isolate in (False, True) for split in (0.3, 0.0, 0.6)]
CELLS = [Cell(split=split, isolate=isolate, seed=seed) for seed in SEEDS for split, isolate in SETTINGS]


def report(done: dict[Cell, dict], directory: pathlib.Path) -> str:
    """Exact match and how answers end, by setting."""
    groups = {setting: [result["decoded"]["variable"] for cell, result in done.items()
                        if (cell.split, cell.isolate) == setting] for setting in sorted(SETTINGS)}
    groups = {setting: results for setting, results in groups.items() if results}
    rows = [[str(split), "yes" if isolate else "no", str(len(results)),
             *(study.spread([result[key] for result in results])
               for key in ("exact_match", "unfinished", "too_long", "tokens"))]
            for (split, isolate), results in groups.items()]

    def draw(axes):
        for isolate in (False, True):
            chosen = {split: results for (split, isolated), results in groups.items() if isolated == isolate}
            points = [(split, result["exact_match"]) for split, results in chosen.items() for result in results]
            axes.plot(*zip(*points, strict=True), "os"[isolate], label="isolated" if isolate else "not isolated")
        axes.set(xlabel="share of split windows", ylabel="exact match on held-out prompts")
        axes.legend()

    study.plot(directory / "split_isolation.png", draw)
    return study.write_table(
        directory / "split_isolation.md",
        ["split", "isolated", "seeds", "exact match", "unfinished", "longer than right", "tokens computed"], rows)


if __name__ == "__main__":
    study.main(__doc__, CELLS, report)
