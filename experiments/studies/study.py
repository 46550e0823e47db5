"""Shared code of the studies: cells (a training run and its decoded answers), saved as JSON, and tables of means.

All cells start from one base model, as fine-tuning starts from a pre-trained one. It is trained on other examples of
the same tasks, in iLLaDA's windows. Evaluation prompts are held out from the base and from the cells, as the split
depends on their hash.

A cell is trained for a number of steps, not for a time, so that it gives the same figures on any machine; times are
recorded too. A finished cell is a file in the results directory and is not run again: the same command continues an
interrupted study. Studies share the directory, and so the cells that they have in common.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from illada_jax import config as config_lib
from illada_jax import model
from illada_jax.config import Config, DecodeConfig
from illada_jax.data.pipeline import Batches
from illada_jax.data.shards import Question
from illada_jax.data.tokenizers import Tokenizer
from illada_jax.decoding import Decoder, SpecialIds
from illada_jax.interop import load_model
from illada_jax.parallel.mesh import make_mesh
from illada_jax.training.loop import RunSetup, train
from illada_jax.training.run import open_data

SEEDS = (0, 1, 2)
EPOCHS = 12
QUESTIONS = 32  # of each task
HELDOUT = 0.06
LEARNING_RATE = 0.001
BLOCK = 16
CANVAS = 128
ROW = CANVAS + 32  # no prompt is longer than 32
BASE_TASKS = ("tasks:reverse:20000:1", "tasks:sort:20000:1", "tasks:last:10000:1",
              *(f"tasks:down:800:{seed}" for seed in range(1, 6)))
TASKS = ("tasks:reverse:400", "tasks:sort:400", "tasks:last:400", "tasks:down:400")

# Settings of the decoder: one token a step in all of them.
DECODINGS = {
    "variable": DecodeConfig(length="variable", max_new_tokens=CANVAS, block_length=BLOCK, steps_per_block=BLOCK),
    "canvas": DecodeConfig(length="fixed", max_new_tokens=CANVAS, block_length=CANVAS, steps_per_block=CANVAS),
    "canvas in blocks": DecodeConfig(length="fixed", max_new_tokens=CANVAS, block_length=BLOCK, steps_per_block=BLOCK),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
      format: of the examples, `illada` or `llada`.
      split: share of the windows that are split.
      isolate: examples in a window do not attend to each other.
      seed: for parameters, order, times and masks.
    """

    format: str = "illada"
    split: float = 0.3
    isolate: bool = False
    seed: int = 0

    @property
    def name(self) -> str:
        """The name of its file."""
        if self.format == "llada":
            return f"llada_seed{self.seed}"
        return f"illada_split{self.split}{'_isolated' if self.isolate else ''}_seed{self.seed}"


def base_configs(directory: pathlib.Path) -> dict[str, Config]:
    """Configs of the two training stages of the base model, by name of the workdir.

    The first masks answers only, which teaches the tasks quickly; the second masks everything, as iLLaDA does. Half of
    the rows end anywhere, like LLaDA's of random length: otherwise the next prompt is always visible, and the model
    infers the end of an answer from it.
    """
    c = _quickstart()
    c.data.sources = BASE_TASKS
    c.data.heldout_fraction = HELDOUT
    c.data.cache_dir = str(directory / "cache")
    c.data.length, c.data.batch_size = 128, 8
    c.sft.format = "illada"
    c.sft.mask_prompts = False
    c.diffusion.split_probability = 0.3
    c.train.epochs = 5
    c.train.tensorboard = False
    c.eval.every_epochs = 5.0
    c.checkpoint.every = 500
    answers = config_lib.from_config_dict(c)
    c.init.checkpoint = str(directory / "base_answers")
    c.data.batch_size = 16
    c.sft.mask_prompts = True
    c.optimizer.learning_rate = c.optimizer.adam_learning_rate = 0.005
    c.train.epochs = 3
    c.eval.every_epochs = 3.0
    return {"base_answers": answers, "base": config_lib.from_config_dict(c)}


def _quickstart() -> ml_collections.ConfigDict:
    path = pathlib.Path(__file__).parent.parent / "sft_quickstart.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def train_base(directory: pathlib.Path) -> None:
    """Trains the base model, or continues."""
    for name, expected in base_configs(directory).items():
        config, examples, batches = open_data(expected)
        last = config.train.stop_step or config.train.steps
        if not (directory / name / "checkpoints" / str(last)).is_dir():
            print(f"the base model: {name}", flush=True)
            outcome = train(RunSetup(config, epath.Path(directory) / name, make_mesh(config.mesh), batches,
                                     examples.tokenizer, {}))
            if outcome.step < last:
                sys.exit("stopped while training the base model: the same command continues")


