"""FLOPs by formula against all matrix products of one sequence, listed by hand."""

import pytest

from illada_jax.config import ModelConfig
from illada_jax.model.flops import forward_flops_per_token, training_flops_per_token

CONFIG = ModelConfig(vocab_size=50, d_model=12, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=4, d_ff=20)


@pytest.mark.parametrize("length", [1, 7, 64])
def test_flops_are_those_of_every_matrix_product(length):
    """(Rows, inner, columns, how many times) of each product; attention is whole, not halved."""
    layer = [(length, 12, 6 * 4, 1), (length, 12, 2 * 4, 2), (length, 6 * 4, 12, 1),  # q; k and v; o
             (length, 4, length, 6), (length, length, 4, 6),  # scores and values of each head
             (length, 12, 20, 2), (length, 20, 12, 1)]  # gate and up; down
    products = 3 * layer + [(length, 12, 50, 1)]
    flops = sum(2 * rows * inner * columns * times for rows, inner, columns, times in products)
    assert forward_flops_per_token(CONFIG, length) * length == pytest.approx(flops, rel=1e-12)
    assert training_flops_per_token(CONFIG, length) == pytest.approx(3 * flops / length, rel=1e-12)
