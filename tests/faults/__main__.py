"""Injects every known fault and writes a table of faults and outcomes.

Example:
  python -m tests.faults --output=faults.md
  python -m tests.faults --quick

The full set kills a training run 50 times and takes about half an hour on two cores; `--quick` takes 8 minutes.
"""

import argparse
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

from tests.faults import kills, leaving, long_run, programs, removed, signals, storage

# Faults that need no separate process: these tests, with many examples in the full set.
IN_PROCESS = {
    "numbers: NaN, infinity, spikes; halt, skip, rollback": ["tests/training/test_faults.py"],
    "checkpoints: flipped bits, truncated, missing and half-copied": ["tests/training/test_damage.py"],
    "token shards: flipped bits, truncated, missing": ["tests/data/test_shards.py"],
    "foreign checkpoints: headers, indices, links": ["tests/interop/test_malformed_checkpoints.py"],
    "files that run code or claim to be large": ["tests/test_untrusted_files.py"],
    "directories, FIFOs and devices as files, deep and large JSON, half a line": [
        "tests/test_files.py", "tests/training/test_workdir.py"],
    "control characters on a terminal": ["tests/test_console.py"],
    "fuzz: texts, configs, JSONL, templates, headers, manifests": [
        "tests/fuzz", "tests/data/test_tokenizers.py", "tests/data/test_chat.py", "tests/data/test_pipeline.py"],
    "programs that try to escape from the sandbox": ["tests/evaluation/test_sandbox.py"],
}


_MIB_PER_10_000_STEPS = 1.0


class Table:
    """Faults and outcomes, printed as they arrive."""

    def __init__(self):
        self._started = time.monotonic()
        self.rows: list[str] = ["| fault | tried | outcome | seconds |", "|---|---|---|---|"]
        self.failures: list[str] = []
        print("\n".join(self.rows), flush=True)

    def add(self, fault: str, tried: int | str, wrong: list[str], outcome: str = "") -> None:
        """Adds a row; `wrong` lists the failures, `outcome` describes a success."""
        seconds, self._started = time.monotonic() - self._started, time.monotonic()
        self.failures += [f"{fault}: {text}" for text in wrong]
        self.rows.append(f"| {fault} | {tried} | {f'{len(wrong)} FAILED' if wrong else outcome} | {seconds:.0f} |")
        print(self.rows[-1], flush=True)


def inject(directory: pathlib.Path, quick: bool) -> Table:
    """Injects all faults, in a new directory."""
    table = Table()
    programs.write_text(directory / "text")
    steps = 300 if quick else 1500
    whole = [f"--config.train.steps={steps}"]
    programs.must(programs.train_command(directory, directory / "whole", *whole))
    programs.must(programs.train_command(directory, directory / "twin", *whole))
    wrong = kills.differences(directory / "whole", directory / "twin")
    table.add("two runs of the same config", 2, wrong, "the same metrics and arrays, bit for bit")
    programs.must(programs.train_command(directory, directory / "short", *storage.SHORT))

    for name, count, moments in (("killed", 6 if quick else 20, kills.MOMENTS),
                                 ("killed-evaluating", 2 if quick else 30, ("evaluation",)),
                                 ("killed-saving", 2 if quick else 10, (kills.TWO_SAVES,))):
        if kills.TWO_SAVES in moments and not storage.can_trace():
            table.add("kill -9 with two saves on a slow disk", 0, [], "not permitted here, or no strace")
            continue
        killed, wrong = kills.killed_training(directory / "whole", directory / name, count, directory, whole, moments)
        done = ", ".join(f"{count} in {moment}" for moment, count in killed.items())
        table.add("kill -9 while training", f"{sum(killed.values())} ({done})", wrong,
                  "each restart resumed; final metrics and arrays equal those of the unkilled run bit for bit")
    count, wrong = kills.killed_preparation(directory, 4 if quick else 20)
    table.add("kill -9 while preparing", count, wrong, "the same corpus, byte for byte")

    for number in (signal.SIGTERM, signal.SIGINT):
        wrong = signals.told_to_stop(directory, directory / number.name, number)
        table.add(number.name, 1, [wrong] if wrong else [], "saved, exit code 75, no step lost")
    wrong = signals.second_trainer(directory, directory / "locked")
    table.add("a second trainer", 1, [wrong] if wrong else [], "refused with exit code 2; the first continues")

    results = storage.in_namespace(directory, 1 if quick else 8)
    if results is None:
        table.add("a small file system", 0, [], "not permitted here")
    unreliable = storage.unreliable(directory, 1 if quick else 8)
    if unreliable is None:
        table.add("writes that fail or are slow", 0, [], "not permitted here, or no strace")
    for fault, wrong in (results or []) + (unreliable or []) + storage.limited_files(directory, 1 if quick else 3):
        table.add(fault, 1, [wrong] if wrong else [], "one line, exit code 2, or no effect; then finishes")
    for name, wrong in removed.removed(directory):
        table.add(f"removed during a run: {name}", 1, [wrong] if wrong else [],
                  "one line, exit code 2, all written again; then finishes like the undisturbed run, bit for bit")
    for cause, processes, wrong, outcome in leaving.causes(directory):
        table.add(f"time to leave after an error: {cause}", f"{processes} process{'es' * (processes > 1)}",
                  [wrong] if wrong else [], outcome)
    if not quick:
        _memory(table, directory)
    for fault, files in IN_PROCESS.items():
        if not quick:  # the test suite runs them
            _pytest(table, fault, files)
    return table


