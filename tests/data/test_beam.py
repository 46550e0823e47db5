"""Preparation on Beam's DirectRunner against the local one. Needs the extra `prepare`."""

import functools
import json

import pytest

pytest.importorskip("apache_beam")

from apache_beam.options.pipeline_options import (
    FlinkRunnerOptions,
    GoogleCloudOptions,
    PipelineOptions,
    SparkRunnerOptions,
    StandardOptions,
)

from illada_jax.data.preparing import jobs
from illada_jax.data.preparing.beam import make_on_beam, parse_options
from illada_jax.data.preparing.settings import Settings
from illada_jax.data.preparing.text import prepare
from illada_jax.errors import InputError

ENGINE = functools.partial(make_on_beam, options=parse_options("DirectRunner", []))
@pytest.fixture
def settings(tmp_path):
    for n in range(6):
        lines = [json.dumps({"text": f"Document {(n * 25 + i) % 90}\n" * 5}) for i in range(30)]
        (tmp_path / f"{n}.jsonl").write_text("\n".join(lines))
    return Settings((f"jsonl:{tmp_path}/*.jsonl",), "sentencepiece", 300, 0.1, shard_bytes=4000)


def contents(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize("drop_duplicates", [False, True])
def test_beam_writes_what_the_local_engine_writes(settings, tmp_path, drop_duplicates):
    settings = Settings(**{**vars(settings), "drop_duplicates": drop_duplicates})
    manifest = prepare(settings, tmp_path / "beam", ENGINE, progress=False)
    prepare(settings, tmp_path / "local", progress=False)
    assert len(manifest.splits["train"]) > 2
    assert contents(tmp_path / "beam") == contents(tmp_path / "local")


def test_beam_goes_on_where_a_local_preparation_stopped(settings, tmp_path, monkeypatch):
    make = jobs.make_shard

    def stop_at_two(directory, job):
        if job.index == 2:
            raise KeyboardInterrupt
        make(directory, job)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(jobs, "make_shard", stop_at_two)
        prepare(settings, tmp_path / "out", progress=False)
    made = (tmp_path / "out" / "train-000000.array_record").stat().st_mtime_ns
    prepare(settings, tmp_path / "out", ENGINE, progress=False)
    assert (tmp_path / "out" / "train-000000.array_record").stat().st_mtime_ns == made
    prepare(settings, tmp_path / "whole", progress=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(("runner", "argument", "view", "name", "value"), [
    ("DataflowRunner", "--project=p", GoogleCloudOptions, "project", "p"),
    ("DataflowRunner", "--temp_location=gs://b/t", GoogleCloudOptions, "temp_location", "gs://b/t"),
    ("FlinkRunner", "--flink_master=host:8081", FlinkRunnerOptions, "flink_master", "host:8081"),
    ("SparkRunner", "--spark_master_url=spark://host:7077", SparkRunnerOptions, "spark_master_url",
     "spark://host:7077"),
])
def test_options_of_runners_are_parsed(runner, argument, view, name, value):
    options = parse_options(runner, [argument])
    assert isinstance(options, PipelineOptions)
    assert options.view_as(StandardOptions).runner == runner
    assert getattr(options.view_as(view), name) == value


@pytest.mark.parametrize("arguments", [["--no_such_option=1"], ["--num_workers=many"], ["stray"]])
def test_bad_options_are_named(arguments):
    with pytest.raises(InputError, match=f"beam_options.*{arguments[0].partition('=')[0].strip('-')}"):
        parse_options("DataflowRunner", arguments)


def test_a_runner_that_does_not_exist_is_named():
    with pytest.raises(InputError, match="NoSuchRunner"):
        parse_options("NoSuchRunner", [])
