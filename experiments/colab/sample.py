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
# # Sampling from a masked diffusion language model
#
# A model such as iLLaDA does not write from left to right. It starts from masks, predicts all of them at once, reveals
# the tokens that it is most confident of, and repeats. In this notebook a small model of that kind writes, and you see
# the order in which it does so.
#
# The model comes with the package: about two million parameters, trained on the prose of Python's documentation. It
# knows the tone of a manual and little else, so do not expect truth. Everything here works the same with a large model.
# It runs on a CPU, a GPU or a TPU in two or three minutes.

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
import html
import tempfile

import matplotlib.colors
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, display

import illada_jax
from illada_jax import tracing

plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})
lm = illada_jax.load("demo")
num_params = sum(x.size for x in jax.tree.leaves(lm.params))
print(f"{num_params:,} parameters, {lm.config.model.num_layers} layers, a vocabulary of {lm.tokenizer.vocab_size:,} "
      f"tokens, texts of at most {lm.config.model.max_length} tokens")

# %% [markdown]
# ## Write from nothing
#
# Forty masks and no prompt. `infill` fills every mask. The temperature sets the amount of randomness: at 0 the model
# writes the most probable tokens, the same every time; at 1 it samples from its probabilities; the demo's own setting
# lies between. The randomness of row i depends on i and the seed alone, not on the rest of the batch.

# %%
MASK = lm.tokenizer.mask_id

for temperature in (0.0, lm.config.decode.temperature):
    for result in lm.infill([[MASK] * 40] * 2, temperature=temperature):
        print(f"temperature {temperature}: {result.text!r}\n")

# %% [markdown]
# ## Continue a text
#
# New tokens are written in blocks after the prompt, and within a block in any order. The answer ends where the model
# writes its end token, or when the budget is used up.

# %%
prompts = ["If the process is not", "Write the data to", "Return True if the file"]
for prompt, result in zip(prompts, lm.generate(prompts, max_new_tokens=40), strict=True):
    print(f"{prompt}▸{result.text}\n   ({len(result.tokens)} tokens, {result.nfe} evaluations, ended by "
          f"{result.stopped_by})\n")

# %% [markdown]
# ## Fill gaps
#
# The text after a gap counts as much as the text before it; a left-to-right model needs special training for that.
# `[[mask:4]]` is a gap of four tokens. Write no space before a gap: tokens bring their own.

# %%
gapped = [
    "Return a[[mask:4]] of the file, or None if it cannot be opened.",
    "The function[[mask:2]] None if the file does not exist.",
    "Wait until the[[mask:2]] is finished.",
]
for text, result in zip(gapped, lm.infill(gapped, temperature=0.0), strict=True):
    print(f"{text}\n{result.text}\n")

# %% [markdown]
# ## Chat
#
# The same model, fine-tuned on questions about definitions in the documentation. The tokenizer's chat template renders
# a conversation, and the answer ends at its end token. Remember the size of the model: the form is right more often
# than the content.

# %%
chat = illada_jax.load("demo-chat")
for question in ("What does os.listdir do?", "What does os.getpid do?", "What is a namespace?"):
    answer = chat.chat([{"role": "user", "content": question}], temperature=0.0)
    print(f"> {question}\n{answer.text}\n")

# %% [markdown]
# ## Watch a text come into focus
#
# A result records the step at which each of its tokens was written, and so every state in between. `tracing.make_trace`
# evaluates the network at each of them for its candidates. Press Play, or drag the slider; point at a token for the
# candidates.


# %%
def show(traces, height=330):
    """Shows traces side by side in the notebook."""
    with tempfile.TemporaryDirectory() as directory:
        page = pathlib.Path(directory) / "page.html"
        tracing.write_page(page, traces)
        text = html.escape(page.read_text(encoding="utf-8"))
    display(HTML(f'<div><iframe srcdoc="{text}" style="width:100%;height:{height}px;border:0"></iframe></div>'))


