"""Decodes prompts of random lengths with a tiny model, and reports memory and compiled programs.

Example:
  python -m tests.faults.many_prompts --prompts=2000
"""

import argparse
import collections
import json
import pathlib

import jax
import numpy as np

from illada_jax import api
from illada_jax.config import Config, DecodeConfig, ModelConfig
from illada_jax.data.tokenizers import ByteTokenizer
from illada_jax.decoding import decoder
from tests.util import random_params

_MODEL = ModelConfig(vocab_size=264, d_model=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=32,
                     max_length=512)
_DECODE = DecodeConfig(max_new_tokens=8, block_length=8, steps_per_block=8)
_LARGEST_BATCH = 8


def memory() -> float:
    """Resident memory of this process in MiB, without pages of files, which the system drops and reads again."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) / 1024


def decode(count: int) -> dict:
    """Decodes batches of 1 to 8 prompts; returns memory and compilations so far, calls by shape, and their bound."""
    compiled, shapes = [], collections.Counter()
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None)
    run_blocks = decoder.run_blocks

    def counted(logits_fn, carry, *arguments, **options):
        shapes["×".join(map(str, carry.tokens_BL.shape))] += 1
        return run_blocks(logits_fn, carry, *arguments, **options)

    decoder.run_blocks = counted
    lm = api.LanguageModel(Config(model=_MODEL, decode=_DECODE), random_params(_MODEL), ByteTokenizer())
    draw, done, samples = np.random.default_rng(0), 0, []
    while done < count:
        prompts = ["x" * length for length in draw.integers(1, 480, draw.integers(1, _LARGEST_BATCH + 1))]
        lm.generate(prompts)
        done += len(prompts)
        samples.append((done, memory(), len(compiled)))
    # A canvas has one of these lengths, and a batch a power of two of rows.
    most = len(decoder.canvas_buckets(_MODEL.max_length)) * _LARGEST_BATCH.bit_length()
    return {"samples": samples, "shapes": dict(sorted(shapes.items())), "most": most}


def main() -> None:
    """Decodes and prints the result as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.many_prompts", description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=2000)
    print(json.dumps(decode(parser.parse_args().prompts)))


if __name__ == "__main__":
    main()
