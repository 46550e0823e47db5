"""The set-up of a run: its data and resolved config, the plan and what must fit, and what is printed around it."""

import dataclasses
import math
import os
import shlex
import sys

import jax
from etils import epath
from jax.sharding import AbstractMesh, AxisType, Mesh

from illada_jax import model
from illada_jax.config import Config
from illada_jax.data.batches import Batches
from illada_jax.data.corpus import Corpus, open_corpus
from illada_jax.data.example_store import Examples, open_examples, report_dropped
from illada_jax.data.finetuning import example_batches
from illada_jax.data.pipeline import Pipeline
from illada_jax.data.tokenizers import Tokenizer
from illada_jax.data.tokenizers.chat import chat_format
from illada_jax.errors import ConfigError, InputError
from illada_jax.model.flops import training_flops_per_token
from illada_jax.parallel.mesh import AXES, check_divisible
from illada_jax.training.loop import Outcome
from illada_jax.training.optimizer import make_optimizer
from illada_jax.training.saved_model import LazyModel, open_initial
from illada_jax.training.step import abstract_state, donates

GIB = 2**30


def resolve(config: Config, tokenizer: Tokenizer) -> Config:
    """Fills in what the tokenizer decides: the size of the vocabulary and the id of MASK.

    Raises:
      ConfigError: the config and the tokenizer contradict each other.
    """
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    if vocab_size < tokenizer.vocab_size:
        raise ConfigError(f"config.model.vocab_size = {vocab_size}: the tokenizer has {tokenizer.vocab_size} ids")
    mask_id = tokenizer.mask_id if config.diffusion.mask_id == -1 else config.diffusion.mask_id
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=vocab_size),
        diffusion=dataclasses.replace(config.diffusion, mask_id=mask_id),
    )


def open_data(config: Config, initial: LazyModel | None = None) -> tuple[Config, Corpus | Examples, Batches]:
    """Opens what the config trains on.

    Args:
      config: the config.
      initial: what config.init.checkpoint names; None opens the workdir of that name, if its tokenizer is wanted.

    Returns:
      The resolved config, the text or the examples, and the batches of every step.

    Raises:
      InputError: the data are no good, or do not fit the config.
    """
    tokenizer = None
    if config.data.tokenizer == "checkpoint":
        tokenizer = (initial or open_initial(config)).tokenizer
    if config.sft.format == "none":
        if tokenizer is not None:
            raise ConfigError("config.data.tokenizer = 'checkpoint': is for fine-tuning (config.sft.format); a corpus "
                              "is prepared with its tokenizer")
        corpus = open_corpus(config.data)
        config = resolve(config, corpus.tokenizer)
        return config, corpus, Pipeline(config, corpus)
    examples = open_examples(config, tokenizer)
    report_dropped(examples)
    config = stop_after_turns(resolve(config, examples.tokenizer), examples.tokenizer)
    batches = example_batches(config, examples)
    if config.train.epochs:
        config = resolve_epochs(config, batches.num_steps)
    return config, examples, batches


def stop_after_turns(config: Config, tokenizer: Tokenizer) -> Config:
    """Lets decoding stop at the token with which the tokenizer's chat template ends an answer."""
    end_id = chat_format(tokenizer).end_id
    if end_id in (tokenizer.eos_id, *config.decode.stop_ids):
        return config
    stop_ids = (*config.decode.stop_ids, end_id)
    return dataclasses.replace(config, decode=dataclasses.replace(config.decode, stop_ids=stop_ids))


def resolve_epochs(config: Config, steps: int) -> Config:
    """Fills in what the number of examples decides: train.steps and, where it is given in epochs, eval.every.

    Raises:
      ConfigError: both train.steps and train.epochs are given, or the schedule does not fit into the steps.
    """
    if config.train.steps:
        raise ConfigError(f"config.train.steps = {config.train.steps}: must be 0 where config.train.epochs = "
                          f"{config.train.epochs} decides")
    every = config.eval.every
    if config.eval.every_epochs:
        every = math.ceil(steps * config.eval.every_epochs / config.train.epochs)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps),
                               eval=dataclasses.replace(config.eval, every=every))


