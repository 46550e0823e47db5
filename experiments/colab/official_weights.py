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
# # The official weights: convert, chat, watch
#
# The published weights of iLLaDA-8B-Instruct are converted to a workdir of this package with int8 matrices, which fits
# on one accelerator with 16 GB. Then you chat with it and watch it write.
#
# **Where eight billion parameters do not fit, the same cells run on a tiny stand-in**: a directory in the same layout
# (config.json, sharded safetensors, tokenizer), made from the small chat model of the package. Its answers are worth
# little; loading and decoding are the same. The cells below decide which one is used.

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
MODEL = "auto"  # @param ["auto", "8B", "stand-in"]
OFFICIAL = "GSAI-ML/iLLaDA-8B-Instruct"  # @param {type:"string"}
TARGET = "workdirs/official_int8"  # @param {type:"string"}

# %% [markdown]
# ## Does it fit?
#
# The download is 15 GB, the converted model 8 GB more on the disk. The conversion goes tensor by tensor; the device
# holds the finished part (8 GB at the end), which passes through host memory when it is saved. `auto` takes the 8B
# model if an accelerator has the memory; on a CPU its answers take many minutes, so there you must ask for it.

# %%
GB = 1e9
NEEDED = {"device memory": 12 * GB, "host memory": 14 * GB, "disk": 27 * GB}


