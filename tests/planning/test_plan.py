"""Plans compiled for eight CPU devices instead of TPUs: the same code with another compiler."""

import dataclasses
import functools
import importlib.util
import json
import math
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from illada_jax import aot
from illada_jax.config import Config, DataConfig, DecodeConfig, DiffusionConfig, MeshConfig, ModelConfig, TrainConfig
from illada_jax.errors import ConfigError, InputError
from illada_jax.model.flops import forward_flops_per_token
from illada_jax.parallel.mesh import AXES, check_divisible, check_model_divisible, make_mesh
from illada_jax.parallel.sharding import sharding_report
from illada_jax.planning import checks, chips, hlo, programs, roofline, saving
from illada_jax.planning.plan import Options, make_plan
from illada_jax.planning.render import as_markdown, as_text
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
    return chips.Topology("v5e:2x4", 1, chips.CHIPS["v5e"], tuple(jax.devices()))


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
    title = {"decode": "## Decoding", "score": "## Scoring"}[mode]
    assert mode in as_text(plan) and title in as_markdown([{"name": "x", "plan": plan}])


def test_whole_logits_are_found_where_nothing_is_chunked():
    mesh = make_mesh(MeshConfig(fsdp=8))
    whole = dataclasses.replace(CONFIG, mesh=MeshConfig(fsdp=8), train=TrainConfig(steps=1000, logits_chunk=0))
    module = hlo.Module(programs.compile_lowered(programs.lower_train(whole, mesh))[0])
    assert checks.whole_logits(module, whole, 2, 1)


def test_a_replicated_stack_of_parameters_is_found():
    mesh = make_mesh(MeshConfig(fsdp=8))
    params = abstract_state(CONFIG, mesh).params
    everywhere = jax.jit(lambda params: jax.tree.map(lambda x: x.astype(jnp.bfloat16), params),
                         out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    module = hlo.Module(everywhere.lower(params).compile().as_text())
    assert any("layers/mlp" in line for line in checks.replicated_params(module, params))


STACK = (3, 64, 4, 16)


@pytest.mark.parametrize(("function", "is_found"), [
    (lambda w, x, whole: whole(w.astype(jnp.bfloat16)), True),
    (lambda w, x, whole: jax.lax.scan(lambda _, one: (None, whole(one).astype(jnp.bfloat16)), None, w)[1], True),
    (lambda w, x, whole: jnp.tanh(x.astype(jnp.float32)) * whole(w), True),
    (lambda w, x, whole: whole(jnp.tanh(x.astype(jnp.float32)).at[1].set(2.0)), True),
    (lambda w, x, whole: whole(jnp.tanh(x) * w.sum().astype(x.dtype)), False),
    (lambda w, x, whole: whole(jnp.tanh(x).transpose(1, 2, 0, 3) * w.sum().astype(x.dtype)), False),
], ids=["copy", "gathered_layer_by_layer", "updated", "gradient", "activation_of_that_shape", "permuted_activation"])
def test_what_counts_as_a_replicated_stack(function, is_found):
    """Copies of the params and float32 arrays of their shape do; activations that happen to be as large do not."""
    mesh = make_mesh(MeshConfig(fsdp=8))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    whole = functools.partial(jax.lax.with_sharding_constraint, shardings=everywhere)
    w = jax.ShapeDtypeStruct(STACK, jnp.float32, sharding=spread)
    x = jax.ShapeDtypeStruct(STACK, jnp.bfloat16, sharding=everywhere)
    text = jax.jit(lambda w, x: function(w, x, whole)).lower(w, x).compile().as_text()
    assert bool(checks.replicated_params(hlo.Module(text), {"w": w})) is is_found


def test_the_sharding_report_names_what_is_on_every_device():
    params = abstract_state(CONFIG, make_mesh(MeshConfig(fsdp=4, tensor=2))).params
    from illada_jax import model

    report = sharding_report(params, model.param_axes(CONFIG.model), threshold=100)
    gate = next(line for line in report.splitlines() if "mlp/gate" in line).split("  ")
    assert [cell.strip() for cell in gate if cell] == [
        "layers/mlp/gate", "3×64×96", "layers, embed, mlp", "embed→fsdp, mlp→tensor", f"{3 * 16 * 48 * 4:,}"]
    assert report.splitlines()[-1].startswith("on every device: final_norm/scale (256 bytes)")
    assert "nothing of 1,048,576 bytes" in sharding_report(params, model.param_axes(CONFIG.model))


@pytest.mark.parametrize("mode", ["decode", "score"])
def test_eight_bit_weights_are_planned_as_they_are_loaded(topology, mode):
    """Matrices take a byte and a scale for each output; the embedding, tied to the head, and the norms stay."""
    one = dataclasses.replace(topology, devices=topology.devices[:1])
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(fsdp=1))
    plan = make_plan(config, one, Options(mode=mode, canvas=48, quantize="int8"))
    layer = 64 * 16 * (2 * 4 + 2 * 2) + 3 * 64 * 96
    scales = 16 * (4 + 2 * 2) + 64 + 2 * 96 + 64
    embedding_and_norms = 4 * (320 * 64 + 64 * (2 * 3 + 1))
    assert CONFIG.model.tied_head
    assert plan["param_bytes"] == 3 * (layer + 4 * scales) + embedding_and_norms
    assert plan["argument_bytes"] >= plan["param_bytes"]
    assert "int8" in as_text(plan) and "| int8 |" in as_markdown([{"name": "x", "plan": plan}])


