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
# # Evaluate: confidence against likelihood
#
# Which of four answers does a diffusion language model prefer? Two ways to score an answer $y$ to a prompt $p$:
#
# - **Monte-Carlo likelihood** (LLaDA). Mask a random number of the answer's tokens at random positions, many times, and
#   average the network's weighted log-probabilities of them. It estimates a bound on $\log p(y \mid p)$: more draws,
#   less noise.
# - **Confidence-based scoring** (iLLaDA). Mask the whole answer. Reveal the token whose true value is most probable,
#   add its log-probability, evaluate again, and so on. It is deterministic, takes one evaluation per token, and is not
#   a likelihood.
#
# This notebook compares them on a toy: a model of two million parameters and questions that are made here. It shows the
# method; the numbers mean little.

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
import importlib
import inspect
import random
import re

import matplotlib.pyplot as plt
import numpy as np

import illada_jax

plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})
lm = illada_jax.load("demo")

# %% [markdown]
# ## One answer
#
# The end of a sentence, scored with several seeds. The Monte-Carlo estimate varies, and its standard error (from
# independent replicates of the draws) says by how much; with few draws the error itself is a rough estimate. The
# confidence score is one number. The two do not estimate the same quantity, so they may differ.

# %%
context, candidate = "If the file cannot be opened, an OSError", " is raised and the file is closed."
draws = (4, 16, 64, 256)
figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
for seed in range(4):
    estimates = [lm.score(context, [candidate], method="monte_carlo", mc_num=count, seed=seed)[0] for count in draws]
    shifted = np.array(draws) * 1.08 ** (seed - 1.5)  # apart on the axis
    axes.errorbar(shifted, [each.value for each in estimates], [each.stderr for each in estimates], fmt="o", capsize=3,
                  markersize=4, color="C0", label="" if seed else "Monte-Carlo, four seeds")
confidence = lm.score(context, [candidate], method="confidence")[0]
axes.axhline(confidence.value, color="C1", label="confidence")
axes.set(xscale="log", xlabel="draws", ylabel="score in nats", title=f"{context} …{candidate}")
axes.set_xticks(draws, draws)
axes.minorticks_off()
axes.grid(alpha=0.3)
axes.legend(frameon=False)
plt.show()
last = estimates[-1]
print(f"{last.length} tokens; confidence {confidence.value:.2f}, Monte-Carlo with {draws[-1]} draws {last.value:.2f} ± "
      f"{last.stderr:.2f}")

# %% [markdown]
# ## Questions
#
# A docstring of your Python's standard library is cut: its first 20 tokens are the context, the next 12 the right
# answer, and the same positions of three other docstrings the wrong ones. Chance is 0.25. All candidates have the same
# length, so scores need no normalisation. The model was trained on the prose of the documentation, which contains some
# of these sentences: this compares the methods and does not measure the model.

# %%
ITEMS = 120  # @param {type:"integer"}
MODULES = ("argparse", "asyncio", "collections", "configparser", "contextlib", "csv", "datetime", "difflib", "email",
           "enum", "functools", "inspect", "io", "json", "logging", "os", "pathlib", "random", "shutil", "socket",
           "statistics", "string", "subprocess", "tarfile", "tempfile", "threading", "typing", "unittest", "zipfile")
BEFORE, LENGTH, CHOICES = 20, 12, 4


def passages():
    """Paragraphs of plain prose from docstrings, each once."""
    found = {}
    for module in map(importlib.import_module, MODULES):
        owners = [each for _, each in inspect.getmembers(module) if inspect.isclass(each) or inspect.isroutine(each)]
        inner = [each for owner in owners if inspect.isclass(owner) for _, each in inspect.getmembers(owner)]
        for each in [*owners, *filter(inspect.isroutine, inner)]:
            for paragraph in re.split(r"\n\s*\n", inspect.getdoc(each) or ""):
                text = " ".join(paragraph.split())
                if re.fullmatch(r"[A-Z][\w ,.;'()-]*\.", text):
                    found[text] = None
    return list(found)


def make_items(texts, count):
    """(ids of the context, those of four candidates, the number of the right one), the same every time."""
    draw = random.Random(0)
    long = [ids for ids in map(lm.tokenizer.encode, texts) if len(ids) >= BEFORE + LENGTH]
    encoded = [ids for ids in long if lm.tokenizer.decode(ids[BEFORE:]).startswith(" ")]  # the answer starts a word
    chosen = draw.sample(encoded, min(count, len(encoded)))
    items = []
    for number, own in enumerate(chosen):
        others = draw.sample([other for index, other in enumerate(chosen) if index != number], CHOICES - 1)
        choices = [ids[BEFORE : BEFORE + LENGTH] for ids in (own, *others)]
        order = draw.sample(range(CHOICES), CHOICES)
        items.append((own[:BEFORE], [choices[index] for index in order], order.index(0)))
    return items


items = make_items(passages(), ITEMS)
context, choices, answer = items[0]
print(f"{len(items)} questions; the first:\n\n{lm.tokenizer.decode(context)} …")
for number, choice in enumerate(choices):
    print(f"  {'✓' if number == answer else ' '} …{lm.tokenizer.decode(choice)}")

