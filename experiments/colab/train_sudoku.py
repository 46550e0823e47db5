# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     gpuType: V5E1
#     provenance: []
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train a diffusion language model to solve sudoku
#
# A 4 × 4 sudoku is a text: `1.3..4..2..3.3.1=1234…`, sixteen cells of the puzzle, `=`, sixteen cells of its solution.
# A small model learns it like any other text, by filling in masks. It is not told the rules. Then it solves puzzles of
# grids that it has never seen, and the order in which it writes matters much.
#
# By default this notebook trains for fewer steps than `experiments/sudoku.py`, to finish in two or three minutes on a
# CPU. Set `STEPS = 440` for that whole run and a better model.

# %%
# @title Install: once, a minute or two
REPOSITORY = ""  # @param {type:"string"}

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

if importlib.util.find_spec("illada_jax") is None:
    checkout = pathlib.Path("../..").resolve()  # of the repository, if this notebook is in one
    source = REPOSITORY or (str(checkout) if (checkout / "illada_jax" / "api.py").is_file() else "")
    if not source:
        raise RuntimeError('illada_jax is not installed. Set REPOSITORY = "…" at the top of this cell to the address '
                           "of its git repository, or to a directory that holds a copy of it, and run the cell again.")
    devices = [*pathlib.Path("/dev").glob("accel*"), *pathlib.Path("/dev/vfio").glob("[0-9]*")]
    has_tpu = bool(devices) or "COLAB_TPU_ADDR" in os.environ
    extras = "plot,tpu" if has_tpu else "plot,cuda" if shutil.which("nvidia-smi") else "plot"
    if pathlib.Path(source).is_dir():
        package = f"{pathlib.Path(source).resolve()}[{extras}]"
    else:
        package = f"illada_jax[{extras}] @ git+{source.removeprefix('git+')}"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package], check=True)
    importlib.invalidate_caches()  # makes the new packages importable

import jax

print(f"illada_jax runs on {jax.default_backend()}: {jax.devices()}")

# %%
# @title Settings
STEPS = 260  # @param {type:"integer"}
WORKDIR = "workdirs/sudoku_notebook"  # @param {type:"string"}

# %% [markdown]
# ## The config
#
# Every field has a default, and `illada_jax/config.py` documents each. These are the settings of
# `experiments/sudoku.py`, except the number of steps and of evaluations: 0.8 M parameters, bytes as tokens, a sixth of
# the grids held out.

# %%
import itertools

import matplotlib.pyplot as plt
import numpy as np
from etils import epath

from illada_jax import config as config_lib

plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})

c = config_lib.defaults()
c.data.sources = ("sudoku",)
c.data.tokenizer = "bytes"
c.data.heldout_fraction = 1 / 6  # of the 288 grids
c.data.length = 34
c.data.batch_size = 64

c.model.vocab_size = 264
c.model.d_model = 128
c.model.num_layers = 4
c.model.num_heads = 4
c.model.num_kv_heads = 2
c.model.head_dim = 32
c.model.d_ff = 384
c.model.max_length = 64
c.model.scan_unroll = 0