def test_evaluations_by_hand(topology):
    """Params of a device that take longer to read than anything else; then a tensor axis whose sums do."""
    mesh = make_mesh(MeshConfig(fsdp=1, tensor=1), jax.devices()[:1])
    bounds = roofline.evaluation_bounds(CONFIG, mesh, topology, 64, 10**12, cached=False)
    assert bounds["best"] == bounds["hbm"] == pytest.approx(10**12 / 819e9) and bounds["ici"] == 0
    head = 2 * 64 * 320
    assert bounds["compute"] == pytest.approx(
        8 * (64 * (forward_flops_per_token(CONFIG.model, 64) - head) + 8 * head) / 197e12)
    cached = roofline.evaluation_bounds(CONFIG, mesh, topology, 64, 0, cached=True)
    assert cached["hbm"] == pytest.approx(2 * 8 * 64 * 3 * 2 * 16 * 4 / 819e9)
    assert cached["compute"] == pytest.approx(8 * 8 * forward_flops_per_token(CONFIG.model, 64) / 197e12)
    two = make_mesh(MeshConfig(fsdp=1, tensor=2), jax.devices()[:2])
    halves = roofline.evaluation_bounds(CONFIG, two, topology, 64, 0, cached=True)
    assert halves["ici"] == pytest.approx(2 * 3 * (8 * 8 * 64 * 4) * 2 / 2 / 200e9)
    assert halves["compute"] == pytest.approx(cached["compute"] / 2)
    spread = roofline.evaluation_bounds(CONFIG, make_mesh(MeshConfig(fsdp=8)), topology, 64, 10**12, cached=False)
    assert spread["hbm"] == pytest.approx(8 * 10**12 / 819e9) and spread["ici"] == pytest.approx(7 * 10**12 / 200e9)


def test_rates_follow_from_evaluations():
    rates = {(r["decoding"], r["tokens_per_evaluation"]): r["tokens_per_second"]
             for r in roofline.decode_rates(CONFIG, 0.5, 0.02)}
    assert rates["exact", 1] == pytest.approx(8 * 8 / (8 * 0.5))
    assert rates["exact", 4] == pytest.approx(8 * 8 / (2 * 0.5))
    assert rates["prefix cache", 2] == pytest.approx(8 * 8 / (0.5 + 3 * 0.02))


def test_peaks_are_matrix_units_times_clock():
    """An implausible clock would mean that a figure of the table is wrong."""
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


