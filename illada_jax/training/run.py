"""Set-up of a run: its data and resolved config, its plan and memory, and the reports before and after it."""

import dataclasses
import math
import os
import re
import shlex
import sys

import jax
from etils import epath
from jax.sharding import AbstractMesh, AxisType, Mesh

from illada_jax import console, model
from illada_jax.config import Config
from illada_jax.data.corpus import Corpus, Examples, open_corpus, open_examples
from illada_jax.data.finetuning import example_batches
from illada_jax.data.pipeline import Batches, Pipeline
from illada_jax.data.tokenizers import Tokenizer
from illada_jax.data.tokenizers.chat import chat_format
from illada_jax.errors import ConfigError, InputError
from illada_jax.model.flops import training_flops_per_token
from illada_jax.parallel.mesh import AXES, check_divisible
from illada_jax.training.loop import Outcome
from illada_jax.training.saved_model import LazyModel, open_initial
from illada_jax.training.step import abstract_state, donates

GIB = 2**30
_READ_DOCUMENTS = 20  # in which an example sentence is looked for
_SENTENCE = re.compile(r"(?<![^.:] )\b[A-Z][a-z]*(?: [A-Za-z]+[,;]?){7,14}\.(?= |$)")


def resolve(config: Config, tokenizer: Tokenizer) -> Config:
    """Config with the vocabulary size and the id of MASK taken from the tokenizer, where it leaves them open.

    Raises:
      ConfigError: the config contradicts the tokenizer.
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
    """Opens the data of a config: the resolved config, the corpus or the examples, and the batches of every step.

    Args:
      config: the config.
      initial: the model that config.init.checkpoint names; None opens the workdir of that name, if its tokenizer is
        needed.

    Raises:
      InputError: the data are invalid or do not fit the config.
    """
    if config.sft.format == "none":
        corpus = open_corpus(config.data)
        _print_report(corpus)
        config = resolve(config, corpus.tokenizer)
        return config, corpus, Pipeline(config, corpus)
    from_checkpoint = config.data.tokenizer == "checkpoint"
    examples = open_examples(config, (initial or open_initial(config)).tokenizer if from_checkpoint else None)
    _print_report(examples)
    config = _stop_after_turns(resolve(config, examples.tokenizer), examples.tokenizer)
    batches = example_batches(config, examples)
    if config.train.epochs:
        config = resolve_epochs(config, batches.num_steps)
    return config, examples, batches


def _print_report(corpus: Corpus) -> None:
    for report in filter(None, (corpus.dropped, corpus.split_warning)):
        console.print_error(report)


def _stop_after_turns(config: Config, tokenizer: Tokenizer) -> Config:
    """Config whose decoding stops at the tokens that end an answer in the tokenizer's chat template."""
    known = (tokenizer.eos_id, *config.decode.stop_ids)
    stop_ids = tuple(id_ for id_ in chat_format(tokenizer).stop_ids if id_ not in known)
    decode = dataclasses.replace(config.decode, stop_ids=(*config.decode.stop_ids, *stop_ids))
    return dataclasses.replace(config, decode=decode)


def resolve_epochs(config: Config, steps: int) -> Config:
    """Config with train.steps and, if given in epochs, eval.every computed from the number of steps.

    Raises:
      ConfigError: both train.steps and train.epochs are given.
    """
    if config.train.steps:
        raise ConfigError(f"config.train.steps = {config.train.steps}: must be 0 if config.train.epochs = "
                          f"{config.train.epochs} is given; for example --config.train.epochs=0")
    every = config.eval.every
    if config.eval.every_epochs:
        every = math.ceil(steps * config.eval.every_epochs / config.train.epochs)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps),
                               eval=dataclasses.replace(config.eval, every=every))


def _state_gib(config: Config, mesh: Mesh | AbstractMesh, donated: bool = True) -> float:
    """GiB per device of params, gradients, moving average and optimizer state, twice if the old is not donated."""
    state = abstract_state(config, mesh)

    def size(tree) -> int:
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    return (size(state.params) + (1 if donated else 2) * size((state.params, state.opt_state, state.ema))) / GIB


def check_memory(config: Config, mesh: Mesh) -> None:
    """Checks that the state alone fits into the memory of the devices.

    Raises:
      InputError: it does not; the message gives both sizes and alternatives.
    """
    local_devices = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    stats, local = local_devices[0].memory_stats() or {}, len(local_devices)
    # CPU devices share the memory of the host.
    available = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local
    needed = _state_gib(config, mesh, donates(local_devices[0].platform))
    if needed > available / GIB:
        raise InputError(
            f"the model does not fit: params, gradients and optimizer need {needed:,.1f} GiB on each of "
            f"{mesh.size} devices, which have {available / GIB:,.1f} GiB. Instead: add --dry_run to print the plan; "
            "compile it for a pod without having one, python -m illada_jax.aot --config=… --topology=v5p:4x4x4; use a "
            "smaller config such as --config=experiments/quickstart.py; or start it on a pod, see tpu/README.md")


