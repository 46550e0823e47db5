"""iLLaDA 8B, supervised fine-tuning for 12 epochs (arXiv 2606.25331).

    python -m illada_jax.main --config=experiments/sft_8b.py --dry_run
    python -m illada_jax.main --config=experiments/sft_8b.py --config.init.checkpoint=gs://BUCKET/illada-8b \
        --config.data.sources='("chat:/data/sft/*.jsonl.zst",)' --workdir=gs://BUCKET/illada-8b-instruct

Published: examples end with one EOS, are concatenated and cut into windows of 8,192 tokens, everything may
be masked, 30 % of the windows are split; about 25 B tokens for 12 epochs; AdamW with weight decay 0.1; the rate rises
to 5e-6, stays, and falls linearly to 5e-7 in the last tenth. Not published, hence ours: the batch (256 rows: 2.1 M
tokens a step, about 143,000 steps for 25 B tokens), the warm-up (50 steps, as in LLaDA), betas and clipping, and that
examples in a window attend to each other (`data.isolate_documents`; experiments/studies/split_isolation.py compares).
Compiled for pods (`tpu/REPORT.md`), not trained.
"""

import ml_collections

from illada_jax import config


def get_config() -> ml_collections.ConfigDict:
    """The published recipe; our choices are marked."""
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
    c.model.dtype = "bfloat16"
    c.model.remat = "full"

    c.init.checkpoint = "workdirs/pretrain_8b"
    c.data.sources = ("chat:/data/sft/*.jsonl.zst",)
    c.data.tokenizer = "checkpoint"
    c.data.heldout_fraction = 0.001
    c.data.length = 8192
    c.data.batch_size = 256  # ours
    c.data.isolate_documents = False  # ours
    c.sft.format = "illada"
    c.diffusion.split_probability = 0.3
    c.diffusion.mask_id = 5

    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 5e-6
    c.optimizer.final_learning_rate = 5e-7
    c.optimizer.decay_shape = "linear"
    c.optimizer.decay_fraction = 0.1
    c.optimizer.warmup_steps = 50  # ours
    c.optimizer.b1 = 0.9  # ours
    c.optimizer.b2 = 0.95  # ours
    c.optimizer.weight_decay = 0.1
    c.optimizer.clip_norm = 1.0  # ours

    c.train.steps = 0
    c.train.epochs = 12
    c.train.logits_chunk = 512
    c.train.log_every = 10
    c.checkpoint.every = 1000

    c.decode.max_new_tokens = 2048
    c.decode.block_length = 32
    c.decode.steps_per_block = 32
    c.eval.every_epochs = 3.0
    c.eval.evaluators = ("exact_match",)
    c.eval.answer_metric = "numeric"
    c.eval.rows = 256
    return c
