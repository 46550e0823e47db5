"""The step of the whole 8B model, compiled for 64 chips by the TPU's own compiler: two to three minutes."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from illada_jax.aot import load_config
from illada_jax.parallel.mesh import make_mesh
from illada_jax.planning import chips

ROOT = pathlib.Path(__file__).parents[2]

CASES = json.loads((ROOT / "tpu" / "cases.json").read_text())
needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                                    reason="needs the compiler for TPU: pip install 'illada_jax[tpu]'")


@pytest.mark.aot
@needs_compiler
def test_every_mesh_of_the_report_lies_on_its_chips():
    for case in CASES:
        config = load_config(case["config"], case.get("set", {}))
        topology = chips.get_topology(case["topology"], case.get("num_slices", 1))
        mesh = make_mesh(config.mesh, topology.devices)
        assert mesh.size == len(topology.devices) == topology.num_chips * topology.chip.devices, case["name"]


@pytest.mark.aot
@needs_compiler
def test_the_8b_step_compiles_for_a_pod(tmp_path):
    """It fits, and no device ever holds the logits of a row, a whole stack of parameters or its gradient."""
    # Not in this process, whose flags make eight devices of the processor.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "illada_jax.aot", "--config=experiments/pretrain_8b.py", "--topology=v5p:4x4x4",
               "--config.data.batch_size=64", f"--json={tmp_path / 'plan.json'}"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"] and plan["chips"] == 64 and plan["rows_per_device"] == 1
    assert plan["model"]["parameters"] > 7.5e9 and plan["model"]["attention"] == "splash"
    assert plan["whole_logits"] == [] and plan["replicated_params"] == []
    # Parameters and both moments in float32, a 64th of them on each device.
    state = 12 * plan["model"]["parameters"] / 64
    assert state < plan["argument_bytes"] < 1.01 * state
    assert plan["temporary_bytes"] < 10.5 * 2**30
    assert plan["peak_bytes"] - plan["argument_bytes"] < 6.5 * 2**30, "the rest are gaps between arrays"
    # Every layer calls the kernel forward twice (full rematerialisation) and backward once.
    calls = plan["work"]["kernels"]
    assert sum(count for name, count in calls.items() if "fwd" in name) == 64
    assert sum(count for name, count in calls.items() if "dkv" in name) == 32
    assert 0.4 < plan["mfu_without_overlap"] <= plan["mfu_bound"] < 0.75, "between what is poor and full remat's 3/4"