@pytest.mark.parametrize("message", [
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.25G of 15.75G "
    "hbm. Exceeded hbm capacity by 4.50G.",
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (20.25G) exceeds "
    "available HBM (15.75G).",
])
@pytest.mark.parametrize(("options", "config", "ways"), [
    (Options(), {"model": dataclasses.replace(CONFIG.model, remat="dots")},
     r"more --config\.train\.microbatches than 1 \(2 rows on a device\); --config\.model\.remat=full \(dots keeps "
     r"more\); a smaller --config\.mesh\.data than 2"),
    (Options(), {"data": DataConfig(length=64, batch_size=8), "mesh": MeshConfig(fsdp=8),
                 "model": dataclasses.replace(CONFIG.model, remat="full")}, r"--config\.mesh\.tensor=2"),
    (Options(mode="decode", canvas=48), {"mesh": MeshConfig(fsdp=8)},
     r"--quantize=int8, a smaller --config\.decode\.batch_size, a larger --config\.mesh\.tensor, or a shorter "
     r"--canvas"),
], ids=["train", "train_with_least", "decode"])
def test_a_refused_program_says_by_how_much_and_what_would_help(topology, monkeypatch, message, options, config, ways):
    """The two messages are the compiler's own."""
    def refuse(_):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    needs = r"v5e:2x4: needs 20\.2 GiB on each device, which has 15\.75 GiB: 4\.5 GiB too much\. What would help: "
    with pytest.raises(programs.DoesNotFit, match=needs + ways):
        make_plan(dataclasses.replace(CONFIG, **config), topology, options)


@pytest.mark.parametrize(("step", "copy", "write", "between"), [
    (47.0, 0.7, 46, 21_600), (5.9, 0.2, 11, 21_600), (35.0, 0.05, 3, 3600), (0.1, 0.01, 2, 1e6), (1.0, 5.0, 300, 86_400)
])
def test_the_best_interval_loses_the_least(step, copy, write, between):
    """Of all intervals in which a checkpoint can be written, up to rounding."""
    def lost(every):
        return (saving.share_blocked(every, step, copy, write)
                + saving.steps_lost(every, step, write) * step / between)

    best = saving.best_every(step, copy, write, between)
    assert best * step >= write
    assert lost(best) <= 1.05 * min(lost(every) for every in range(math.ceil(write / step), 30_000))
    assert lost(3 * best) > lost(best)


def test_steps_lost_are_those_of_simulated_interruptions():
    every, step, write = 10, 40.0, 60.0
    rng = np.random.default_rng(0)
    at = rng.uniform(1e5, 2e5, 20_000)
    whole = np.floor((at - write) / (every * step)) * every  # step of the newest checkpoint that is written
    assert np.mean(at / step - whole) == pytest.approx(saving.steps_lost(every, step, write), rel=0.02)


def test_a_plan_says_what_an_interruption_costs(topology):
    plan = make_plan(CONFIG, topology, Options(preemption_hours=2.0, save_bandwidth=1e9))
    figures = plan["saving"]
    assert figures["write_seconds"] == pytest.approx(plan["argument_bytes"] * 8 / 1e9)  # one host has all devices
    assert figures["configured"]["every"] == 1000
    assert figures["best"]["share_lost"] <= figures["configured"]["share_lost"]
    text = as_text(plan)
    assert "steps lost by an interruption on average" in text and "every 1,000 steps" in text
    assert "| 1,000; " in as_markdown([{"name": "a case", "plan": plan}])


def test_unknown_topologies_list_the_known_ones():
    with pytest.raises(InputError, match=r"--topology=v5p:4x5x4: unknown; known for v5p: .*v5p:4x4x4"):
        chips.parse("v5p:4x5x4")
    with pytest.raises(InputError, match=r"known chips: .*v5e"):
        chips.parse("v7q:1x1")


def test_cases_are_checked(tmp_path):
    path = tmp_path / "cases.json"
    for content, message in (("{", "not JSON"), ('[{"name": "x"}]', "case 0: must be an object with name, config"),
                             ('[{"name": "x", "config": "c", "topology": "v5p:9"}]', "known for v5p"),
                             ('[{"name": "x", "config": "c", "topology": "v5e:2x2", "quantize": "int4"}]',
                              "case 0: quantize = 'int4': must be one of none, int8")):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            aot.read_cases(path)
    with pytest.raises(InputError, match=r"does/not/exist.py"):
        aot.load_config("does/not/exist.py", {})
    with pytest.raises(ConfigError, match="known variants: v5p-128"):
        aot.load_config("experiments/pretrain_8b.py:v5p-7", {})
    with pytest.raises(ConfigError, match="known variants: v4-8, v5e-8, v6e-8"):
        aot.load_config("experiments/pretrain_1b.py:v5e-4", {})
    assert aot.load_config("experiments/pretrain_8b.py:v5p-128", {"seed": 3}).seed == 3


