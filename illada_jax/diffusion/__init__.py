"""The diffusion process: corruption, the objective, likelihood bounds.

Begin with `process.corrupt`, which masks a batch: times are spread evenly over the rows, and every mask is a function
of (key, row); `process.corrupt_fixed_count` masks for evaluation. `objective` is the training loss, cross-entropy over
the masking probability, whose expectation bounds -log p(text); `token_losses` computes its cross-entropies without
holding all logits at once. `tests/diffusion/test_exactness.py` proves the bound by enumeration.

May import `config`, and `illada_jax.data` for its `Batch`.
"""
