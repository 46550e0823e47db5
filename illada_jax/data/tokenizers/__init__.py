"""Tokenizers: lossless, with the special ids that diffusion needs, and chat templates."""
