"""Text to batches: tokenizers, sources, token shards, packing and the pipeline. jax enters in `pipeline` only."""
