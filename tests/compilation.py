"""XLA flags of tests: they compile much and compute little."""

import importlib.metadata

# One LLVM module per program: there is a test process per core already.
FAST_COMPILATION = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # a third of the time; later versions refuse the flag
    FAST_COMPILATION += " --xla_cpu_use_fusion_emitters=false"
