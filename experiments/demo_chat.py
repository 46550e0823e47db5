"""The demo model fine-tuned in iLLaDA's format: it answers questions about what Python's documentation explains.

    python -m illada_jax.main --config=experiments/demo_chat.py
    python -m illada_jax.generate --checkpoint=workdirs/demo_chat --chat
    python -m illada_jax.convert --source=workdirs/demo_chat --target=demo-chat --dtype=bfloat16

Train `experiments/demo.py` first. The questions come from `experiments/corpora/demo_text.py`: "What does os.listdir
do?", "What is a generator?". 9 minutes on one core; the answers are fluent and often wrong.
"""

import ml_collections

from illada_jax import config


def get_config() -> ml_collections.ConfigDict:
    """The sizes of `experiments/demo.py`."""
    c = config.defaults()
    c.init.checkpoint = "workdirs/demo"
    c.data.sources = ("chat:corpora/demo/questions.jsonl",)
    c.data.tokenizer = "checkpoint"
    c.data.heldout_fraction = 0.02
    c.data.length = 128
    c.data.batch_size = 16
    # Isolated, so that an answer ends by itself and not because a question follows.
    c.data.isolate_documents = True
    c.sft.format = "illada"
    c.diffusion.split_probability = 0.3
    c.diffusion.eps = 0.05

    c.model.d_model = 160
    c.model.num_layers = 5
    c.model.num_heads = 5
    c.model.num_kv_heads = 1
    c.model.d_ff = 448
    c.model.max_length = 512
    c.model.rope_theta = 500.0
    c.model.scan_unroll = 0
    c.model.dtype = "bfloat16"
    c.train.logits_chunk = 16

    c.optimizer.name = "muon"
    c.optimizer.learning_rate = 0.002
    c.optimizer.adam_learning_rate = 0.004
    c.optimizer.b2 = 0.99
    c.optimizer.weight_decay = 0.0
    c.optimizer.warmup_steps = 50
    c.optimizer.decay_fraction = 0.5
    c.train.steps = 0
    c.train.epochs = 6
    c.checkpoint.every = 200

    c.decode.max_new_tokens = 96
    c.decode.block_length = 8
    c.decode.steps_per_block = 8
    c.decode.temperature = 0.3
    c.eval.every_epochs = 2.0
    c.eval.rows = 32
    c.eval.evaluators = ("bits_per_byte", "exact_match")
    return c
