"""Eight fake devices on the CPU, jax's guards on, and little optimisation: tests compile much and compute little."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join([
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
])

import jax
from hypothesis import HealthCheck, settings

# The same few examples every time in the suite; `python -m tests.faults` asks for many.
settings.register_profile("suite", derandomize=True, max_examples=60, deadline=None, suppress_health_check=[
    HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture])
settings.register_profile("many", settings.get_profile("suite"), max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    config.addinivalue_line("markers", "aot: compiles the 8B model for TPUs: minutes; needs illada_jax[tpu]")
    config.addinivalue_line("markers", "notebooks: runs a notebook: minutes; needs illada_jax[colab] and -m notebooks")
    config.addinivalue_line("markers", "slow: builds and installs, or trains from end to end: half a minute or more")
