"""Jobs on Apache Beam, with any runner. Needs the extra `prepare`.

Every worker must see the sources and the target under the same paths (on a mounted bucket or disk) and have this
package installed.
"""

import argparse
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

from illada_jax.data.preparing.jobs import ShardJob, TextJob, done_path, make_shard
from illada_jax.errors import InputError


@dataclass(frozen=True)
class BeamEngine:
    """A Beam pipeline; see jobs.Engine.

    Attributes:
      options: the runner and its options.
    """

    options: PipelineOptions

    def make(self, jobs: Sequence[ShardJob], directory: pathlib.Path, drop_duplicates: bool) -> None:
        """See jobs.Engine."""
        missing = [job for job in jobs if not done_path(directory, job.index).exists()]
        with beam.Pipeline(options=self.options) as pipeline:
            keyed = pipeline | "missing" >> beam.Create([(job.index, job) for job in missing]) | beam.Reshuffle()
            duplicates = pipeline | "none" >> beam.Create([])
            if drop_duplicates:
                duplicates = (
                    pipeline
                    | "all" >> beam.Create(jobs)
                    | "spread" >> beam.Reshuffle()
                    | beam.FlatMap(_places_by_digest)
                    | "same text" >> beam.GroupByKey()
                    | beam.FlatMap(_later_places)
                )
            (
                {"job": keyed, "duplicates": duplicates}
                | beam.CoGroupByKey()
                | "make" >> beam.Map(_make, directory)
            )


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


def _places_by_digest(job: TextJob) -> Iterator[tuple[bytes, tuple[int, int]]]:
    for position, digest in enumerate(job.digests()):
        yield digest.tobytes(), (job.index, position)


def _later_places(same: tuple[bytes, Iterable[tuple[int, int]]]) -> Iterator[tuple[int, int]]:
    """All positions (job, index of the document) of a text except the first."""
    _, places = same
    yield from sorted(places)[1:]


def _make(of_job: tuple[int, dict[str, Iterable]], directory: pathlib.Path) -> None:
    _, found = of_job
    for job in found["job"]:  # none if its shard is done
        make_shard(directory, job.without(found["duplicates"]))
