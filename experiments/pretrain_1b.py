"""A model of 1.2 B parameters with iLLaDA's recipe, for a single TPU host (see VARIANTS) or a small slice.

    python -m illada_jax.main --config=experiments/pretrain_1b.py:v5e-8 --dry_run
    python -m illada_jax.main --config=experiments/pretrain_1b.py:v5e-8 \
        --config.data.sources='("prepared:/data/corpus",)' --workdir=gs://BUCKET/illada-1b

The paper has no such model. Objective, split, weight decay, vocabulary, tied head and the shape of the schedule are
iLLaDA's; all else is our choice, with the reason beside it. Like the 8B recipe it never decays by itself: when the
loss stops falling, the run reports it with the flags to add. Not trained.
"""

import ml_collections

from illada_jax import config
from illada_jax.errors import ConfigError

# Settings for the same batch on one host (`tpu/cases.json`): one row at a time on a device, nearly everything computed
# again in the backward pass, and a checkpoint every 20 steps. The number in a name counts TensorCores (v4) or chips.
# Without a variant the whole batch is computed at once, for which no single host has the memory.
# Two alternatives were compiled: v5e-8 is faster if it keeps attention (45.5 s a step at best, 46.9 s without), v6e-8
# slower with two rows that keep the products (19.6 s, 18.3 s). Others may be faster still.
VARIANTS = {
    "v4-8": {"mesh.fsdp": 4, "train.microbatches": 64, "model.remat": "full"},
    "v5e-8": {"mesh.fsdp": 8, "train.microbatches": 32, "model.remat": "attention"},
    "v6e-8": {"mesh.fsdp": 8, "train.microbatches": 32, "model.remat": "full"},
}
for _variant in VARIANTS.values():
    _variant |= {"train.logits_chunk": 256, "checkpoint.every": 20}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The recipe of iLLaDA at a smaller size. `variant`: a key of VARIANTS, empty for any devices."""
    if variant and variant not in VARIANTS:
        raise ConfigError(f"experiments/pretrain_1b.py:{variant}: known variants: {', '.join(VARIANTS)}")
    c = config.defaults()
    c.model.vocab_size = 155_136
    c.model.d_model = 2048
    c.model.num_layers = 16  # width over depth as at 8B: 128
    c.model.num_heads = 16
    c.model.num_kv_heads = 4  # four query heads to a key head, as at 8B
    c.model.head_dim = 128
    c.model.d_ff = 7168  # 3.5 widths, as at 8B
    c.model.max_length = 8192
    c.model.rope_theta = 500_000.0
    c.model.tied_head = True
    c.model.dtype = "bfloat16"
    c.model.remat = "dots"  # small enough to keep the products

    c.data.sources = ("prepared:/data/corpus",)
    c.data.length = 8192
    c.data.batch_size = 256  # 2.1 M tokens a step: smaller models take smaller batches
    c.diffusion.split_probability = 0.3
    c.diffusion.mask_id = 5

    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 4e-4  # LLaDA's rate for 8B: smaller models take higher ones
    c.optimizer.final_learning_rate = 1e-5  # 1/40 of it, as in the paper
    c.optimizer.decay_shape = "cosine"
    c.optimizer.warmup_steps = 2000
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.95
    c.optimizer.weight_decay = 0.1
    c.optimizer.clip_norm = 1.0
    c.optimizer.ema_decay = 0.9999  # averages out the noise of a constant rate

    c.train.steps = 238_419  # 0.5 T tokens, 420 a parameter
    c.train.logits_chunk = 512
    c.train.log_every = 10
    c.train.plateau_tolerance = 0.002
    c.checkpoint.every = 1000
    c.eval.every = 5000
    c.eval.batch_size = 64
    c.eval.windows = 1024
    c.update_from_flattened_dict(VARIANTS.get(variant, {}))
    return c
