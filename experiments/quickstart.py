"""A small diffusion language model of the Python documentation, from nothing, on a laptop CPU.

python -m illada_jax.main --config=experiments/quickstart.py
"""

import ml_collections

from illada_jax import config


def get_config() -> ml_collections.ConfigDict:
    """About three minutes on two idle cores."""
    c = config.defaults()
    c.data.sources = ("python_docs",)
    c.data.tokenizer = "sentencepiece"
    c.data.tokenizer_vocab_size = 4096
    c.data.length = 64
    c.data.batch_size = 8
    c.model.d_model = 128
    c.model.num_layers = 4
    c.model.num_heads = 4
    c.model.num_kv_heads = 4
    c.model.head_dim = 32
    c.model.d_ff = 384
    c.model.dtype = "bfloat16"
    c.optimizer.name = "muon"
    c.optimizer.learning_rate = 0.01
    c.optimizer.adam_learning_rate = 0.004
    c.optimizer.weight_decay = 0.0
    c.optimizer.warmup_steps = 100
    c.train.steps = 4000
    c.optimizer.decay_steps = 2000
    c.eval.every = 1000
    return c
