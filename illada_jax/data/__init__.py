"""From text and examples to batches: sources, tokenizers, preparation, token shards and the pipeline.

`preparing` encodes `sources` with one of the `tokenizers` into `shards`, with a `manifest`; `corpus` opens the corpora
of a config. `pipeline` (text) and `finetuning` (examples) turn the tokens into a `batch.Batch` for every step. A row is
a function of (config, data, step, row) alone, so resuming needs no saved state. Begin with `batch`, the struct that
training takes, then read `pipeline`.

May import config, errors and files only, and never JAX: preparing a corpus needs no accelerator.
"""
