"""Pre-training as iLLaDA does it, at a size that a CPU trains: warm-up, constant rate, decay when the loss levels off.

    python -m illada_jax.main --config=experiments/pretrain_small.py

The text is the Python documentation of the interpreter that runs it. The run does not decay by itself: it reports when
the loss stops falling (at step 7,500, after some minutes on one core), with the flags to add.
`experiments/studies/decay.py` adds them and plots the result: from 2.478 to
2.351 bits per byte with decay, to 2.450 without.
"""

import ml_collections

from illada_jax import config


def get_config() -> ml_collections.ConfigDict:
    """Objective, split and shape of the schedule are iLLaDA's; all figures are ours, found at this size.

    Muon, since AdamW stays at the entropy of single tokens for many thousand steps at this size and batch.
    """
    c = config.defaults()
    c.data.sources = ("python_docs",)
    c.data.tokenizer = "sentencepiece"
    c.data.tokenizer_vocab_size = 1024
    c.data.heldout_fraction = 0.04
    c.data.length = 64
    c.data.batch_size = 16
    c.diffusion.split_probability = 0.3  # as in the paper

    c.model.d_model = 64
    c.model.num_layers = 2
    c.model.num_heads = 2
    c.model.num_kv_heads = 1
    c.model.d_ff = 192
    c.model.max_length = 256
    c.model.rope_theta = 200.0
    c.model.scan_unroll = 0
    c.train.logits_chunk = 8

    c.optimizer.name = "muon"
    c.optimizer.learning_rate = 0.02
    c.optimizer.adam_learning_rate = 0.02
    c.optimizer.weight_decay = 0.0
    c.optimizer.warmup_steps = 100
    c.optimizer.decay_shape = "cosine"
    c.optimizer.final_learning_rate = 5e-4  # 1/40 of the constant rate, as in the paper
    c.train.steps = 20_000
    # Two percent in two million tokens: five times the noise of this batch size.
    c.train.plateau_window = 2000
    c.train.plateau_tolerance = 0.02
    c.checkpoint.every = 1000
    c.eval.every = 1000
    c.eval.draws = 4

    c.decode.max_new_tokens = 48
    c.decode.block_length = 8
    c.decode.steps_per_block = 8
    c.decode.confidence = "random"
    c.decode.temperature = 0.8
    return c
