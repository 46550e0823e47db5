"""Text to batches: tokenizers, sources, token shards, packing and the pipeline.

Text goes through `tokenizer` into `shards` (`preparing` does it, with several processes or on Beam), and comes out of
`pipeline` as a `batch.Batch` of a step: rows are a function of (data config, seed, step, row), so that nothing need be
saved to resume. Begin with `batch`, the struct that everything else is about, then `sources` (what can be read; one
function each) and `pipeline`. Conversations and other examples of fine-tuning have `chat`, `examples` and `finetuning`.

May import the config alone, and not jax: preparing a corpus needs no accelerator.
"""