def config_of(cell: Cell, directory: pathlib.Path, steps: int = 0) -> Config:
    """Config that fine-tunes the base model for 12 epochs, or for `steps` steps, with the paper's schedule."""
    c = _quickstart()
    c.seed = cell.seed
    c.init.checkpoint = str(directory / "base")
    c.data.sources = TASKS
    c.data.heldout_fraction = HELDOUT
    c.data.cache_dir = str(directory / "cache")
    c.data.isolate_documents = cell.isolate
    c.data.random_length_probability = 0.0
    c.sft.format = cell.format
    if cell.format == "illada":
        c.data.length, c.data.batch_size = 128, 8
    else:  # all rows as long as the decoder's canvas: the model fails at lengths that it was not trained on
        c.data.length, c.data.batch_size, c.sft.bucket = ROW, 8, ROW
    c.diffusion.split_probability = cell.split if cell.format == "illada" else 0.0
    c.optimizer.learning_rate = c.optimizer.adam_learning_rate = LEARNING_RATE
    c.optimizer.final_learning_rate = LEARNING_RATE / 10
    c.optimizer.decay_fraction = 0.1
    c.train.log_every = 100
    c.train.steps, c.train.epochs = steps, 0 if steps else EPOCHS
    c.train.tensorboard = False
    c.eval.every, c.eval.every_epochs = max(1, -(-steps // 4)), 0.0 if steps else EPOCHS / 4
    c.checkpoint.every = 10**6
    return config_lib.from_config_dict(c)


def run(cell: Cell, directory: pathlib.Path) -> dict[str, Any]:
    """Trains a cell and decodes held-out prompts with every decoding."""
    config, examples, batches = open_data(config_of(cell, directory, 0 if cell.format == "illada" else 10**6))
    if cell.format == "llada":
        # The same compute, padding included, as 12 epochs of windows, which is fewer epochs.
        windows = open_data(config_of(dataclasses.replace(cell, format="illada"), directory))[2]
        steps = _steps_within(batches, windows.num_steps * windows.units_per_step)
        config, examples, batches = open_data(config_of(cell, directory, steps))
    mesh = make_mesh(config.mesh)
    asked = questions(directory)
    curve: list[dict[str, float]] = []

    def evaluate(params: Any, step: int) -> dict[str, float]:
        found = decode(config, examples.tokenizer, params, DECODINGS["variable"], asked, timed=False)
        curve.append({"step": step, "epoch": next(iter(batches.epochs(step).values())), **found})
        return {"eval/exact_match": found["exact_match"]}

    followed = cell in [Cell(seed=seed) for seed in SEEDS]  # they give the curve of the epochs study
    if followed:
        evaluate(load_model(config.init.checkpoint, "float32", mesh).params, 0)
    started, cpu_started = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as workdir:
        outcome = train(RunSetup(config, epath.Path(workdir) / "run", mesh, batches, examples.tokenizer,
                                 {"curve": evaluate} if followed else {}))
    if outcome.status != "finished":
        sys.exit(f"stopped in cell {cell.name}: the same command starts it again")
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    decoded = {}
    for name, settings in DECODINGS.items():
        if cell.format == "llada" or name == "variable":
            decoded[name] = decode(config, examples.tokenizer, outcome.state.params, settings, asked, timed=True)
    epochs = next(iter(batches.epochs(outcome.step).values()))
    return {"cell": dataclasses.asdict(cell), "questions": len(asked), "steps": outcome.step, "epochs": epochs,
            "parameters": model.num_params(config.model), "training_seconds": seconds,
            "training_processor_seconds": cpu_seconds, "curve": curve, "decoded": decoded}


def _steps_within(batches: Batches, tokens: int) -> int:
    computed = step = 0
    while computed < tokens:
        computed += batches.rows(step, range(batches.units_per_step)).tokens_BL.size
        step += 1
    return step


def questions(directory: pathlib.Path) -> list[tuple[str, Question]]:
    """Held-out examples of the base model with the names of their tasks, QUESTIONS of each, interleaved."""
    _, examples, _ = open_data(base_configs(directory)["base"])
    heldout = examples.heldout
    names = np.array([spec.split(":")[1] for spec in examples.sources])[heldout.sources_N]
    chosen = [np.flatnonzero(names == name)[:QUESTIONS] for name in dict.fromkeys(names)]
    return [(names[index], heldout.question(index)) for turn in zip(*chosen, strict=True) for index in turn]


def decode(config: Config, tokenizer: Tokenizer, params: Any, settings: DecodeConfig, asked: list[tuple[str, Question]],
           timed: bool) -> dict[str, Any]:
    """Exact match and cost of decoding held-out prompts."""
    names, questions = zip(*asked, strict=True)
    settings = dataclasses.replace(settings, batch_size=32)
    logits_fn = model.make_logits_fn(config.model, params)
    decoder = Decoder(logits_fn, settings, SpecialIds.of(tokenizer), config.model.max_length)
    results = decoder.generate([question.prompt for question in questions])
    right = [result.tokens == question.answer for result, question in zip(results, questions, strict=True)]
    ended = [result.stopped_by == "eos" for result in results]
    longer = [len(result.tokens) > len(question.answer) for result, question in zip(results, questions, strict=True)]
    tokens = [computed_tokens(settings, len(question.prompt), result.nfe)
              for result, question in zip(results, questions, strict=True)]
    found = {
        "exact_match": float(np.mean(right)),
        "by_task": {name: float(np.mean([r for r, n in zip(right, names, strict=True) if n == name]))
                    for name in dict.fromkeys(names)},
        "unfinished": 1 - float(np.mean(ended)),
        "too_long": float(np.mean(longer)),
        "evaluations": float(np.mean([result.nfe for result in results])),
        "tokens": float(np.mean(tokens)),
        "answer_length": float(np.mean([len(question.answer) for question in questions])),
        "longest_answer": max(len(question.answer) for question in questions),
    }
    if timed:  # a second time, with everything compiled
        again = [question.prompt for question in questions[: settings.batch_size]]
        started, cpu_started = time.perf_counter(), time.process_time()
        decoder.generate(again)
        found["seconds"] = (time.perf_counter() - started) / len(again)
        found["processor_seconds"] = (time.process_time() - cpu_started) / len(again)
    return found


def computed_tokens(settings: DecodeConfig, prompt_length: int, evaluations: int) -> int:
    """Tokens computed for an answer: the length of its canvas, summed over the evaluations."""
    if settings.length == "fixed":
        return evaluations * (prompt_length + settings.max_new_tokens)
    total, left, length = 0, evaluations, prompt_length
    while left > 0:
        length += settings.block_length
        total += min(left, settings.steps_per_block) * length
        left -= settings.steps_per_block
    return total


def main(doc: str, cells: Sequence[Cell], report: Callable[[dict[Cell, dict], pathlib.Path], str]) -> None:
    """Runs the missing cells of a study, writes and prints its table."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path("workdirs/studies"),
                        help="directory for cells, tables and plots (default: %(default)s)")
    parser.add_argument("--cells", type=int, default=len(cells),
                        help="maximum number of missing cells to run before the report")
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(arguments.results.absolute() / "compiled"))
    missing = [cell for cell in cells if not (arguments.results / f"{cell.name}.json").exists()]
    if missing[: arguments.cells]:
        train_base(arguments.results)
    for number, cell in enumerate(missing[: arguments.cells], start=1):
        print(f"cell {cell.name} ({number} of {len(missing)} missing)", flush=True)
        result = run(cell, arguments.results)
        unfinished = arguments.results / f"{cell.name}.json.partial"
        unfinished.write_text(json.dumps(result, indent=1))
        shutil.move(unfinished, arguments.results / f"{cell.name}.json")
        jax.clear_caches()
    done = {cell: json.loads((arguments.results / f"{cell.name}.json").read_text()) for cell in cells
            if (arguments.results / f"{cell.name}.json").exists()}
    if len(done) < len(cells):
        print(f"{len(done)} of {len(cells)} cells are finished: the same command runs the rest")
    if done:
        print(report(done, arguments.results))


def spread(values: Sequence[float]) -> str:
    """Mean ± standard error over seeds, or the value of a single seed."""
    digits = 3 if max(values) < 10 else 0
    if len(values) == 1:
        return f"{values[0]:,.{digits}f} (1 seed)"
    return f"{np.mean(values):,.{digits}f} ± {np.std(values, ddof=1) / math.sqrt(len(values)):,.{digits}f}"


def write_table(path: pathlib.Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, written to a file and returned."""
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    path.write_text(text + "\n")
    return text


def plot(path: pathlib.Path, draw: Callable[[Any], None]) -> None:
    """Draws into a file, or says that matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print(f"no {path.name}: plots need matplotlib (pip install 'illada_jax[plot]')")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    draw(axes)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
