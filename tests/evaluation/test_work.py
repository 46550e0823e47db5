"""Chunks: order, groups, resuming a killed run, fingerprints."""

import json

import pytest

from illada_jax.errors import InputError
from illada_jax.evaluation.work import Answers, Request, Work

REQUESTS = [Request([n, "text"], n // 3, 100 - n // 6) for n in range(30)]


class Recorder:
    """Answers with the number of the request and records the chunks; raises after `lives` chunks."""

    def __init__(self, lives=100):
        self.chunks, self.lives = [], lives

    def __call__(self, indices):
        if not self.lives:
            raise KeyboardInterrupt
        self.lives -= 1
        self.chunks.append(indices)
        return Answers([[index, index / 3] for index in indices], len(indices))


def test_answers_are_in_order_and_groups_together(tmp_path):
    for directory in (None, tmp_path):
        recorder = Recorder()
        work = Work(directory, chunk=8)
        assert [answer[0] for answer in work.run("kind", REQUESTS, recorder)] == list(range(30))
        assert work.evaluations == 30
        for chunk in recorder.chunks:
            assert len(chunk) <= 8 and len(chunk) % 3 == 0
            assert len({REQUESTS[index].group for index in chunk}) == len(chunk) // 3
        sizes = [REQUESTS[index].size for chunk in recorder.chunks for index in chunk]
        assert sizes == sorted(sizes)


def test_a_killed_run_resumes_with_the_same_chunks(tmp_path):
    whole = Recorder()
    expected = Work(tmp_path / "whole", "f", 8).run("kind", REQUESTS, whole)
    killed, rest = Recorder(lives=2), Recorder()
    with pytest.raises(KeyboardInterrupt):
        Work(tmp_path / "killed", "f", 8).run("kind", REQUESTS, killed)
    work = Work(tmp_path / "killed", "f", 8)
    assert work.run("kind", REQUESTS, rest) == expected
    assert killed.chunks + rest.chunks == whole.chunks and work.evaluations == 30
    assert Work(tmp_path / "killed", "f", 8).run("kind", REQUESTS, Recorder(lives=0)) == expected


@pytest.mark.parametrize("change", ["fingerprint", "kind", "content"])
def test_chunks_of_other_work_are_not_used(tmp_path, change):
    Work(tmp_path, "f", 8).run("kind", REQUESTS, Recorder())
    again = Recorder()
    requests = [Request([n, "other"], n // 3, 100 - n // 6) for n in range(30)] if change == "content" else REQUESTS
    Work(tmp_path, "g" if change == "fingerprint" else "f", 8).run(
        "other" if change == "kind" else "kind", requests, again)
    assert len(again.chunks) == 5


def test_an_invalid_chunk_is_named(tmp_path):
    Work(tmp_path, "f", 30).run("kind", REQUESTS, Recorder())
    path = next(tmp_path.glob("kind-*.json"))
    for content in ("{", json.dumps({"answers": [1], "evaluations": 1}), "[1]"):
        path.write_text(content)
        with pytest.raises(InputError, match=path.name):
            Work(tmp_path, "f", 30).run("kind", REQUESTS, Recorder())
