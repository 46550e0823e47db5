"""4 × 4 sudoku as text: the model solves grids that it has never seen, the most confident digits first.

    python -m illada_jax.main --config=experiments/sudoku.py

A document is `PUZZLE=SOLUTION`, 33 characters and EOS. Training knows nothing of sudoku: tokens of whole documents are
masked at random. The closing table shows that order and number of steps decide: 0.98 of the held-out grids are solved
with the most confident digit first, 0.61 in random order, 0.34 in one step.
"""

import ml_collections

from illada_jax import config


def get_config() -> ml_collections.ConfigDict:
    """Under two minutes on two idle cores."""
    c = config.defaults()
    c.data.sources = ("sudoku",)
    c.data.tokenizer = "bytes"
    c.data.heldout_fraction = 1 / 6  # of the 288 grids
    c.data.length = 34
    c.data.batch_size = 64

    c.model.vocab_size = 264
    c.model.d_model = 128
    c.model.num_layers = 4
    c.model.num_heads = 4
    c.model.num_kv_heads = 2
    c.model.d_ff = 384
    c.model.max_length = 64
    c.model.scan_unroll = 0

    c.optimizer.name = "muon"
    c.optimizer.learning_rate = 0.01
    c.optimizer.adam_learning_rate = 0.01
    c.optimizer.weight_decay = 0.0
    c.optimizer.warmup_steps = 50
    c.train.steps = 440
    c.optimizer.decay_steps = 310
    c.checkpoint.every = 440

    # The answer and its EOS are one block: with 17 steps, one token per step.
    c.decode.max_new_tokens = 17
    c.decode.block_length = 17
    c.decode.steps_per_block = 17
    c.decode.batch_size = 64
    c.eval.every = 220
    c.eval.rows = 256
    c.eval.evaluators = ("exact_match",)
    c.eval.final = ("decoding_orders",)
    return c