def state_bytes_per_device(config: Config, mesh: Mesh | AbstractMesh, donated: bool = True) -> int:
    """Bytes of params, gradients (as params), average and optimizer state on a device; activations come on top.

    Args:
      config: the experiment.
      mesh: what the state is spread over.
      donated: the new state takes the place of the old one; otherwise both are there.
    """
    state = abstract_state(config, make_optimizer(config), mesh)

    def size(tree) -> int:
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    return size(state.params) + (1 if donated else 2) * size((state.params, state.opt_state, state.ema))


def check_memory(config: Config, mesh: Mesh) -> None:
    """Refuses a run whose state alone exceeds the memory of the devices.

    Raises:
      InputError: says what is needed, what is there and what to do instead.
    """
    local_devices = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    stats, local = local_devices[0].memory_stats() or {}, len(local_devices)
    # CPU devices share the memory of the host.
    available = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local
    needed = state_bytes_per_device(config, mesh, donates(local_devices[0].platform))
    if needed > available:
        raise InputError(
            f"the model does not fit: params, gradients and optimizer need {needed / GIB:,.1f} GiB on each of "
            f"{mesh.size} devices, which have {available / GIB:,.1f} GiB. Type instead: the same command with "
            "--dry_run for the plan; python -m illada_jax.aot --config=… --topology=v5p:4x4x4 to compile it for a pod "
            "that need not be there; a smaller config such as --config=experiments/quickstart.py; or start it on a "
            "pod, see tpu/README.md")


def describe_plan(config: Config) -> str:
    """The plan of a run as text: parameters, tokens, FLOPs, bytes per device. Allocates nothing.

    Raises:
      ConfigError: the config does not fit the mesh that it names.
    """
    tokens = config.data.batch_size * config.data.length
    flops = training_flops_per_token(config.model, config.data.length)
    count = model.num_params(config.model)
    embeddings = config.model.vocab_size * config.model.d_model * (1 if config.model.tied_head else 2)
    lines = [
        f"parameters        {count:,} ({_in_units(count)}), without embedding and head {count - embeddings:,} "
        f"({_in_units(count - embeddings)})",
        f"tokens per step   {tokens:,} ({config.data.batch_size:,} rows of {config.data.length:,})",
        _steps(config, tokens),
        f"FLOPs             {flops:.4g} per token, {flops * tokens:.4g} per step"
        + (f", {flops * tokens * config.train.steps:.4g} in all" if config.train.steps else "")
        + " (attention not halved, recomputation not counted)",
    ]
    for mesh in _meshes(config):
        check_divisible(config, mesh)
        axes = " × ".join(f"{name}={size}" for name, size in mesh.shape.items())
        lines.append(f"state per device  {state_bytes_per_device(config, mesh) / GIB:,.2f} GiB with {axes} (float32 "
                     "params, gradients, optimizer; activations come on top)")
    return "\n".join(lines)


def _steps(config: Config, tokens: int) -> str:
    if not config.train.steps:
        return f"steps             {config.train.epochs} epochs; how many steps that are is known with the examples"
    return (f"steps             {config.train.steps:,} = {_in_units(config.train.steps * tokens)} tokens "
            f"(12 T tokens would be {math.ceil(12e12 / tokens):,} steps)")


def _in_units(number: float) -> str:
    """A number in thousands (K), millions (M), billions (B) or trillions (T)."""
    unit, size = next((pair for pair in (("T", 1e12), ("B", 1e9), ("M", 1e6)) if number >= pair[1]), ("K", 1e3))
    return f"{number / size:.2f} {unit}"


def _meshes(config: Config) -> list[AbstractMesh]:
    """The mesh that the config names; where an axis is left open, that axis on 1, 64 and 256 devices if it divides."""
    sizes = [config.mesh.data, config.mesh.fsdp, config.mesh.tensor]
    if -1 not in sizes:
        return [_abstract_mesh(sizes)]
    meshes = []
    for size in (1, 64, 256):
        filled = [size if s == -1 else s for s in sizes]
        rows = config.data.batch_size // config.train.microbatches
        if rows % (filled[0] * filled[1]) == 0 and config.model.d_model % filled[1] == 0:
            meshes.append(_abstract_mesh(filled))
    return meshes


def _abstract_mesh(sizes: list[int]) -> AbstractMesh:
    return AbstractMesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


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