c.optimizer.name = "muon"
c.optimizer.learning_rate = 0.01
c.optimizer.adam_learning_rate = 0.01
c.optimizer.weight_decay = 0.0
c.optimizer.warmup_steps = min(50, STEPS // 5)
c.optimizer.decay_steps = int(0.7 * STEPS)
c.train.steps = STEPS
c.train.log_every = 10
c.train.plateau_window = 0
c.train.tensorboard = False
c.checkpoint.every = STEPS

# The answer and its EOS are one block: with 17 steps, one token per step.
c.decode.max_new_tokens = 17
c.decode.block_length = 17
c.decode.steps_per_block = 17
c.decode.batch_size = 64
c.eval.every = max(1, STEPS // 5)
config = config_lib.from_config_dict(c)

# %% [markdown]
# ## Train
#
# The steps of `python -m illada_jax.main --config=experiments/sudoku.py` in Python: open the data, make a mesh of all
# devices, define the evaluators, train. The workdir holds metrics and checkpoints: run the cell again after an
# interruption, and training continues.
#
# An evaluator is any function of (params, step) that returns numbers or texts by name. This one counts how many of 64
# held-out puzzles are solved, and records the answer to one of them.

# %%
from illada_jax.api import LanguageModel
from illada_jax.parallel.mesh import make_mesh
from illada_jax.training.loop import RunSetup, train
from illada_jax.training.run import open_data

mesh = make_mesh(config.mesh)
config, corpus, batches = open_data(config)
heldout = [corpus.tokenizer.decode(corpus.heldout.document(i)) for i in range(corpus.heldout.num_documents)]
PUZZLES = [text.partition("=") for text in heldout[:64]]
puzzle, _, solution = max(PUZZLES, key=lambda parts: parts[0].count("."))  # the one with the fewest given digits
print(f"{corpus.train.num_documents:,} puzzles to train on, {len(heldout):,} of other grids held out; one of them: "
      f"{puzzle}={solution}")


def solve(params, step):
    """The share of solved puzzles, and the answer to one of them."""
    lm = LanguageModel(config, params, corpus.tokenizer, mesh)
    answers = [result.text for result in lm.generate([f"{text}=" for text, _, _ in PUZZLES])]
    right = [answer == expected for answer, (_, _, expected) in zip(answers, PUZZLES, strict=True)]
    return {"eval/solved": float(np.mean(right)), "eval/one_puzzle": answers[PUZZLES.index((puzzle, "=", solution))]}


outcome = train(RunSetup(config, epath.Path(WORKDIR), mesh, batches, corpus.tokenizer, {"solve": solve}))
print(f"{outcome.status} at step {outcome.step}, with {outcome.final['eval/solved']:.2f} of the puzzles solved")

# %%
from illada_jax.training.metrics import read_lines

lines = read_lines(epath.Path(WORKDIR))
loss = [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]
solved = [(line["step"], line["eval/solved"]) for line in lines if "eval/solved" in line]
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
left.plot(*zip(*loss, strict=True), color="C0")
left.set(xlabel="step", ylabel="nats per token", title="training loss", ylim=(0, None))
step, share = np.array(solved).T
right.errorbar(step, share, np.sqrt(share * (1 - share) / len(PUZZLES)), fmt="o-", capsize=3, color="C2")
right.set(xlabel="step", ylabel="share", ylim=(-0.03, 1.03), title="held-out puzzles solved")
for axes in (left, right):
    axes.grid(alpha=0.3)
    axes.set_xlim(0, STEPS * 1.02)
plt.show()

# %% [markdown]
# ## Watch it learn
#
# The same held-out puzzle at every evaluation. Given digits are black, right ones green, wrong ones red.


# %%
def draw_grid(axes, cells, colours, title="", shades=None):
    """A 4 × 4 grid: one character, one colour and perhaps one background a cell."""
    axes.set(xlim=(0, 4), ylim=(4, 0), aspect="equal", xticks=[], yticks=[])
    axes.set_title(title, fontsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for cell, (character, colour) in enumerate(zip(cells, colours, strict=True)):
        row, column = divmod(cell, 4)
        if shades is not None:
            axes.add_patch(plt.Rectangle((column, row), 1, 1, color=shades[cell], linewidth=0))
        axes.text(column + 0.5, row + 0.52, character, color=colour, ha="center", va="center", fontsize=13)
    for line in range(5):
        width = 1.6 if line % 2 == 0 else 0.5
        axes.plot([0, 4], [line, line], color="black", linewidth=width, clip_on=False)
        axes.plot([line, line], [0, 4], color="black", linewidth=width, clip_on=False)


def judged(answer):
    """A colour for each cell of an answer."""
    return ["black" if given == cell else "#2a8a2a" if cell == right else "#d62728"
            for given, cell, right in zip(puzzle, answer, solution, strict=True)]


answers = [(line["step"], line["eval/one_puzzle"]) for line in lines if "eval/one_puzzle" in line]
figure, panels = plt.subplots(1, len(answers) + 1, figsize=(1.9 * (len(answers) + 1), 2.2), layout="constrained")
draw_grid(panels[0], puzzle.replace(".", " "), ["black"] * 16, "the puzzle")
for axes, (step, text) in zip(panels[1:], answers, strict=True):
    answer = text[:16].ljust(16, "?")
    draw_grid(axes, answer, judged(answer), f"step {step}")
plt.show()

# %% [markdown]
# ## Watch it solve
#
# The answer is one block of 17 masks, sixteen digits and EOS, and each step reveals the token that the model is most
# confident of. The darker an empty cell, the more confident the model; red is the digit of this step, given digits are
# black, found ones blue. EOS has no cell: the step that reveals it changes nothing here. The model begins with the easy
# cells, given digits above all, and leaves those that depend on others for the end.

# %%
from illada_jax import tracing

lm = LanguageModel(config, outcome.state.eval_params, corpus.tokenizer, mesh)
result = lm.generate([puzzle + "="])[0]
trace = tracing.make_trace(lm, result, title=puzzle, num_candidates=1)
start = len(puzzle) + 1
written_at = np.array(trace.written_at)[start : start + 16]
columns = 6
figure, panels = plt.subplots(3, columns, figsize=(1.75 * columns, 6.1), layout="constrained")
greens = plt.get_cmap("Greens")
for step, axes in enumerate(panels.flat):
    if step > trace.num_steps:
        axes.set_axis_off()
        continue
    candidates = trace.candidates[step] if step < trace.num_steps else {}
    cells, colours, shades = [], [], []
    for cell in range(16):
        at = written_at[cell]
        cells.append(trace.pieces[start + cell] if at < step else "")
        colours.append("#d62728" if at == step - 1 else "black" if puzzle[cell] != "." else "#1f5ab4")
        best = candidates.get(start + cell)
        shades.append(greens(0.75 * best[0].probability) if best else "white")
    draw_grid(axes, cells, colours, f"after step {step}" if step else "all masks", shades)
plt.show()
verdict = "right" if result.text == solution else "wrong"
print(f"{puzzle} → {result.text}: {verdict}, {result.nfe} evaluations")

# %% [markdown]
# ## The order matters
#
# The same model, the same puzzles; only the order and the number of steps differ. *Most confident first* is the rule of
# iLLaDA and LLaDA. *Random* writes the most probable token too, but at random positions: it must guess digits that are
# not yet determined, and a wrong one stays. With fewer steps, several tokens are revealed at once and do not see each
# other.

# %%
COUNT = 192
asked = [text.partition("=") for text in heldout[:COUNT]]
STEPS_PER_ANSWER = (17, 8, 4, 1)
orders = {"low_confidence": "most confident first", "random": "random"}
share = {}
for order, count in itertools.product(orders, STEPS_PER_ANSWER):
    results = lm.generate([f"{text}=" for text, _, _ in asked], confidence=order, steps_per_block=count)
    share[order, count] = np.mean([result.text == right for result, (_, _, right) in zip(results, asked, strict=True)])
    if (order, count) == ("low_confidence", 17):
        confident_first = results

figure, axes = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
for number, (order, name) in enumerate(orders.items()):
    mean = np.array([share[order, count] for count in STEPS_PER_ANSWER])
    axes.errorbar(STEPS_PER_ANSWER, mean, np.sqrt(mean * (1 - mean) / COUNT), fmt="os"[number] + "-", capsize=3,
                  color=("C2", "C3")[number], label=name)
axes.set(xlabel="steps per answer of 17 tokens", ylabel="puzzles solved exactly", ylim=(0, 1.03), xscale="log")
axes.set_xticks(STEPS_PER_ANSWER, STEPS_PER_ANSWER)
axes.minorticks_off()
axes.grid(alpha=0.3)
axes.legend(frameon=False)
plt.show()
for (order, count), mean in share.items():
    print(f"{orders[order]:20} {count:2} steps: {mean:.3f} ± {np.sqrt(mean * (1 - mean) / COUNT):.3f}")

# %% [markdown]
# Which cells does it reveal first? For every empty cell, count the digits that row, column and box of the puzzle leave
# possible. A person begins with the cells that have only one. Does the model, which was never told to?


# %%
def possible_digits(text, cell):
    """The number of digits that the given ones leave possible for an empty cell."""
    row, column = divmod(cell, 4)
    seen = {text[other] for other in range(16)
            if other // 4 == row or other % 4 == column
            or (other // 8, other % 4 // 2) == (row // 2, column // 2)}
    return 4 - len(seen - {"."})


steps_of = {}
for (text, _, _), result in zip(asked, confident_first, strict=True):
    for cell, at in enumerate(result.reveal_step[:16]):
        kind = possible_digits(text, cell) if text[cell] == "." else 0
        steps_of.setdefault(kind, []).append(at)
names = {0: "given", 1: "one digit\npossible", 2: "two", 3: "three", 4: "four"}
kinds = sorted(kind for kind in steps_of if len(steps_of[kind]) >= 50)
histogram = np.array([np.bincount(steps_of[kind], minlength=17) / len(steps_of[kind]) for kind in kinds])

figure, axes = plt.subplots(figsize=(7.5, 0.6 * len(kinds) + 1.4), layout="constrained")
image = axes.imshow(histogram, cmap="magma_r", vmin=0, aspect="auto")
for row, kind in enumerate(kinds):
    mean = np.mean(steps_of[kind])
    axes.plot(mean, row, "D", color="white", markeredgecolor="black", label="mean" if row == 0 else None)
axes.set_yticks(range(len(kinds)), [f"{names[kind]}" for kind in kinds])
axes.set(xlabel="step at which the cell is revealed", title="cells by the number of possible digits")
axes.legend(loc="upper right", fontsize=8)
figure.colorbar(image, label="share of the cells", format="{x:.0%}", ticks=np.arange(0, 1, 0.05))
plt.show()

# %% [markdown]
# Next: the workdir is a checkpoint like any other, for `illada_jax.load(WORKDIR)` and `python -m illada_jax.generate
# --checkpoint=…`. Change the config above and train again in another workdir: does a model of two layers learn it?
