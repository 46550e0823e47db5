"""iLLaDA 8B, pre-training on 12 T tokens (arXiv 2606.25331).

    python -m illada_jax.main --config=experiments/pretrain_8b.py --dry_run
    python -m illada_jax.main --config=experiments/pretrain_8b.py --config.data.sources='("prepared:/data/corpus",)' \
        --workdir=gs://BUCKET/illada-8b

Architecture, window, split, weight decay, peak and final rate are the published ones. Not published, hence ours: the
batch (2,048 rows: 16.8 M tokens a step, in the range of dense 8B models), the warm-up (2,000 steps, as in LLaDA), betas
and clipping (0.9, 0.95 and 1.0, the usual ones), and when the decay starts: the paper switched from the constant rate
when the loss had stopped falling. So this config never decays by itself: the run reports when the loss falls by less
than 0.2 % in 10,000 steps (168 B tokens; ours); resume it with `--config.optimizer.decay_start=N
--config.optimizer.decay_steps=M`. Compiled for pods (`tpu/REPORT.md`), not trained.
"""

import ml_collections

from illada_jax import config
from illada_jax.errors import ConfigError

# Settings for the same batch on TPU slices, found by compiling (see `tpu/cases.json`): mesh, activations kept for
# the backward pass, micro-batches, and a checkpoint every five to eight minutes: all steps since the newest are lost
# when spot hardware is taken away (`planning/saving.py`). The number in a name counts TensorCores (v5p, tpu7x) or
# chips.
VARIANTS = {
    "v5p-128": {"mesh.data": 4, "mesh.fsdp": 16, "model.remat": "dots", "train.microbatches": 16,
                "checkpoint.every": 10},
    "v5p-1024": {"mesh.data": 8, "mesh.fsdp": 64, "model.remat": "dots", "train.microbatches": 2,
                 "checkpoint.every": 60},
    "v5e-256": {"mesh.fsdp": 256, "model.remat": "attention", "train.microbatches": 8, "checkpoint.every": 10},
    "v6e-256": {"mesh.fsdp": 256, "model.remat": "projections", "train.microbatches": 8, "checkpoint.every": 30},
    "tpu7x-128": {"mesh.data": 8, "mesh.fsdp": 16, "model.remat": "dots", "train.microbatches": 8,
                  "checkpoint.every": 20},
}
# On v5p larger tiles in on-chip memory reduce the compiler's time estimate by a fifth.
for _variant in ("v5p-128", "v5p-1024"):
    VARIANTS[_variant] |= {"model.attention_block_kv": 4096,
                           "train.compiler_options": ("xla_tpu_scoped_vmem_limit_kib=65536",)}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The published recipe; our choices are marked. `variant`: a key of VARIANTS, empty for any devices."""
    if variant and variant not in VARIANTS:
        raise ConfigError(f"experiments/pretrain_8b.py:{variant}: known variants: {', '.join(VARIANTS)}")
    c = config.defaults()
    c.model.vocab_size = 155_136
    c.model.d_model = 4096
    c.model.num_layers = 32
    c.model.num_heads = 32
    c.model.num_kv_heads = 8
    c.model.head_dim = 128
    c.model.d_ff = 14_336
    c.model.max_length = 8192
    c.model.rope_theta = 500_000.0  # inferred from sibling models
    c.model.norm_eps = 1e-6  # inferred from sibling models
    c.model.tied_head = True
    c.model.init_std = 0.00988  # of the public modelling file
    c.model.dtype = "bfloat16"
    c.model.remat = "full"

    c.data.sources = ("prepared:/data/corpus",)
    c.data.length = 8192
    c.data.batch_size = 2048  # ours
    c.data.isolate_documents = False  # ours: not published whether documents inside a window see each other
    c.diffusion.split_probability = 0.3
    c.diffusion.mask_id = 5

    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 2e-4
    c.optimizer.final_learning_rate = 5e-6
    c.optimizer.decay_shape = "cosine"
    c.optimizer.warmup_steps = 2000  # ours
    c.optimizer.b1 = 0.9  # ours
    c.optimizer.b2 = 0.95  # ours
    c.optimizer.weight_decay = 0.1
    c.optimizer.clip_norm = 1.0  # ours

    c.train.steps = 715_256  # 12 T tokens
    c.train.logits_chunk = 512
    c.train.log_every = 10
    c.train.plateau_window = 10_000  # ours
    c.train.plateau_tolerance = 0.002  # ours
    c.checkpoint.every = 1000
    c.eval.every = 5000
    c.eval.batch_size = 256
    c.eval.windows = 1024
    c.update_from_flattened_dict(VARIANTS.get(variant, {}))
    return c
