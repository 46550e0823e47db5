"""What the training command prints before and after a run."""

import math

import jax
from etils import epath
from jax.sharding import Mesh

from illada_jax import model
from illada_jax.config import Config
from illada_jax.data.corpus import Corpus
from illada_jax.training.loop import Outcome


def print_start(config: Config, workdir: epath.Path, mesh: Mesh, corpus: Corpus) -> None:
    """Says what is about to be trained, on what, where."""
    axes = " × ".join(f"{name}={size}" for name, size in mesh.shape.items())
    device = jax.devices()[0]
    tokens = config.data.batch_size * config.data.length
    print(f"model    {model.num_params(config.model):,} parameters, {config.model.dtype}, vocabulary "
          f"{config.model.vocab_size:,}")
    print(f"corpus   {corpus.train.num_tokens:,} tokens of {corpus.train.num_documents:,} documents; held out "
          f"{corpus.heldout.num_tokens:,} tokens of {corpus.heldout.num_documents:,}")
    print(f"training {config.train.steps:,} steps of {tokens:,} tokens "
          f"({config.train.steps * tokens / max(corpus.train.num_tokens, 1):.1f} epochs)")
    print(f"devices  {mesh.size} × {device.device_kind}, mesh {axes}")
    print(f"workdir  {workdir}", flush=True)


def print_end(outcome: Outcome, results: dict[str, float | str], workdir: epath.Path, corpus: Corpus) -> None:
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
    print(f"""Next:
  python -m illada_jax.generate --checkpoint={workdir} --prompt="Return the" --temperature=0.7
  python -m illada_jax.generate --checkpoint={workdir} --infill --prompt="Return a list of [[mask:4]] in the file."
  tensorboard --logdir={workdir}""")