prompt, settings = "If the file is opened", {"max_new_tokens": 32, "block_length": 32, "temperature": 0.0}
result = lm.generate([prompt], **settings)[0]
trace = tracing.make_trace(lm, result, title="one block of 32", num_candidates=3, **settings)
in_blocks = {**settings, "block_length": 8}
other = lm.generate([prompt], **in_blocks)[0]
show([trace, tracing.make_trace(lm, other, title="four blocks of 8", num_candidates=3, **in_blocks)])

# %% [markdown]
# The same as a picture: each row is a step, each column a position in the text. The colour is the probability of the
# model's best candidate there; a red square is the token that the step revealed, and after it the position is white.
# The model reveals where it is most confident, and each revealed token changes its predictions of the others.

# %%
written_at = np.array(trace.written_at)
new = np.flatnonzero(written_at >= 0)
sure = np.full((trace.num_steps, len(new)), np.nan)
for step, columns in enumerate(trace.candidates):
    for index, column in enumerate(new):
        if column in columns:
            sure[step, index] = columns[column][0].probability

figure, axes = plt.subplots(figsize=(11, 6.5))
image = axes.imshow(sure, cmap="viridis", norm=matplotlib.colors.LogNorm(0.01, 1, clip=True), aspect="auto")
shown = written_at[new] < trace.num_steps
axes.scatter(np.flatnonzero(shown), written_at[new][shown], s=28, marker="s", color="#d62728")
axes.set_xticks(range(len(new)), [trace.pieces[column].replace("\n", "⏎").replace("$", r"\$") for column in new],
                rotation=90, fontsize=8, family="monospace")
axes.set(ylabel="step", title=f"{prompt} …")
figure.colorbar(image, label="probability of the best candidate", pad=0.02, format="{x:.0%}")
plt.show()

# %% [markdown]
# One text is an anecdote. Here is the order of many: how often each of the next 32 positions was revealed at each step.
# In one block of 32 the order is free, and the preferences are the model's. Blocks of 8 follow each other from left to
# right, as a staircase; within each the order is free again.

# %%
LENGTH, TEXTS = 32, 24
given = lm.tokenizer.encode(prompt)
shares = {}
for block_length in (32, 8):
    texts = lm.infill([given + [MASK] * LENGTH] * TEXTS, block_length=block_length, temperature=0.7, batch_size=TEXTS)
    steps = np.array([text.canvas_step[len(given):] for text in texts])
    shares[block_length] = np.array([np.bincount(at, minlength=LENGTH) for at in steps.T]).T / TEXTS

figure, panels = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True, layout="constrained")
# The square root makes rare orders visible beside frequent ones.
scale = matplotlib.colors.PowerNorm(0.5, 0, max(share.max() for share in shares.values()))
for axes, (block_length, share) in zip(panels, shares.items(), strict=True):
    image = axes.imshow(share, cmap="magma", norm=scale)
    axes.set(xlabel="position after the prompt", title=f"blocks of {block_length}")
panels[0].set_ylabel("step")
figure.colorbar(image, ax=panels, label="share of the texts", format="{x:.0%}")
plt.show()

# %% [markdown]
# ## Steps against quality
#
# Each step costs one evaluation of the network. Revealing several tokens a step is faster; two measures show its cost
# in quality.
#
# - **Gaps.** Every third token of passages of 48 tokens is masked; how many are filled in exactly? The passages are
#   docstrings of your Python's standard library. The model was trained on the documentation, which contains some of
#   them, so this compares settings and is not an exam.
# - **Whole texts.** 24 texts from nothing. Do their parts fit together? Every second token is masked, and the model's
#   probability of it, given the others, is measured. Tokens revealed in one step do not see each other: each may be a
#   good prediction, and together they may still make no sense. As dull texts fit together too, the number of different
#   tokens is shown beside it.

# %%
import importlib
import inspect
import re

MODULES = ("argparse", "asyncio", "collections", "configparser", "contextlib", "csv", "datetime", "difflib", "email",
           "enum", "functools", "inspect", "io", "json", "logging", "os", "pathlib", "random", "shutil", "socket",
           "statistics", "string", "subprocess", "tarfile", "tempfile", "threading", "typing", "unittest", "zipfile")


