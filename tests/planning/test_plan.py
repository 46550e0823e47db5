"""Plans, compiled here for eight CPU devices in the place of a TPU's: the same code but the compiler."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from illada_jax import aot
from illada_jax.config import Config, DataConfig, DecodeConfig, DiffusionConfig, MeshConfig, ModelConfig, TrainConfig
from illada_jax.errors import ConfigError, InputError
from illada_jax.model.flops import forward_flops_per_token
from illada_jax.parallel.mesh import make_mesh
from illada_jax.parallel.report import sharding_report
from illada_jax.planning import checks, chips, hlo, programs, roofline
from illada_jax.planning.plan import Options, make_plan
from illada_jax.planning.render import as_markdown, as_text
from illada_jax.training.optimizer import make_optimizer
from illada_jax.training.step import abstract_state

CONFIG = Config(
    model=ModelConfig(vocab_size=320, d_model=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, d_ff=96,
                      max_length=64, attention="xla"),
    data=DataConfig(length=64, batch_size=16), diffusion=DiffusionConfig(mask_id=5),
    train=TrainConfig(steps=1000, logits_chunk=16), mesh=MeshConfig(data=2, fsdp=4),
    decode=DecodeConfig(batch_size=8, block_length=8, steps_per_block=8, max_new_tokens=32),
)


@pytest.fixture
def topology():
    return chips.Topology("v5e:2x4", 1, chips.CHIPS["v5e"], 8, tuple(jax.devices()))


def test_a_training_plan_adds_up(topology):
    plan = make_plan(CONFIG, topology, Options(price=2.0))
    assert plan["fits"] and plan["rows_per_device"] == 2
    assert plan["total_bytes"] + plan["headroom_bytes"] == plan["available_bytes"] == 16 * 2**30
    by_hand = 3 * forward_flops_per_token(CONFIG.model, 64) * 16 * 64 / 8
    assert plan["bounds"]["model_flops"] == pytest.approx(by_hand)
    assert plan["mfu_bound"] == pytest.approx(by_hand / 197e12 / plan["bounds"]["best"])
    assert plan["cost"] == pytest.approx(1000 * plan["bounds"]["best"] / 3600 * 8 * 2.0)
    assert plan["whole_logits"] == [] and plan["replicated_params"] == []
    text = as_text(plan)
    assert "2 rows on a device" in text and "assumptions" in text and "embedding" in text
    assert "| a case | v5e:2x4 | 2, 4, 1 |" in as_markdown([{"name": "a case", "plan": plan}])
    json.dumps(plan)


@pytest.mark.parametrize("mode", ["decode", "score"])
def test_plans_of_the_decoder_and_the_scorer(topology, mode):
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(data=1, fsdp=4, tensor=2))
    plan = make_plan(config, topology, Options(mode=mode, canvas=48))
    assert plan["fits"] and plan["canvas"] == 48
    assert mode in as_text(plan) and mode in as_markdown([{"name": "x", "plan": plan}])


def test_whole_logits_are_found_where_nothing_is_chunked():
    mesh = make_mesh(MeshConfig(fsdp=8))
    whole = dataclasses.replace(CONFIG, mesh=MeshConfig(fsdp=8), train=TrainConfig(steps=1000, logits_chunk=0))
    module = hlo.Module(programs.compile_for(programs.lower_train(whole, mesh)).text)
    assert checks.whole_logits(module, whole, 2, 1)


def test_a_replicated_stack_of_parameters_is_found():
    mesh = make_mesh(MeshConfig(fsdp=8))
    params = abstract_state(CONFIG, make_optimizer(CONFIG), mesh).params
    everywhere = jax.jit(lambda params: jax.tree.map(lambda x: x.astype(jnp.bfloat16), params),
                         out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    module = hlo.Module(everywhere.lower(params).compile().as_text())
    assert any("layers/mlp" in line for line in checks.replicated_params(module, params))


def test_the_sharding_report_names_what_is_on_every_device():
    params = abstract_state(CONFIG, make_optimizer(CONFIG), make_mesh(MeshConfig(fsdp=4, tensor=2))).params
    from illada_jax import model

    report = sharding_report(params, model.param_axes(CONFIG.model), threshold=100)
    gate = next(line for line in report.splitlines() if "mlp/gate" in line).split("  ")
    assert [cell.strip() for cell in gate if cell] == [
        "layers/mlp/gate", "3×64×96", "layers, embed, mlp", "embed→fsdp, mlp→tensor", f"{3 * 16 * 48 * 4:,}"]
    assert report.splitlines()[-1].startswith("on every device: final_norm/scale (256 bytes)")
    assert "nothing of 1,048,576 bytes" in sharding_report(params, model.param_axes(CONFIG.model))


def test_rates_of_decoding_by_hand(topology):
    """A batch so small that reading the params decides: every evaluation takes as long as reading them once."""
    mesh = make_mesh(MeshConfig(fsdp=8))
    rates = {(r["decoding"], r["tokens_per_evaluation"]): r["tokens_per_second"]
             for r in roofline.decode_rates(CONFIG, mesh, topology, 64, 10**12)}
    assert rates["exact", 1] == pytest.approx(8 / (10**12 / 819e9))
    assert rates["exact", 4] == pytest.approx(4 * rates["exact", 1])


def test_peaks_are_matrix_units_times_clock():
    """A clock outside of what chips have would mean that a figure of the table is wrong."""
    for name, chip in chips.CHIPS.items():
        assert 0.9e9 < chip.clock < 2.5e9, (name, chip.clock)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mesh": MeshConfig(fsdp=3)}, r"fsdp=3 × tensor=1: must multiply to the number of devices, 8"),
        ({"mesh": MeshConfig(fsdp=1, tensor=8)}, r"config\.model\.num_heads = 4: must be divisible by mesh\.tensor"),
        ({"model": dataclasses.replace(CONFIG.model, vocab_size=0)}, r"config\.model\.vocab_size = 0"),
    ],
)
def test_configs_that_do_not_fit_the_devices_are_refused(topology, change, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(dataclasses.replace(CONFIG, **change), topology, Options())


def test_unknown_topologies_list_the_known_ones():
    with pytest.raises(InputError, match=r"--topology=v5p:4x5x4: unknown; known for v5p: .*v5p:4x4x4"):
        chips.parse("v5p:4x5x4")
    with pytest.raises(InputError, match=r"known chips: .*v5e"):
        chips.parse("v7q:1x1")


def test_cases_are_checked(tmp_path):
    path = tmp_path / "cases.json"
    for content, message in (("{", "not JSON"), ('[{"name": "x"}]', "case 0: must be an object with name, config"),
                             ('[{"name": "x", "config": "c", "topology": "v5p:9"}]', "known for v5p")):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            aot.read_cases(path)
    with pytest.raises(InputError, match=r"does/not/exist.py"):
        aot.load_config("does/not/exist.py", {})
    with pytest.raises(ConfigError, match="known variants: v5p-128"):
        aot.load_config("experiments/pretrain_8b.py:v5p-7", {})
    assert aot.load_config("experiments/pretrain_8b.py:v5p-128", {"seed": 3}).seed == 3


def test_every_committed_case_is_valid():
    for case in aot.read_cases(aot.pathlib.Path("tpu/cases.json")):
        assert aot.load_config(case["config"], case.get("set", {}))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_the_compiler_it_says_what_to_install():
    command = [sys.executable, "-m", "illada_jax.aot", "--config=experiments/pretrain_8b.py", "--topology=v5p:4x4x4"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "pip install 'illada_jax[tpu]'" in result.stderr
