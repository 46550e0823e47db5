"""LLaDA 8B, pre-training on 2.3 T tokens (arXiv 2502.09992), for comparison with iLLaDA.

    python -m illada_jax.main --config=experiments/llada_8b.py --dry_run

Architecture, batch, window, rates and the 1 % of batches of random length are the published ones: 4e-4 to 1.2 T tokens
(where its run met a NaN), 1e-4 for 0.8 T, linear to 1e-5 over the last 0.3 T. Ours: betas and clipping.
"""

import ml_collections

from illada_jax import config


def get_config() -> ml_collections.ConfigDict:
    """The published recipe; our choices are marked."""
    c = config.defaults()
    c.model.vocab_size = 126_464
    c.model.d_model = 4096
    c.model.num_layers = 32
    c.model.num_heads = 32
    c.model.num_kv_heads = 32
    c.model.head_dim = 128
    c.model.d_ff = 12_288
    c.model.max_length = 4096
    c.model.rope_theta = 500_000.0
    c.model.norm_eps = 1e-5
    c.model.tied_head = False
    c.model.dtype = "bfloat16"
    c.model.remat = "full"

    c.data.sources = ("prepared:/data/corpus",)
    c.data.length = 4096
    c.data.batch_size = 1280
    c.data.random_length_probability = 0.01
    c.data.random_length_of = "batch"
    c.diffusion.mask_id = 126_336

    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 4e-4
    c.optimizer.final_learning_rate = 1e-5
    c.optimizer.warmup_steps = 2000
    c.optimizer.weight_decay = 0.1
    c.optimizer.b1 = 0.9  # ours
    c.optimizer.b2 = 0.95  # ours
    c.optimizer.clip_norm = 1.0  # ours

    c.optimizer.change_steps = (228_882,)  # 1.2 T tokens
    c.optimizer.changed_rates = (1e-4,)
    c.train.steps = 438_691  # 2.3 T tokens
    c.optimizer.decay_steps = 57_220  # the last 0.3 T tokens
    c.train.logits_chunk = 512
    c.train.log_every = 10
    c.checkpoint.every = 1000
    c.eval.every = 5000
    c.eval.batch_size = 256
    c.eval.windows = 1024
    return c
