"""What the training command prints before and after a run."""

import math
import os
import shlex
import sys

import jax
from etils import epath
from jax.sharding import Mesh

from illada_jax import model
from illada_jax.config import Config
from illada_jax.data.corpus import Corpus
from illada_jax.data.example_store import Examples
from illada_jax.training.loop import Outcome


def print_start(config: Config, workdir: epath.Path, mesh: Mesh, corpus: Corpus | Examples) -> None:
    """Says what is about to be trained, on what, where."""
    axes = " × ".join(f"{name}={size}" for name, size in mesh.shape.items())
    device = jax.devices()[0]
    tokens = config.data.batch_size * config.data.length
    print(f"model    {model.num_params(config.model):,} parameters, {config.model.dtype}, vocabulary "
          f"{config.model.vocab_size:,}")
    print(f"corpus   {corpus.train.num_tokens:,} tokens of {corpus.train.num_documents:,} documents; held out "
          f"{corpus.heldout.num_tokens:,} tokens of {corpus.heldout.num_documents:,}")
    epochs = config.train.epochs or config.train.steps * tokens / max(corpus.train.num_tokens, 1)
    print(f"training {config.train.steps:,} steps of {tokens:,} tokens ({epochs:.4g} epochs)")
    print(f"devices  {mesh.size} × {device.device_kind}, mesh {axes}")
    print(f"workdir  {workdir}", flush=True)


def print_end(
    config: Config, outcome: Outcome, results: dict[str, float | str], workdir: epath.Path, corpus: Corpus | Examples
) -> None:
    """Says how the run ended, what the evaluators found, and what to type next."""
    print(f"\n{outcome.status.capitalize()} at step {outcome.step:,}.\n")
    if "eval/bits_per_byte" in results:
        bound, stderr = results["eval/bits_per_byte"], results["eval/bits_per_byte_stderr"]
        print(f"Held-out text: at most {bound:.3f} ± {stderr:.3f} bits per byte (bound ± standard error).")
        for name, value in corpus.statistics.items():
            print(f"  for comparison, {name}: {value:.3f}")
        print()
    for name, value in results.items():
        if isinstance(value, str):
            print(f"{name}\n{value}\n")
        elif name.startswith("eval/") and not name.startswith("eval/bits_per_byte") and math.isfinite(value):
            print(f"{name} = {value:.4g}")
    python = os.path.relpath(sys.executable)
    if python.startswith(os.pardir):
        python = sys.executable
    generate = f"  {python} -m illada_jax.generate --checkpoint={shlex.quote(str(workdir))}"
    print("Next:")
    if any(source.startswith("chat:") for source in config.data.sources):
        print(f"{generate} --chat")
    else:
        prompt, gapped = _example_prompts(config, corpus)
        print(f"{generate} --prompt={shlex.quote(prompt)}")
        print(f"{generate} --infill --prompt={shlex.quote(gapped)}")
    if outcome.status == "stopped":
        print("  the same command without --config.train.stop_step goes on from here")
    if config.train.tensorboard:
        print(f"  tensorboard --logdir={shlex.quote(str(workdir))}  (pip install tensorboard)")


def _example_prompts(config: Config, corpus: Corpus | Examples) -> tuple[str, str]:
    """A prompt to continue and a text with a gap, for the commands that are suggested, from the held-out text."""
    stream = corpus.heldout if corpus.heldout.num_documents else corpus.train
    if isinstance(corpus, Examples):
        prompt, answer = stream.question(0)
        asked = corpus.tokenizer.decode(prompt)
        return asked, f"{asked}[[mask:{len(answer)}]]"
    tokens = stream.document(0)
    text = " ".join(corpus.tokenizer.decode(tokens).split())[:60]
    question, separator, answer = text.partition(config.eval.separator)
    if separator and {"exact_match", "decoding_orders"} & {*config.eval.evaluators, *config.eval.final}:
        return question + separator, f"{question}{separator}[[mask:{len(corpus.tokenizer.encode(answer))}]]"
    middle = len(text) // 2
    return next(filter(None, config.eval.prompts), text[:20]), f"{text[:middle - 6]}[[mask:4]]{text[middle + 6:]}"
