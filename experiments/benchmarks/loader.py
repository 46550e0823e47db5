"""Speed of the data pipeline: mixture, random splits and isolated documents at a length of 8,192, from token shards.

Example:
  python experiments/benchmarks/loader.py --batches=10000

Writes three corpora of random tokens, mixes them, and reads batches both directly (one thread) and through Grain's
read-ahead. Prints tokens per second, tokens per second of processor time (summed over threads), the resident memory on
the way, and the shares of the mixture beside its weights. The shards are in the system's page cache: the figures
describe the loader, not a disk.
"""

import itertools
import pathlib
import tempfile
import time
from collections.abc import Iterator

import numpy as np
from absl import flags

from illada_jax import cli
from illada_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig
from illada_jax.data.batch import Batch
from illada_jax.data.corpus import open_corpus
from illada_jax.data.manifest import Manifest
from illada_jax.data.pipeline import Pipeline
from illada_jax.data.shards import ShardWriter
from illada_jax.data.tokenizers import ByteTokenizer

_LENGTH = flags.DEFINE_integer("length", 8192, "tokens of a row")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "rows of a batch")
_BATCHES = flags.DEFINE_integer("batches", 2000, "batches to read")
_THREADS = flags.DEFINE_integer("threads", 2, "read-ahead threads")
_MILLION_TOKENS = flags.DEFINE_integer("million_tokens", 60, "total size of the corpora")
_SHARDS = flags.DEFINE_integer("shards", 300, "total number of shards")

WEIGHTS = (0.6, 0.3, 0.1)
_IDS_PER_CORPUS = 80


def write_corpus(directory: pathlib.Path, num_tokens: int, num_shards: int, seed: int) -> None:
    """Writes random tokens in documents of about 1,000; each seed has its own range of ids."""
    tokenizer, draw, infos = ByteTokenizer(), np.random.default_rng(seed), []
    tokenizer.save(directory / "tokenizer")
    for n in range(num_shards):
        writer = ShardWriter(directory / f"train-{n:06d}.array_record", tokenizer.vocab_size)
        left = num_tokens // num_shards
        while left > 0:
            size = min(left, int(draw.exponential(1000)) + 1)
            first = 4 + _IDS_PER_CORPUS * seed
            writer.add([*draw.integers(first, first + _IDS_PER_CORPUS, size), tokenizer.eos_id], size)
            left -= size + 1
        infos.append(writer.close())
    manifest = Manifest((f"random:{seed}",), tokenizer.fingerprint, tokenizer.vocab_size, 0.0,
                        {"train": tuple(infos), "heldout": ()})
    manifest.save(directory)


def measure(name: str, batches: Iterator[Batch], count: int) -> None:
    """Reads `count` batches and prints the speed and the resident memory."""
    next(batches)
    tokens, memory, wall, processor = 0, [resident_megabytes()], time.perf_counter(), time.process_time()
    for n, batch in enumerate(itertools.islice(batches, count), 1):
        tokens += batch.tokens_BL.size
        if n % -(-count // 5) == 0 or n == count:
            memory.append(resident_megabytes())
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    print(f"{name:12} {tokens / wall / 1e6:8.1f} M tokens/s, {tokens / processor / 1e6:8.1f} M tokens/s of processor "
          f"time, {count} batches; resident MB: {', '.join(f'{m:.0f}' for m in memory)}")


def resident_megabytes() -> float:
    """Resident memory of this process (Linux)."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def main(_: list[str]) -> None:
    """Writes the corpora, reads the mixture, prints the figures."""
    with tempfile.TemporaryDirectory() as scratch:
        directories = [pathlib.Path(scratch) / name for name in "abc"]
        for seed, directory in enumerate(directories):
            write_corpus(directory, _MILLION_TOKENS.value * 10**6 // 3, _SHARDS.value // 3, seed)
        data = DataConfig(
            sources=tuple(f"prepared:{directory}" for directory in directories), weights=WEIGHTS,
            length=_LENGTH.value, batch_size=_BATCH_SIZE.value, num_threads=_THREADS.value, isolate_documents=True)
        config = Config(data=data, model=ModelConfig(max_length=_LENGTH.value),
                        diffusion=DiffusionConfig(split_probability=0.3))
        began = time.perf_counter()
        corpus = open_corpus(data)
        print(f"opened {_SHARDS.value} shards in {time.perf_counter() - began:.3f} s")
        pipeline, rows = Pipeline(config, corpus), np.arange(_BATCH_SIZE.value)
        measure("direct", (pipeline.rows(step, rows) for step in itertools.count()), _BATCHES.value)
        measure("read ahead", pipeline.iterate(0, rows), _BATCHES.value)
        origin = [(pipeline.rows(step, rows).tokens_BL.max(axis=1) - 4) // _IDS_PER_CORPUS for step in range(200)]
        shares = np.bincount(np.concatenate(origin), minlength=len(WEIGHTS)) / (200 * len(rows))
        epochs = pipeline.epochs(_BATCHES.value)
        for component, share, (name, count) in zip(corpus.components, shares, epochs.items(), strict=True):
            print(f"corpus {name}: weight {component.weight}, share {share:.4f} of {200 * len(rows)} rows, "
                  f"{count:.2f} epochs after {_BATCHES.value} batches")


if __name__ == "__main__":
    cli.run(main)
