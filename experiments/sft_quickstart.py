"""Fine-tuning on a laptop CPU: a small model learns to reverse and to sort letters and to end its answers.

    python -m illada_jax.main --config=experiments/sft_quickstart.py

Held-out prompts such as `sort hello=` are answered in blocks of 16 tokens until EOS. Expected after six minutes on one
core: all answers exactly right, all ended by EOS.

LLaDA's format, because at this size and budget learning the prompts, random letters, is wasted effort (iLLaDA's format
reached 0.1 after as many tokens). Decoding has variable length, which needs the rows of random length below: without
them the model infers the length of an answer from the end of the row, and answers short words with one letter too many
(0.75 on `sort`).
"""

import ml_collections

from illada_jax import config


def get_config() -> ml_collections.ConfigDict:
    """0.2 M parameters from scratch; the optimizer's figures were found by search at this size."""
    c = config.defaults()
    c.data.sources = ("tasks:reverse:10000", "tasks:sort:40000")
    c.data.tokenizer = "bytes"
    c.data.heldout_fraction = 0.02
    c.data.length = 32
    c.data.batch_size = 32
    c.sft.format = "llada"
    c.sft.bucket = 32
    # With rows all of one length the model would infer the length of an answer from the end of the canvas.
    c.data.random_length_probability = 0.5
    c.data.random_length_of = "row"

    c.model.d_model = 64
    c.model.num_layers = 3
    c.model.num_heads = 4
    c.model.num_kv_heads = 4
    c.model.d_ff = 192
    c.model.max_length = 256
    c.model.rope_theta = 200.0
    c.model.scan_unroll = 0
    c.diffusion.eps = 0.1

    c.optimizer.name = "muon"
    c.optimizer.learning_rate = 0.01
    c.optimizer.adam_learning_rate = 0.01
    c.optimizer.b2 = 0.99
    c.optimizer.weight_decay = 0.0
    c.optimizer.warmup_steps = 50
    c.optimizer.decay_fraction = 0.7
    c.train.steps = 0
    c.train.epochs = 6
    c.checkpoint.every = 2000

    c.decode.max_new_tokens = 32
    c.decode.block_length = 16
    c.decode.steps_per_block = 16
    c.decode.batch_size = 64
    c.eval.every_epochs = 1.0
    c.eval.rows = 512
    c.eval.evaluators = ("exact_match",)
    return c
