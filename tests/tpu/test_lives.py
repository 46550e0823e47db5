"""A few lives of a spot pod; `python -m tests.tpu.simulation` lives 200."""

import pytest

from tests.tpu.simulation import live


@pytest.mark.parametrize(("backend", "seed"), [("gcloud", 1), ("gcloud", 2), ("xpk", 1)])
def test_a_spot_pod_is_kept_going_until_its_task_is_complete(backend, seed):
    live(seed, backend)
