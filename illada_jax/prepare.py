"""Turns text into token shards for training, and trains a tokenizer when asked.

    python -m illada_jax.prepare --source=text:books/ --target=corpora/books --tokenizer=sentencepiece --vocab_size=8192
    python -m illada_jax.prepare --source='jsonl:web/*.jsonl.gz#content' --target=corpora/web --tokenizer=tokenizer.json
    python -m illada_jax.prepare --source=parquet:hub/data:content --target=corpora/hub --tokenizer=bytes

Then train on it with --config.data.sources="('prepared:corpora/books',)". Kinds of sources: text, jsonl, parquet,
python_docs, python_source, sudoku. To continue a preparation that was stopped, repeat the command.

On a cluster (pip install 'illada_jax[prepare]'), sources and target must be on a disk or mounted bucket that every
worker sees under the same path, and the workers' image must contain this package. The shards are those of a local run:

    python -m illada_jax.prepare … --runner=DataflowRunner --beam_options='--project=P --region=R
        --temp_location=gs://B/tmp --sdk_container_image=IMAGE'
    python -m illada_jax.prepare … --runner=FlinkRunner --beam_options='--flink_master=HOST:8081'
    python -m illada_jax.prepare … --runner=SparkRunner --beam_options='--spark_master_url=spark://HOST:7077'
"""

import functools
import os
import pathlib
import shlex
import sys

from absl import flags

from illada_jax import cli
from illada_jax.config import DataConfig
from illada_jax.data.preparing.jobs import Engine, make_locally
from illada_jax.data.preparing.settings import Settings
from illada_jax.data.preparing.text import prepare
from illada_jax.errors import InputError

_SOURCE = flags.DEFINE_multi_string(
    "source", None, "source of text: KIND, KIND:PATH, jsonl:PATH#FIELD or parquet:PATH:COLUMN; may be repeated")
_TARGET = flags.DEFINE_string("target", None, "directory to write: new, empty or the same preparation, unfinished")
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", "sentencepiece",
    "bytes, sentencepiece (trained on the corpus), or the path of a .model, a tokenizer.json or a saved tokenizer")
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 4096, "ids of a tokenizer that is trained on the corpus")
_HELDOUT_FRACTION = flags.DEFINE_float("heldout_fraction", 0.02, "share of documents that training never sees")
_DROP_DUPLICATES = flags.DEFINE_bool("drop_duplicates", False, "keep only the first of documents with the same text")
_SHARD_MEGABYTES = flags.DEFINE_float("shard_megabytes", 64, "approximate text of a shard; files are not divided")
_MAX_DOCUMENT_MEGABYTES = flags.DEFINE_float("max_document_megabytes", DataConfig.max_document_megabytes,
                                              "longest document or record; a longer one is an error")
_PROCESSES = flags.DEFINE_integer("processes", 0, "local processes that make shards; 0: one per core")
_RUNNER = flags.DEFINE_string("runner", "local", "local, or an Apache Beam runner (extra: prepare)")
_BEAM_OPTIONS = flags.DEFINE_string("beam_options", "", "options of Beam and its runner, as on a command line")


def main(_: list[str]) -> None:
    """Prepares one corpus."""
    if not _SOURCE.value:
        raise InputError("--source is required, for example --source=text:books/")
    if not _TARGET.value:
        raise InputError("--target is required: the directory to write")
    if _PROCESSES.value < 0:
        raise InputError(f"--processes={_PROCESSES.value}: must be 0 or more")
    settings = Settings(
        sources=tuple(_SOURCE.value),
        tokenizer=_TOKENIZER.value,
        vocab_size=_VOCAB_SIZE.value,
        heldout_fraction=_HELDOUT_FRACTION.value,
        drop_duplicates=_DROP_DUPLICATES.value,
        shard_bytes=int(_SHARD_MEGABYTES.value * 2**20),
        max_document_bytes=int(_MAX_DOCUMENT_MEGABYTES.value * 2**20),
    )
    target = pathlib.Path(_TARGET.value)
    manifest = prepare(settings, target, _engine())
    for split, infos in manifest.splits.items():
        tokens, documents, num_bytes = (sum(getattr(info, f"num_{what}") for info in infos)
                                        for what in ("tokens", "documents", "bytes"))
        print(f"{split:8} {tokens:,} tokens, {documents:,} documents, {num_bytes:,} bytes, {len(infos)} shards")
    for line in (*manifest.dropped, manifest.split_warning):
        if line:
            print(line, file=sys.stderr)
    print(f"vocabulary {manifest.vocab_size:,} ids, fingerprint {manifest.fingerprint}")
    print(f"Train on it with: --config.data.sources=\"('prepared:{target}',)\"")


def _engine() -> Engine:
    if _RUNNER.value == "local":
        if _BEAM_OPTIONS.value:
            raise InputError("--beam_options: needs a --runner other than local")
        return functools.partial(make_locally, num_processes=_PROCESSES.value or os.cpu_count() or 1)
    try:
        from illada_jax.data.preparing import beam
    except ImportError as error:
        raise InputError(f"--runner={_RUNNER.value}: Apache Beam is not installed; type: "
                         "pip install 'illada_jax[prepare]'") from error
    options = beam.parse_options(_RUNNER.value, shlex.split(_BEAM_OPTIONS.value))
    return functools.partial(beam.make_on_beam, options=options)


if __name__ == "__main__":
    cli.run(main)
