"""Floating-point operations by formula: a compiler's own count misses scanned layers and kernels."""

from illada_jax.config import ModelConfig


def forward_flops_per_token(config: ModelConfig, length: int) -> float:
    """FLOPs of one forward pass per token of a sequence of `length` tokens; a multiply-add counts as two.

    Attention is bidirectional, so it is not halved. Embedding lookup, norms and softmax are not counted.
    """
    c = config
    heads = c.d_model * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    feed_forward = 3 * c.d_model * c.d_ff
    attention = 2 * length * c.num_heads * c.head_dim
    return 2.0 * (c.num_layers * (heads + feed_forward + attention) + c.d_model * c.vocab_size)


def training_flops_per_token(config: ModelConfig, length: int) -> float:
    """FLOPs of forward and backward pass per token, without rematerialisation."""
    return 3 * forward_flops_per_token(config, length)
