"""From a config to what a run needs: the data, its batches, and the config with what data and tokenizer decide."""

import dataclasses
import math

from illada_jax.config import Config
from illada_jax.data.batches import Batches
from illada_jax.data.chat import chat_format
from illada_jax.data.corpus import Corpus, open_corpus
from illada_jax.data.example_store import Examples, open_examples, report_dropped
from illada_jax.data.finetuning import example_batches
from illada_jax.data.pipeline import Pipeline
from illada_jax.data.tokenizer import Tokenizer
from illada_jax.errors import ConfigError
from illada_jax.training.saved_model import Source, open_initial


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


def open_data(config: Config, initial: Source | None = None) -> tuple[Config, Corpus | Examples, Batches]:
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