# %% [markdown]
# ## Accuracy against evaluations
#
# The cost of a method is the number of network evaluations. Two settings make confidence scoring cheaper: it may reveal
# several tokens a step (an approximation), and `choose` stops candidates that can no longer win (the same choice as
# with one token a step). A row that two candidates share counts once.

# %%
METHODS = {
    "confidence": {"method": "confidence"},
    "confidence, 2 a step": {"method": "confidence", "tokens_per_step": 2},
    "confidence, 4 a step": {"method": "confidence", "tokens_per_step": 4},
    "confidence, choose": {"method": "confidence"},
    "Monte-Carlo, 1 draw": {"method": "monte_carlo", "mc_num": 1},
    "Monte-Carlo, 4 draws": {"method": "monte_carlo", "mc_num": 4},
    "Monte-Carlo, 16 draws": {"method": "monte_carlo", "mc_num": 16},
}
questions = [[(context, choice) for choice in choices] for context, choices, _ in items]
answers = np.array([answer for _, _, answer in items])
flat = [pair for pairs in questions for pair in pairs]

scores, right, cost = {}, {}, {}
for name, method in METHODS.items():
    scorer = lm.scorer(batch_size=64, **method)
    if name.endswith("choose"):
        chosen = np.array(scorer.choose(questions))
    else:
        scores[name] = np.array([score.value for score in scorer.score(flat)]).reshape(-1, CHOICES)
        chosen = scores[name].argmax(axis=1)
    right[name] = chosen == answers
    cost[name] = scorer.evaluator.evaluations / len(items)
    print(f"{name:22} {right[name].mean():.3f} ± {right[name].std(ddof=1) / np.sqrt(len(items)):.3f}   "
          f"{cost[name]:6.1f} evaluations a question")

# %%
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
groups = {"confidence": [name for name in METHODS if name.startswith("confidence") and "choose" not in name],
          "confidence, choose": ["confidence, choose"],
          "Monte-Carlo": [name for name in METHODS if name.startswith("Monte")]}
for (label, names), style, colour in zip(groups.items(), ("o-", "*", "s--"), ("C1", "C3", "C0"), strict=True):
    names = sorted(names, key=cost.get)
    mean = [right[name].mean() for name in names]
    error = [right[name].std(ddof=1) / np.sqrt(len(items)) for name in names]
    axes.errorbar([cost[name] for name in names], mean, error, fmt=style, color=colour, capsize=3, label=label,
                  markersize=11 if style == "*" else 6)
axes.axhline(1 / CHOICES, color="grey", linestyle=":", label="chance")
axes.set(xscale="log", xlabel="evaluations of the network for a question", ylabel="accuracy", ylim=(0, 1))
axes.set_xticks([4, 8, 16, 32, 64], [4, 8, 16, 32, 64])
axes.minorticks_off()
axes.grid(alpha=0.3)
axes.legend(frameon=False, ncols=2, loc="lower right")
plt.show()

# %% [markdown]
# The bars are standard errors over the questions. All methods answer the same questions, so their differences have
# smaller errors: a paired comparison counts only the questions that one method answers correctly and the other does
# not.

# %%
for name in ("confidence, 2 a step", "confidence, 4 a step", "Monte-Carlo, 1 draw", "Monte-Carlo, 16 draws"):
    difference = right["confidence"].astype(float) - right[name]
    error = difference.std(ddof=1) / np.sqrt(len(items))
    won, lost = np.sum(difference > 0), np.sum(difference < 0)
    print(f"confidence - {name:22} {difference.mean():+.3f} ± {error:.3f}   ({won} questions won, {lost} lost)")

# %% [markdown]
# ## Do they rank alike?
#
# Each candidate is a point. A good method separates the right candidates (orange) from the wrong ones. On the right,
# the margin of each question: the score of the right candidate minus that of the best wrong one. Above 0 the answer is
# correct.

# %%
one, other = scores["confidence"], scores["Monte-Carlo, 16 draws"]
is_right = np.arange(CHOICES) == answers[:, None]
margins = [values[is_right] - np.where(is_right, -np.inf, values).max(axis=1) for values in (one, other)]
figure, (left, right_axes) = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
for mask, colour, label in ((~is_right, "C0", "wrong"), (is_right, "C1", "right")):
    left.scatter(other[mask], one[mask], s=14, alpha=0.6, color=colour, label=label)
left.set(xlabel="Monte-Carlo, 16 draws (nats)", ylabel="confidence (nats)", title="candidates")
left.legend(frameon=False)
right_axes.axhline(0, color="grey", linewidth=0.8)
right_axes.axvline(0, color="grey", linewidth=0.8)
right_axes.scatter(margins[1], margins[0], s=14, alpha=0.7, color="C2")
right_axes.set(xlabel="margin by Monte-Carlo", ylabel="margin by confidence", title="questions")
plt.show()
print(f"correlation of the scores {np.corrcoef(one.ravel(), other.ravel())[0, 1]:.3f}, of the margins "
      f"{np.corrcoef(margins)[0, 1]:.3f}")

# %% [markdown]
# Next: more `ITEMS` shorten the bars with the inverse square root. `lm.choose(context, candidates)` does all this in
# one line, and `python -m illada_jax.evaluate` runs the tasks of lm-evaluation-harness with either method and records
# every setting.
