"""Jobs on Apache Beam, with any runner. Needs the extra `prepare`.

Every worker must see the sources and the target under the same paths (on a mounted bucket or disk) and have this
package installed.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

from illada_jax.data.preparing.jobs import ShardJob, TextJob, make_shard
from illada_jax.errors import InputError


def make_on_beam(jobs: Sequence[ShardJob], directory: pathlib.Path, drop_duplicates: bool, options: PipelineOptions
                 ) -> None:
    """An engine (see `jobs.Engine`) of Beam workers; `options` are those of the runner."""
    with beam.Pipeline(options=options) as pipeline:
        keyed = pipeline | beam.Create([(job.index, job) for job in jobs]) | beam.Reshuffle()
        duplicates = pipeline | "none" >> beam.Create([])
        if drop_duplicates:
            places = keyed | beam.FlatMap(_places_by_digest) | "same text" >> beam.GroupByKey()
            duplicates = places | beam.FlatMap(_later_places)
        {"job": keyed, "duplicates": duplicates} | beam.CoGroupByKey() | "make" >> beam.Map(_make, directory)


def parse_options(runner: str, arguments: Sequence[str]) -> PipelineOptions:
    """Options of a pipeline.

    Args:
      runner: name of a Beam runner, such as DataflowRunner.
      arguments: options of Beam and the runner as on a command line: `--project=…`.

    Raises:
      InputError: the runner or an option is unknown, or a value is of the wrong type.
    """
    if runner not in StandardOptions.KNOWN_RUNNER_NAMES:
        raise InputError(f"--runner={runner}: unknown; known: local, {', '.join(StandardOptions.KNOWN_RUNNER_NAMES)}")
    options = PipelineOptions([f"--runner={runner}", *arguments])
    try:
        known = options.get_all_options()
    except (argparse.ArgumentError, SystemExit, ValueError) as error:
        raise InputError(f"--beam_options: a value in {' '.join(arguments)!r} is invalid for its option") from error
    for argument in arguments:
        name = argument.removeprefix("--").partition("=")[0]
        if not argument.startswith("--") or name not in known:
            raise InputError(f"--beam_options: {argument}: not an option of Beam; write options as --name=value")
    return options


def _places_by_digest(of_job: tuple[int, TextJob]) -> Iterator[tuple[bytes, tuple[int, int]]]:
    index, job = of_job
    for position, digest in enumerate(job.digests()):
        yield digest.tobytes(), (index, position)


def _later_places(same: tuple[bytes, Iterable[tuple[int, int]]]) -> Iterator[tuple[int, int]]:
    """All positions (job, index of the document) of a text except the first."""
    _, places = same
    yield from sorted(places)[1:]


def _make(of_job: tuple[int, dict[str, Iterable]], directory: pathlib.Path) -> None:
    _, found = of_job
    (job,) = found["job"]
    make_shard(directory, dataclasses.replace(job, duplicates=frozenset(found["duplicates"])))
