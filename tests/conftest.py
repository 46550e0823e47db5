"""Eight fake devices on the CPU, jax's guards on, and little optimisation: tests compile much and compute little."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join([
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
])

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    config.addinivalue_line("markers", "aot: compiles the 8B model for TPUs: minutes; needs illada_jax[tpu]")
