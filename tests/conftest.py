"""Eight fake devices on the CPU, JAX's guards on, and little optimisation: tests compile much and compute little.

Compiled programs are shared by all tests, worker processes and commands of a run, and kept for the next one, in
`.pytest_cache/compiled`: a program is compiled again only if its code, shapes or options change.
"""

import gc
import os
import pathlib
import signal

from tests.compilation import FAST_COMPILATION

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join([
    os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", FAST_COMPILATION])
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path(__file__).parent.parent / ".pytest_cache" / "compiled")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # no Python locations in programs: they cost time
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest
from hypothesis import HealthCheck, settings

# The same few examples every time in the suite; `python -m tests.faults` asks for many.
settings.register_profile("suite", derandomize=True, max_examples=60, deadline=None, suppress_health_check=[
    HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture])
settings.register_profile("many", settings.get_profile("suite"), max_examples=1000)
settings.register_profile("most", settings.get_profile("suite"), max_examples=10_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests send it; a job in the background would ignore it
gc.set_threshold(100_000, 20, 20)  # tracing makes many objects and little garbage
jax.config.update("jax_numpy_rank_promotion", "raise")

# Left out unless -m asks for them; `.ci/run` does.
ON_REQUEST = {
    "slow": "a whole run, from a command to its end: many seconds",
    "aot": "compiles the 8B model for TPUs: minutes; needs illada_jax[tpu]",
    "notebooks": "runs a notebook: minutes; needs illada_jax[colab]",
}


def pytest_configure(config):
    for name, meaning in ON_REQUEST.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    config.option.markexpr = config.option.markexpr or " and ".join(f"not {name}" for name in ON_REQUEST)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Each worker starts with its half of the tests, in order, so that tests of a file share what they compile."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_dropped():
    """Thousands of live programs reach the limit of memory maps of a process, and slow down the garbage collector."""
    yield
    jax.clear_caches()
    gc.collect()
