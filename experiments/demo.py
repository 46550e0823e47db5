"""The demo model: a diffusion language model trained on the prose of Python's documentation, on a laptop CPU.

    apt-get install python3.11-doc && pip install beautifulsoup4
    python experiments/corpora/demo_text.py --html=/usr/share/doc/python3.11/html --target=corpora/demo
    python -m illada_jax.main --config=experiments/demo.py
    python -m illada_jax.convert --source=workdirs/demo --target=demo --dtype=bfloat16

79 minutes on one core give a held-out bound of 1.471 ± 0.025 bits per byte; `illada_jax/demo/README.md` is the model
card. `experiments/demo_chat.py` fine-tunes the result.
"""

import ml_collections

from illada_jax import config


def get_config() -> ml_collections.ConfigDict:
    """2.0 M parameters."""
    c = config.defaults()
    c.data.sources = ("jsonl:corpora/demo/prose.jsonl",)
    c.data.tokenizer = "sentencepiece"
    c.data.tokenizer_vocab_size = 4096
    c.data.heldout_fraction = 0.02
    c.data.length = 128
    c.data.batch_size = 16

    c.model.d_model = 160
    c.model.num_layers = 5
    c.model.num_heads = 5
    c.model.num_kv_heads = 1
    c.model.d_ff = 448
    c.model.max_length = 512
    c.model.rope_theta = 500.0
    c.model.scan_unroll = 0
    c.train.logits_chunk = 16
    c.model.dtype = "bfloat16"
    # Half of the windows are split and documents are isolated: sequences of all lengths, as in decoding.
    c.data.isolate_documents = True
    c.diffusion.split_probability = 0.5
    c.diffusion.eps = 0.05

    c.optimizer.name = "muon"
    c.optimizer.learning_rate = 0.004
    c.optimizer.adam_learning_rate = 0.008
    c.optimizer.b2 = 0.99
    c.optimizer.weight_decay = 0.0
    c.optimizer.warmup_steps = 200
    c.train.steps = 8000
    c.optimizer.decay_steps = 5000
    c.checkpoint.every = 500

    c.decode.max_new_tokens = 64
    c.decode.block_length = 8
    c.decode.steps_per_block = 8
    c.decode.temperature = 0.7
    c.eval.every = 2500
    c.eval.draws = 4
    c.eval.evaluators = ("bits_per_byte",)
    c.eval.final = ("infill", "samples")
    c.eval.prompts = ("Return a list of", "The with statement", "A class is")
    return c