def passages():
    """Paragraphs of plain prose from docstrings, each once."""
    found = {}
    for module in map(importlib.import_module, MODULES):
        owners = [each for _, each in inspect.getmembers(module) if inspect.isclass(each) or inspect.isroutine(each)]
        inner = [each for owner in owners if inspect.isclass(owner) for _, each in inspect.getmembers(owner)]
        for each in [*owners, *filter(inspect.isroutine, inner)]:
            for paragraph in re.split(r"\n\s*\n", inspect.getdoc(each) or ""):
                text = " ".join(paragraph.split())
                if re.fullmatch(r"[A-Z][\w ,.;:'()-]*\.", text):
                    found[text] = None
    return list(found)


WIDTH, ROWS = 48, 32
encoded = [ids[:WIDTH] for ids in map(lm.tokenizer.encode, passages()) if len(ids) >= WIDTH]
truth = np.array([encoded[i] for i in np.linspace(0, len(encoded) - 1, ROWS).astype(int)])
hidden = np.arange(WIDTH) % 3 == 1
masked = np.where(hidden, MASK, truth).tolist()
print(f"{len(encoded)} passages; the first: {lm.tokenizer.decode(truth[0])!r}")



def fit(tokens):
    """For each text, the mean log-probability of its tokens when every second one is masked."""
    total = np.zeros(len(tokens))
    for half in (0, 1):
        asked = np.arange(half, tokens.shape[1], 2)
        noisy = tokens.copy()
        noisy[:, asked] = MASK
        log_probs = np.asarray(jax.nn.log_softmax(lm.logits(noisy)))[:, asked]
        total += np.take_along_axis(log_probs, tokens[:, asked, None], axis=-1)[..., 0].sum(axis=1)
    return total / tokens.shape[1]


TOKENS_PER_STEP = (1, 4, 16)
rows = []
for tokens_per_step in TOKENS_PER_STEP:
    count = int(hidden.sum())
    filled = lm.infill(masked, block_length=count, steps_per_block=count // tokens_per_step, temperature=0.0,
                       batch_size=ROWS)
    right = np.mean(np.array([text.canvas for text in filled])[:, hidden] == truth[:, hidden], axis=1)
    texts = lm.infill([[MASK] * LENGTH] * TEXTS, block_length=LENGTH, steps_per_block=LENGTH // tokens_per_step,
                      batch_size=TEXTS)
    written = np.array([text.canvas for text in texts])
    different = np.array([len(set(text)) for text in written.tolist()])
    rows.append([[x.mean(), x.std(ddof=1) / np.sqrt(len(x))] for x in (right, fit(written), different)])
measured = np.array(rows)  # [settings, quantities, (mean, standard error)]

# %%
figure, panels = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
labels = ("gaps filled in exactly", "log-probability given the others", f"different tokens, of {LENGTH}")
for number, (axes, label) in enumerate(zip(panels, labels, strict=True)):
    mean, error = measured[:, number].T
    axes.errorbar(TOKENS_PER_STEP, mean, error, fmt="o-", capsize=3, color=f"C{number}")
    axes.set(xscale="log", xlabel="tokens revealed per step", title=label)
    axes.set_xticks(TOKENS_PER_STEP, TOKENS_PER_STEP)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
panels[0].set_ylim(0, None)
panels[2].set_ylim(0, LENGTH)
plt.show()
print("mean ± standard error")
for tokens_per_step, row in zip(TOKENS_PER_STEP, measured, strict=True):
    print(f"{tokens_per_step:2} a step: " + "   ".join(f"{mean:.3f} ± {error:.3f}" for mean, error in row))

# %% [markdown]
# Next: `lm.generate(..., reveal="threshold", threshold=0.9)` lets the model decide how many tokens a step reveals, and
# `cache="prefix"` reuses keys and values within a block. The notebook `train_sudoku` shows a task where the order
# decides between right and wrong.
