"""A small diffusion language model of the Python documentation, from scratch, on a laptop CPU.

    python -m illada_jax.main --config=experiments/quickstart.py

The text is the language reference and the docstrings of the interpreter that runs it. Expected on two idle cores: about
three minutes of training, then a held-out bound of about 2.0 bits per byte (gzip -9 needs 2.36).
"""

import ml_collections

from illada_jax import config


def get_config() -> ml_collections.ConfigDict:
    """1.1 M parameters; the optimizer's figures were found by search at this size."""
    c = config.defaults()
    c.data.sources = ("python_docs",)
    c.data.tokenizer = "sentencepiece"
    c.data.tokenizer_vocab_size = 4096
    c.data.heldout_fraction = 0.04
    c.data.length = 64
    c.data.batch_size = 8

    c.model.d_model = 128
    c.model.num_layers = 3
    c.model.num_heads = 4
    c.model.num_kv_heads = 2
    c.model.d_ff = 384
    c.model.max_length = 256
    c.model.rope_theta = 200.0  # so that all frequencies tell positions of a short window apart
    c.model.scan_unroll = 0
    c.train.logits_chunk = 8

    # Draws with few masks (p < 0.1) teach little per step at this budget. With them left out the training loss is not
    # quite the bound; the evaluation is: fixed counts need no eps.
    c.diffusion.eps = 0.1

    c.optimizer.name = "muon"
    c.optimizer.learning_rate = 0.004
    c.optimizer.adam_learning_rate = 0.01
    c.optimizer.b2 = 0.99
    c.optimizer.weight_decay = 0.0
    c.optimizer.warmup_steps = 50
    c.train.steps = 4400
    c.optimizer.decay_steps = 3400
    c.checkpoint.every = 1000

    # Short blocks, a random order and some temperature: small models loop when decoded greedily.
    c.decode.max_new_tokens = 48
    c.decode.block_length = 8
    c.decode.steps_per_block = 8
    c.decode.confidence = "random"
    c.decode.temperature = 0.8
    c.eval.every = 1000
    c.eval.draws = 4
    c.eval.evaluators = ("bits_per_byte",)
    c.eval.final = ("infill", "samples")
    c.eval.prompts = ("Return the", "The with statement", "Raise")
    return c