def describe_plan(config: Config) -> str:
    """Plan of a run as text: parameters, tokens, FLOPs, bytes per device. Allocates nothing.

    Raises:
      ConfigError: the config does not fit its mesh.
    """
    tokens = config.data.batch_size * config.data.length
    flops = training_flops_per_token(config.model, config.data.length)
    count = model.num_params(config.model)
    embeddings = config.model.vocab_size * config.model.d_model * (1 if config.model.tied_head else 2)
    if config.train.steps:
        steps = (f"{config.train.steps:,} = {_in_units(config.train.steps * tokens)} tokens (12 T tokens would be "
                 f"{math.ceil(12e12 / tokens):,} steps)")
        total = f", {flops * tokens * config.train.steps:.4g} in total"
    else:
        steps, total = f"{config.train.epochs} epochs; the number of examples determines the steps", ""
    lines = [
        f"parameters        {count:,} ({_in_units(count)}), without embedding and head {count - embeddings:,} "
        f"({_in_units(count - embeddings)})",
        f"tokens per step   {tokens:,} ({config.data.batch_size:,} rows of {config.data.length:,})",
        f"steps             {steps}{_scaled(config)}",
        f"FLOPs             {flops:.4g} per token, {flops * tokens:.4g} per step{total} (attention not halved, "
        "recomputation not counted)",
    ]
    for mesh in _meshes(config):
        check_divisible(config, mesh)
        axes = " × ".join(f"{name}={size}" for name, size in mesh.shape.items())
        lines.append(f"state per device  {_state_gib(config, mesh):,.2f} GiB with {axes} (float32 "
                     "params, gradients, optimizer; activations not included)")
    return "\n".join(lines)


def _scaled(config: Config) -> str:
    """A remark if warm-up and decay were scaled to the run."""
    if config.schedule_scale == 1 or not config.train.steps:
        return ""
    return (f"; too few for the schedule, which is scaled by {config.schedule_scale:.2g}: warm-up "
            f"{config.warmup_steps:,}, decay {config.decay_steps:,} steps")


def _in_units(number: float) -> str:
    """Number in thousands (K), millions (M), billions (B) or trillions (T)."""
    unit, size = next((pair for pair in (("T", 1e12), ("B", 1e9), ("M", 1e6)) if number >= pair[1]), ("K", 1e3))
    return f"{number / size:.2f} {unit}"


def _meshes(config: Config) -> list[AbstractMesh]:
    """The mesh of the config; if an axis is open, one mesh for each of its sizes 1, 64 and 256 that fits the config."""
    sizes = [config.mesh.data, config.mesh.fsdp, config.mesh.tensor]
    meshes = []
    for count in (1, 64, 256) if -1 in sizes else (1,):
        data, fsdp, tensor = (count if size == -1 else size for size in sizes)
        rows = config.data.batch_size // config.train.microbatches
        if -1 not in sizes or (rows % (data * fsdp) == 0 and config.model.d_model % fsdp == 0):
            meshes.append(AbstractMesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * len(AXES)))
    return meshes


def print_start(config: Config, workdir: epath.Path, mesh: Mesh, corpus: Corpus | Examples) -> None:
    """Prints model, corpus, steps, devices and workdir."""
    axes = " × ".join(f"{name}={size}" for name, size in mesh.shape.items())
    device = jax.devices()[0]
    tokens = config.data.batch_size * config.data.length
    print(f"model    {model.num_params(config.model):,} parameters, {config.model.dtype}, vocabulary "
          f"{config.model.vocab_size:,}")
    print(f"corpus   {corpus.train.num_tokens:,} tokens of {corpus.train.num_documents:,} documents; held out "
          f"{corpus.heldout.num_tokens:,} tokens of {corpus.heldout.num_documents:,}")
    epochs = config.train.epochs or config.train.steps * tokens / max(corpus.train.num_tokens, 1)
    print(f"training {config.train.steps:,} steps of {tokens:,} tokens ({epochs:.4g} epochs){_scaled(config)}")
    print(f"devices  {mesh.size} × {device.device_kind}, mesh {axes}")
    print(f"workdir  {workdir}", flush=True)


def print_end(
    config: Config, outcome: Outcome, results: dict[str, float | str], workdir: epath.Path, corpus: Corpus | Examples
) -> None:
    """Prints how the run ended, the results of the evaluators, and the commands to try next."""
    before = " already, so nothing was trained or evaluated" if outcome.start == outcome.step else ""
    print(f"\n{outcome.status.capitalize()} at step {outcome.step:,}{before}.\n")
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
        print("  the same command without --config.train.stop_step continues from here")
    if config.train.tensorboard:
        print(f"  tensorboard --logdir={shlex.quote(str(workdir))}  (pip install tensorboard)")


def _example_prompts(config: Config, corpus: Corpus | Examples) -> tuple[str, str]:
    """Prompt to continue and text with a gap from the held-out text, for the suggested commands."""
    stream = corpus.heldout if corpus.heldout.num_documents else corpus.train
    if isinstance(corpus, Examples):
        prompt, answer = stream.question(0)
        asked = corpus.tokenizer.decode(prompt)
        return asked, f"{asked}[[mask:{len(answer)}]]"
    texts = [" ".join(corpus.tokenizer.decode(stream.document(index)).split())
             for index in range(min(stream.num_documents, _READ_DOCUMENTS))]
    text = texts[0][:60]
    question, separator, answer = text.partition(config.eval.separator)
    if separator and {"exact_match", "decoding_orders"} & {*config.eval.evaluators, *config.eval.final}:
        return question + separator, f"{question}{separator}[[mask:{len(corpus.tokenizer.encode(answer))}]]"
    sentence = next(filter(None, map(_SENTENCE.search, texts)), None)
    words = sentence[0].split(" ") if sentence else text.split(" ")
    start, hidden, end = (" ".join(part) for part in (words[:4], words[4:6], words[6:]))
    # A token includes the space before its word.
    gap = len(corpus.tokenizer.encode(f" {hidden}")) if hidden else 4
    return next(filter(None, config.eval.prompts), start), f"{start}[[mask:{gap}]]{f' {end}' if end else ''}"