def free_bytes():
    """Free bytes on the first device, in host memory, and on the disk of this directory."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    meminfo = pathlib.Path("/proc/meminfo")
    if meminfo.exists():  # the page cache is available too
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        host = 1024 * int(lines["MemAvailable"].split()[0])
    stats = jax.devices()[0].memory_stats()
    device = stats["bytes_limit"] - stats["bytes_in_use"] if stats and "bytes_limit" in stats else host
    return {"device memory": device, "host memory": host, "disk": shutil.disk_usage(".").free}


free = free_bytes()
short = [name for name, needed in NEEDED.items() if free[name] < needed]
for name, needed in NEEDED.items():
    print(f"{name:13} {free[name] / GB:6.1f} GB free, {needed / GB:.0f} GB needed for 8B")
if MODEL == "8B" and short:
    raise RuntimeError(f'MODEL = "8B": there is not enough {" and ".join(short)}; use another machine, or '
                       'MODEL = "stand-in"')
use_8b = MODEL == "8B" or (MODEL == "auto" and not short and jax.default_backend() != "cpu")
print(f"\nUsing {OFFICIAL if use_8b else 'the stand-in'}.")

# %% [markdown]
# ## The source
#
# The conversion fetches the official weights from the Hugging Face Hub; `OFFICIAL` may also be a local directory. The
# same converter, in the other direction, makes the stand-in: the chat model of the package becomes a workdir, and that
# becomes a directory in iLLaDA's layout, in files of two megabytes.

# %%
from illada_jax.interop.conversion import Conversion

if use_8b:
    SOURCE = OFFICIAL
    if not pathlib.Path(SOURCE).is_dir() and importlib.util.find_spec("huggingface_hub") is None:
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "huggingface_hub"], check=True)
else:
    SOURCE = "workdirs/stand_in/iLLaDA-tiny-Instruct"
    shutil.rmtree("workdirs/stand_in", ignore_errors=True)
    print(Conversion("demo-chat", "workdirs/stand_in/workdir").run())
    print(Conversion("workdirs/stand_in/workdir", SOURCE, dtype="bfloat16", family="illada",
                     shard_gigabytes=0.002).run())

# %% [markdown]
# ## Convert to eight bits
#
# Every matrix is rounded to int8 with a scale for each of its outputs; embeddings and norms stay as they are. The
# target is written atomically. An existing one is kept: running the cell again converts nothing twice.
#
# In a terminal the same is `python -m illada_jax.convert --source=… --target=… --quantize=int8`.

# %%
import illada_jax

if use_8b and pathlib.Path(TARGET).is_dir():
    print(f"{TARGET} exists already")
else:
    if not use_8b:  # the stand-in may have changed, and costs nothing
        TARGET = "workdirs/stand_in/int8"
    print(Conversion(SOURCE, TARGET, dtype="bfloat16", quantize="int8").run())

lm = illada_jax.load(TARGET, dtype="bfloat16")
model = lm.config.model
print(f"{model.num_layers} layers, d_model {model.d_model}, {model.num_heads} query and {model.num_kv_heads} key/value "
      f"heads, vocabulary {model.vocab_size:,}, context {model.max_length:,}")

# %% [markdown]
# Memory of the parameters. The published weights are in bfloat16; training takes sixteen bytes a parameter (weights,
# gradients and two moments in float32).

# %%
import matplotlib.pyplot as plt
import numpy as np
from flax import traverse_util

from illada_jax.model.int8 import Int8

plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})

params = traverse_util.flatten_dict(lm.params, sep="/")
parts = {"embedding": ("embedding", "head"), "attention": ("/attention/",), "feed-forward": ("/mlp/",)}
sizes = {part: np.zeros(3) for part in parts}
for path, param in params.items():
    part = next((name for name, marks in parts.items() if any(mark in path for mark in marks)), None)
    if part is not None:  # norms are too small to show
        values = param.values if isinstance(param, Int8) else param
        sizes[part] += [4 * values.size, 2 * values.size, sum(x.nbytes for x in jax.tree.leaves(param))]
unit, name = (1e9, "GB") if sum(sizes.values())[0] > 1e9 else (1e6, "MB")
figure, axes = plt.subplots(figsize=(7, 2.4), layout="constrained")
left = np.zeros(3)
for number, (part, size) in enumerate(sizes.items()):
    axes.barh(range(3), size / unit, left=left, color=f"C{number}", label=part)
    left += size / unit
for row, total in enumerate(left):
    axes.text(total, row, f" {total:.1f} {name}", va="center")
axes.set_yticks(range(3), ["float32", "bfloat16", "int8 (here)"])
axes.set(xlabel=name, xlim=(0, 1.12 * left.max()), title="memory of the parameters")
axes.invert_yaxis()
axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.28))
plt.show()

# %% [markdown]
# ## Chat
#
# The answer appears block by block: each is revealed in any order and then stays. Put your own questions into the list.
# The first answer waits for the compiler.

# %%
import time

SETTINGS = {"max_new_tokens": 128, "block_length": 32, "temperature": 0.0}


def ask(messages, **settings):
    """Answers, printing each block of the answer when it is finished."""
    shown = 0

    def on_block(_, so_far):
        nonlocal shown
        stays = so_far.text.rstrip("\ufffd")  # an incomplete character is not shown yet
        print(stays[shown:], end="", flush=True)
        shown = max(shown, len(stays))

    started = time.monotonic()
    answer = lm.chat(messages, on_block=on_block, **{**SETTINGS, **settings})
    seconds = time.monotonic() - started
    print(f"{answer.text[shown:]}\n   ({len(answer.tokens)} tokens, {answer.nfe} evaluations, {seconds:.1f} s, ended "
          f"by {answer.stopped_by})\n")
    return answer


messages = []
for question in ("What does os.listdir do?", "What is a namespace?"):
    print(f"> {question}")
    messages.append({"role": "user", "content": question})
    if not lm.has_room(messages, **SETTINGS):
        messages = messages[-1:]
    messages.append({"role": "assistant", "content": ask(messages).text})

# %% [markdown]
# ## Watch it write
#
# Press Play, or drag the slider. Grey boxes are masks, a bar marks the start of a block. Point at a token for the
# network's candidates.

# %%
import html
import tempfile

from IPython.display import HTML, Image, display

from illada_jax import tracing
from illada_jax.data.tokenizers.chat import encode_chat

question = [{"role": "user", "content": "What does os.getpid do?"}]
settings = {**SETTINGS, "max_new_tokens": 64}
answer = lm.chat(question, **settings)
trace = tracing.make_trace(lm, answer, title=question[0]["content"], num_candidates=4, **settings)
with tempfile.TemporaryDirectory() as directory:
    page, picture = pathlib.Path(directory) / "page.html", pathlib.Path(directory) / "order.png"
    tracing.write_page(page, [trace])
    tracing.write_picture(picture, trace)
    text, image = html.escape(page.read_text(encoding="utf-8")), picture.read_bytes()
display(HTML(f'<div><iframe srcdoc="{text}" style="width:100%;height:330px;border:0"></iframe></div>'))

# %% [markdown]
# The order as colours, from dark (first) to light (last):

# %%
display(Image(image))

# %% [markdown]
# ## Faster answers
#
# The published method reveals one token a step. A threshold reveals, at each step, every token that the model is
# confident enough of; a prefix cache keeps keys and values of finished text. Both may change the answer: *agreement* is
# the share of tokens equal to those of the first row. A confident model gains much; try both together.

# %%
prompt = encode_chat(lm.tokenizer, question, add_generation_prompt=True)
ways = {"one token a step": {}, "threshold 0.9": {"reveal": "threshold", "threshold": 0.9},
        "prefix cache": {"cache": "prefix"}}
exact = None
for name, way in ways.items():
    options = {**settings, **way}
    lm.generate([prompt], **options)  # compiles
    started = time.monotonic()
    result = lm.generate([prompt], **options)[0]
    seconds = time.monotonic() - started
    exact = exact or result
    length = max(len(exact.tokens), len(result.tokens), 1)
    same = sum(a == b for a, b in zip(exact.tokens, result.tokens, strict=False)) / length
    print(f"{name:17} {len(result.tokens):3} tokens, {result.nfe:3} evaluations, {seconds:6.2f} s, "
          f"agreement {same:.2f}")

# %% [markdown]
# ## The effect of int8
#
# Only where the bfloat16 weights fit beside the int8 ones: how often both rank the same token first, and the distance
# between their probabilities.

# %%
in_bfloat16 = 2 * sum(x.size for x in jax.tree.leaves(lm.params))
if free_bytes()["device memory"] > 1.5 * in_bfloat16:
    reference = illada_jax.load(SOURCE, dtype="bfloat16")
    tokens = np.array([answer.canvas[: len(answer.canvas)]])
    columns = np.arange(1, tokens.shape[1], 2)
    noisy = tokens.copy()
    noisy[:, columns] = lm.tokenizer.mask_id
    rounded, original = (jax.nn.softmax(each.logits(noisy))[0, columns] for each in (lm, reference))
    same = float(np.mean(rounded.argmax(-1) == original.argmax(-1)))
    distance = float(np.mean(abs(rounded - original).sum(-1) / 2))
    print(f"every second token of that answer masked: the same token ranks first at {same:.3f} of {len(columns)}; "
          f"the probabilities differ by {distance:.4f} (mean total variation)")
else:
    print("Both do not fit at once.")

# %% [markdown]
# Next: `python -m illada_jax.generate --checkpoint=… --chat` chats in a terminal, and `--config.init.checkpoint=…`
# fine-tunes from a directory of weights (not from int8).
