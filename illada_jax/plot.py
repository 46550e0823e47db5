"""Plots the metrics of training runs: one panel per quantity, with all runs in it.

    python -m illada_jax.plot workdirs/quickstart
    python -m illada_jax.plot workdirs/run1 workdirs/run2 --figure=runs.svg

Loss, bound on held-out text, accuracy over the masking probability, learning rate, tokens per second; quantities that
no run recorded are omitted. Needs `pip install 'illada_jax[plot]'`.
"""

import collections
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags
from etils import epath

from illada_jax import cli
from illada_jax.errors import InputError
from illada_jax.training.metrics import curves_over_p, read_lines

FIGURE = flags.DEFINE_string("figure", "plot.png", "file to write: .png, .svg or .pdf")
SUFFIXES = (".png", ".svg", ".pdf")
# Metric → title of its panel. The x-axis is the step.
PANELS = {
    "train/loss": "training loss (nats per token)",
    "eval/bits_per_byte": "held-out bound (bits per byte)",
    "eval/exact_match": "held-out exact match",
    "train/learning_rate": "learning rate",
    "train/tokens_per_second": "training tokens per second",
}
LAST_LINES = 20  # averaged in the curve over p: a single line is noisy


def main(argv: list[str]) -> None:
    """Plots the runs of the workdirs."""
    output = pathlib.Path(FIGURE.value)
    if output.suffix not in SUFFIXES:
        raise InputError(f"--figure={output}: the suffix must be {', '.join(SUFFIXES)}")
    if not output.parent.is_dir():
        raise InputError(f"--figure={output}: the directory {output.parent} does not exist")
    if len(argv) < 2:
        raise InputError("name at least one workdir, for example: python -m illada_jax.plot workdirs/quickstart")
    runs = {workdir: read_lines(epath.Path(workdir)) for workdir in argv[1:]}
    for workdir, lines in runs.items():
        if not lines:
            raise InputError(f"{workdir}: contains no metrics.jsonl of a run")
    draw(runs, output)
    print(f"wrote {output}")


def series(lines: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a metric, from the lines that have it."""
    points = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
    return [step for step, _ in points], [value for _, value in points]


def accuracy_over_p(lines: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """(masking probabilities, accuracies on masked tokens), averaged over the last lines that have them."""
    correct, masked = collections.Counter(), collections.Counter()
    for line in [line for line in lines if "train/loss" in line][-LAST_LINES:]:
        for p, (count, _, accuracy) in curves_over_p(line).items():
            masked[p] += count
            correct[p] += count * accuracy
    ps = sorted(masked)
    return ps, [correct[p] / masked[p] for p in ps]


def draw(runs: dict[str, list[dict[str, Any]]], output: pathlib.Path) -> None:
    """Plots the runs into a file. Raises InputError if matplotlib is missing, or the file cannot be written."""
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("plots need matplotlib: pip install 'illada_jax[plot]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [("steps", label, {run: series(lines, name) for run, lines in runs.items()})
              for name, label in PANELS.items()]
    panels.insert(2, ("masking probability", "accuracy on masked tokens",
                      {run: accuracy_over_p(lines) for run, lines in runs.items()}))
    panels = [panel for panel in panels if any(x for x, _ in panel[2].values())]
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(4.4 * columns, 3.2 * rows), squeeze=False)
    for axes, (x_label, label, curves) in zip(grid.flat, panels, strict=False):
        for run, (x, y) in curves.items():
            axes.plot(x, y, ".-" if len(x) < 40 else "-", linewidth=1.2, label=run)
        axes.set(xlabel=x_label, title=label)
        axes.title.set_size("medium")
        axes.grid(alpha=0.25)
        values = np.concatenate([y for _, y in curves.values()])
        if label.startswith("training loss") and values.min() > 0 and values.max() / values.min() > 20:
            axes.set_yscale("log")
    for axes in grid.flat[len(panels):]:
        axes.set_axis_off()
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="lower center", ncols=2, frameon=False)
    figure.tight_layout(rect=(0, 0.02 + 0.03 * -(-len(runs) // 2), 1, 1))
    try:
        figure.savefig(output, dpi=140)
    except OSError as error:
        raise InputError(f"--figure={output}: {error.strerror or error}") from error
    plt.close(figure)


if __name__ == "__main__":
    cli.run(main, positional=True)
