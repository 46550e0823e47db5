"""The model that the studies fine-tune: it knows their tasks before, as a pre-trained model would.

    python -m illada_jax.main --config=experiments/studies/base.py --workdir=workdirs/studies/base

Six tasks with prompts given (LLaDA's format: at this size it learns tasks from scratch, the other does not), on
examples other than those of the studies. The studies train it themselves if it is not there.
"""

import ml_collections

from illada_jax import config

HELDOUT = 0.06


def get_config() -> ml_collections.ConfigDict:
    """0.2 M parameters; about 6 minutes on one core."""
    c = config.defaults()
    c.data.sources = ("tasks:reverse:20000:1", "tasks:sort:30000:1", "tasks:last:6000:1", "tasks:addition:8000:1",
                      "tasks:count:4000:1", "tasks:story:5000:1")
    c.data.tokenizer = "bytes"
    c.data.heldout_fraction = HELDOUT
    c.data.length = 256
    c.data.batch_size = 16
    c.sft.format = "llada"
    c.sft.bucket = 32
    c.data.random_length_probability = 0.5  # it is to know its tasks on canvases of any length
    c.data.random_length_of = "row"
    c.diffusion.eps = 0.1

    c.model.vocab_size = 264
    c.model.d_model = 64
    c.model.num_layers = 3
    c.model.num_heads = 4
    c.model.num_kv_heads = 4
    c.model.head_dim = 16
    c.model.d_ff = 192
    c.model.max_length = 256
    c.model.rope_theta = 200.0
    c.model.scan_unroll = 3

    c.optimizer.name = "muon"
    c.optimizer.learning_rate = 0.01
    c.optimizer.adam_learning_rate = 0.01
    c.optimizer.b2 = 0.99
    c.optimizer.weight_decay = 0.0
    c.optimizer.warmup_steps = 50
    c.optimizer.decay_fraction = 0.7
    c.train.steps = 3600
    c.checkpoint.every = 500
    c.train.log_every = 100

    c.decode.max_new_tokens = 128
    c.decode.block_length = 16
    c.decode.steps_per_block = 16
    c.decode.batch_size = 32
    c.eval.every = 1800
    c.eval.rows = 192
    c.eval.evaluators = ("exact_match",)
    return c