def _memory(table: Table, directory: pathlib.Path) -> None:
    """Adds the growth of memory over a long run with and without saves, and over many prompts."""
    steps, slopes = 30_000, {}
    for save_every in (1000, steps):
        samples, _ = long_run.watch(directory, steps, save_every)
        slopes[save_every], error = long_run.growth(samples, steps)
        wrong = [] if slopes[save_every] <= _MIB_PER_10_000_STEPS else ["more than 1 MiB"]
        table.add(f"memory over {steps:,} steps with saves every {save_every:,}", 1, wrong,
                  f"{slopes[save_every]:+.2f} ± {error:.2f} MiB per 10,000 steps after the first tenth")
    table.add("memory of a save", 1, [], f"{(slopes[1000] - slopes[steps]) / 10 * 1024:.0f} KiB")
    result = json.loads(programs.must([sys.executable, "-m", "tests.faults.many_prompts"]).splitlines()[-1])
    later = np.array([sample for sample in result["samples"] if sample[0] >= 500])
    grown = later[-1] - later[0]
    shapes, most = result["shapes"], result["most"]
    wrong = [f"grows by {grown[1]:.1f} MiB, {grown[2]:.0f} compilations"] if grown[1] > 1 or grown[2] else []
    wrong += [f"{len(shapes)} programs of the decoding loop, more than {most}"] if len(shapes) > most else []
    table.add("memory over 2,000 prompts of random lengths", 1, wrong,
              f"{grown[1]:+.2f} MiB and no compilation after the first 500; {later[-1][2]:.0f} compilations before, "
              f"{len(shapes)} of them (at most {most}) of the decoding loop: {', '.join(shapes)}")


def _pytest(table: Table, fault: str, files: list[str]) -> None:
    environment = {**os.environ, "HYPOTHESIS_PROFILE": "many"}
    result = subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", "0", "--hypothesis-show-statistics", *files],
                            cwd=programs.ROOT, env=environment, capture_output=True, text=True)
    passed = re.search(r"(\d+) passed", result.stdout)
    examples = sum(map(int, re.findall(r"(\d+) passing", result.stdout)))
    wrong = [] if result.returncode == 0 else [result.stdout[-3000:]]
    table.add(fault, f"{passed.group(1) if passed else 0} tests" + (f", {examples:,} examples" if examples else ""),
              wrong, "refused with the name of the file, or no effect")


def main() -> int:
    """Injects all faults and reports; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="inject each fault a few times only")
    parser.add_argument("--output", type=pathlib.Path, help="Markdown file for the table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        table = inject(pathlib.Path(directory), arguments.quick)
    if arguments.output:
        arguments.output.write_text("\n".join(table.rows) + "\n")
    for failure in table.failures:
        print(f"\nFAILED {failure}", file=sys.stderr)
    return 1 if table.failures else 0


if __name__ == "__main__":
    sys.exit(main())