def test_every_committed_case_fits_its_devices():
    """All but the memory: rows and widths divide over a mesh of as many devices as the topology has."""
    cases = aot.read_cases(pathlib.Path("tpu/cases.json"))
    assert len({case["name"] for case in cases}) == len(cases)
    for case in cases:
        config = aot.load_config(case["config"], case.get("set", {}))
        kind, shape = chips.parse(case["topology"])
        count = case.get("num_slices", 1) * math.prod(map(int, shape.split("x"))) * chips.CHIPS[kind].devices
        sizes = [config.mesh.data, config.mesh.fsdp, config.mesh.tensor]
        if -1 in sizes:
            sizes[sizes.index(-1)] = count // -math.prod(sizes)
        assert math.prod(sizes) == count, case["name"]
        mesh = jax.sharding.AbstractMesh(tuple(sizes), AXES)
        check_model_divisible(config.model, mesh)
        if case.get("mode", "train") == "train":
            check_divisible(config, mesh)
        else:
            assert config.decode.batch_size % (sizes[0] * sizes[1]) == 0, case["name"]


SMALL = """
from illada_jax import config

def get_config():
    c = config.defaults()
    c.model.update(dict(vocab_size=320, d_model=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, d_ff=96,
                        max_length=64, attention="xla"))
    c.data.update(dict(sources=("text:x",), length=64, batch_size=16))
    c.diffusion.mask_id = 5
    c.train.steps = 100
    return c
"""


def test_compared_cases_are_made_once_and_survive_an_interruption(topology, tmp_path, monkeypatch):
    (tmp_path / "small.py").write_text(SMALL)
    cases = [{"name": name, "config": str(tmp_path / "small.py"), "topology": "v5e:2x4", "mode": "score",
              "canvas": canvas, "set": {"mesh.fsdp": 8}} for name, canvas in (("first", 32), ("second", 16))]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    report, made = tmp_path / "report.json", []
    monkeypatch.setattr(aot.chips, "get_topology", lambda name, num_slices: topology)

    def make(config, topology, options):
        if options.canvas == 16 and not made[1:]:
            made.append("interrupted")
            raise KeyboardInterrupt
        made.append(options.canvas)
        return make_plan(config, topology, options)

    monkeypatch.setattr(aot, "make_plan", make)
    with flagsaver.flagsaver(json=str(report), markdown=str(tmp_path / "report.md")):
        flags.FLAGS.mark_as_parsed()
        with pytest.raises(KeyboardInterrupt):
            aot.compare(tmp_path / "cases.json")
        assert "Not compiled yet: second." in (tmp_path / "report.md").read_text()
        aot.compare(tmp_path / "cases.json")
        assert made == [32, "interrupted", 16]
        assert [result["name"] for result in json.loads(report.read_text())] == ["first", "second"]
        cases[0]["set"]["decode.batch_size"] = 16
        (tmp_path / "cases.json").write_text(json.dumps(cases))
        aot.compare(tmp_path / "cases.json")
        assert made[3:] == [32]
        (tmp_path / "small.py").write_text(SMALL.replace("d_ff=96", "d_ff=64"))
        aot.compare(tmp_path / "cases.json")
        assert made[4:] == [32, 16]
        text = (tmp_path / "report.md").read_text()
        assert "jax " in text and "## Assumptions" in text and "Not compiled yet" not in text
        report.write_text("[3]")
        with pytest.raises(InputError, match="holds no compared plans"):
            aot.compare(tmp_path / "cases.json")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_a_missing_compiler_says_what_to_install():
    command = [sys.executable, "-m", "illada_jax.aot", "--config=experiments/pretrain_8b.py", "--topology=v5p:4x4x4"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "pip install 'illada_jax[tpu]'" in result.stderr
