"""A run of seconds with many saves and evaluations, for injecting faults.

Example:
  python -m illada_jax.main --config=tests/faults/tiny.py --config.data.sources="('text:DIR',)"
"""

from illada_jax import config


def get_config():
    c = config.defaults()
    c.data.update({"tokenizer": "bytes", "length": 32, "batch_size": 8, "heldout_fraction": 0.2})
    c.model.update({"vocab_size": 264, "d_model": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4,
                    "head_dim": 8, "d_ff": 32, "max_length": 64})
    c.optimizer.update({"learning_rate": 3e-3, "warmup_steps": 2})
    c.train.update({"steps": 1500, "log_every": 5, "tensorboard": False, "plateau_window": 100})
    c.checkpoint.update({"every": 20})
    c.eval.update({"every": 30, "windows": 256, "batch_size": 8})
    return c
