"""Training as a whole: resume, devices, accumulation. A tiny model on the byte-level text of a few files."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from etils import epath

from illada_jax.config import DataConfig, from_dict
from illada_jax.data.corpus import open_corpus
from illada_jax.data.preparing.settings import Settings
from illada_jax.data.preparing.text import prepare
from illada_jax.errors import InputError
from illada_jax.evaluation.evaluators import ratio_and_stderr
from illada_jax.interop import load_model
from illada_jax.training import lock
from illada_jax.training.metrics import MetricWriter


def leaves(outcome):
    return [np.asarray(x) for x in jax.tree.leaves(outcome.state)]


@pytest.mark.parametrize(("optimizer", "num_devices"), [("adamw", 1), pytest.param("muon", 8, marks=pytest.mark.slow)])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(run, tmp_path, optimizer, num_devices):
    changes = {"optimizer__name": optimizer, "train__steps": 60, "optimizer__decay_steps": 40}
    whole, _ = run(tmp_path / "whole", num_devices, **changes)
    half, _ = run(tmp_path / "parts", num_devices, **changes, train__stop_step=30)
    assert (half.step, half.status) == (30, "stopped")
    resumed, lines = run(tmp_path / "parts", num_devices, **changes)
    assert (resumed.step, resumed.status) == (60, "finished")
    for a, b in zip(leaves(whole), leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})


def test_a_decay_that_is_asked_for_later_equals_one_that_was_planned(run, tmp_path):
    decay = {"optimizer__decay_start": 7, "optimizer__decay_steps": 3}
    planned, _ = run(tmp_path / "planned", **decay)
    run(tmp_path / "asked", optimizer__decay_steps=0, train__stop_step=5)
    asked, lines = run(tmp_path / "asked", **decay)
    for a, b in zip(leaves(planned), leaves(asked), strict=True):
        np.testing.assert_array_equal(a, b)
    constant, _ = run(tmp_path / "constant", optimizer__decay_steps=0)
    assert any((a != b).any() for a, b in zip(leaves(planned), leaves(constant), strict=True))
    assert lines[-1]["train/learning_rate"] < lines[0]["train/learning_rate"]


@pytest.fixture(scope="module")
def one_device(text_file, tmp_path_factory):
    """Ten steps on one device: what every mesh must reproduce."""
    return {}


@pytest.mark.parametrize(("fsdp", "tensor", "data"), [(8, 1, 1), (4, 2, 1), (2, 4, 1), (2, 2, 2)])
def test_eight_devices_equal_one(run, tmp_path, one_device, fsdp, tensor, data):
    if not one_device:
        one_device["run"] = run(tmp_path / "one")
    one, one_lines = one_device["run"]
    many, many_lines = run(tmp_path / "many", 8, mesh__fsdp=fsdp, mesh__tensor=tensor, mesh__data=data)
    for a, b in zip(one_lines, many_lines, strict=True):
        np.testing.assert_allclose(b["train/loss"], a["train/loss"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(b), np.asarray(a), atol=2e-4),
                 one.state.params, many.state.params)
    q = many.state.params["layers"]["attention"]["q"]
    assert q.addressable_shards[0].data.size * fsdp * tensor == q.size


def test_saved_on_eight_devices_goes_on_with_two(run, tmp_path):
    whole, _ = run(tmp_path / "whole", 2)
    run(tmp_path / "parts", 8, train__stop_step=5)
    resumed, _ = run(tmp_path / "parts", 2)
    for a, b in zip(leaves(whole), leaves(resumed), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("microbatches", [2, 4])
def test_accumulation_changes_nothing(run, tmp_path, microbatches):
    whole, whole_lines = run(tmp_path / "whole", 2)
    parts, parts_lines = run(tmp_path / "parts", 2, train__microbatches=microbatches)
    for a, b in zip(whole_lines, parts_lines, strict=True):
        np.testing.assert_allclose(b["train/loss"], a["train/loss"], rtol=1e-5)
        assert b["train/mask_fraction"] == a["train/mask_fraction"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), whole.state.params, parts.state.params)


@pytest.mark.slow
def test_it_learns_and_the_bound_is_reported(run, tmp_path):
    outcome, lines = run(tmp_path / "w", train__steps=150, eval__evaluators=("bits_per_byte",), eval__every=75,
                         optimizer__learning_rate=1e-2)
    evaluations = [line for line in lines if "eval/bits_per_byte" in line]
    assert [line["step"] for line in evaluations] == [75, 150]
    assert evaluations[-1]["eval/bits_per_byte"] < 4.0 < np.log2(264) - 3
    assert 0 < evaluations[-1]["eval/bits_per_byte_stderr"] < 1
    assert outcome.final["eval/bits_per_byte"] == evaluations[-1]["eval/bits_per_byte"]
    assert {"train/loss", "train/tokens_per_second"} <= lines[0].keys()
    masked = [value for key, value in lines[0].items() if key.startswith("train_by_p/masked_tokens/")]
    assert len(masked) > 3  # a curve over the masking probability
    assert sum(masked) == pytest.approx(lines[0]["train/mask_fraction"] * 3 * 8 * 32)


def test_output_without_a_terminal_resuming_and_a_finished_run(run, tmp_path, capsys):
    calls, workdir = [], tmp_path / "w"
    evaluators = {"bound": lambda params, step: calls.append(step) or {"eval/bound": 2.0}}
    run(workdir, evaluators=evaluators, train__stop_step=5)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    pattern = r"step (\d+) of 5: loss \d\.\d{3}, [\d,]+ tokens/s, \d+% of the time in training, (\d\d:\d\d) left"
    assert [re.fullmatch(pattern, line).group(1) for line in lines] == ["3", "5"]
    assert re.fullmatch(pattern, lines[-1]).group(2) == "00:00"
    outcome, _ = run(workdir, evaluators=evaluators)
    assert "Resuming from step 5 of 10\n" in capsys.readouterr().out and (outcome.start, calls) == (5, [5, 10])
    before = (workdir / "metrics.jsonl").read_text()
    again, _ = run(workdir, evaluators=evaluators)
    assert (again.start, again.step, again.status, again.final) == (10, 10, "finished", {"eval/bound": 2.0})
    assert calls == [5, 10] and (workdir / "metrics.jsonl").read_text() == before
    assert all((a == b).all() for a, b in zip(leaves(outcome), leaves(again), strict=True))
    with pytest.raises(InputError, match=r"train\.stop_step = 9: the run in .* is at step 10; use another workdir"):
        run(workdir, train__stop_step=9)


def test_weights_and_biases_starts_before_the_writer_and_is_asked_for_by_name(tmp_path, monkeypatch):
    started = []
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **given: started.append(given)))
    with MetricWriter(epath.Path(tmp_path), 0, tensorboard=True, wandb=True) as writer:
        writer.write(1, {"train/loss": 1.0})
    assert started == [{"sync_tensorboard": True}]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"pip install 'illada_jax\[wandb\]'"):
        MetricWriter(epath.Path(tmp_path), 0, tensorboard=True, wandb=True)


def test_weights_and_biases_offline(tmp_path):
    pytest.importorskip("wandb", reason="needs the extra wandb")
    code = ("from etils import epath; from illada_jax.training.metrics import MetricWriter\n"
            "with MetricWriter(epath.Path('.'), 0, True, True) as writer: writer.write(1, {'train/loss': 1.5})")
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (record,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"train/loss" in record.read_bytes()


@pytest.mark.slow
def test_the_epochs_of_every_corpus_are_reported(run, tmp_path, text_file):
    sizes = {}
    for name, part in (("first", "0"), ("second", "1")):
        files = tuple(f"text:{path}" for path in sorted(text_file.glob(f"{part}*.txt")))
        prepare(Settings(files, "bytes", 0, 0.0), tmp_path / name, progress=False)
        sizes[name] = open_corpus(DataConfig(sources=(f"prepared:{tmp_path / name}",))).train.num_tokens
    sources = tuple(f"prepared:{tmp_path / name}" for name in sizes)
    changes = {"data__sources": sources, "data__weights": (0.75, 0.25), "data__heldout_fraction": 0.0}
    _, lines = run(tmp_path / "w", **changes, train__stop_step=9)
    with pytest.raises(InputError, match="trained on another corpus or tokenizer"):
        run(tmp_path / "w", **changes | {"data__sources": sources[::-1]},
            allowed=("data.sources",))
    _, lines = run(tmp_path / "w", **changes)
    for (name, size), rows in zip(sizes.items(), (60, 20), strict=True):
        assert lines[-1][f"data_epochs/{name}"] == pytest.approx(rows / -(-size // 32))


def test_the_workdir_has_its_layout_and_the_checkpoint_is_whole(run, tmp_path):
    workdir = tmp_path / "w"
    outcome, _ = run(workdir, checkpoint__every=4, checkpoint__keep=1)
    names = {p.name for p in workdir.iterdir()} - {lock.NAME}  # some versions of filelock remove it, others do not
    assert names == {"config.json", "metrics.jsonl", "checkpoints", "tokenizer"}
    assert [p.name for p in (workdir / "checkpoints").iterdir()] == ["10"]
    for path in (workdir, workdir / "checkpoints" / "10"):
        loaded = load_model(path)
        assert loaded.step == 10
        assert loaded.tokenizer.decode(loaded.tokenizer.encode("mask")) == "mask"
        jax.tree.map(np.testing.assert_array_equal, loaded.params, jax.device_get(outcome.state.params))


@pytest.mark.parametrize(("keep_best", "kept"), [(True, {"4", "10"}), (False, {"10"})])
@pytest.mark.slow
def test_the_checkpoint_with_the_best_bound_is_kept(run, tmp_path, keep_best, kept):
    bounds = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.5, 10: 2.5}
    run(tmp_path / "w", evaluators={"bound": lambda params, step: {"eval/bits_per_byte": bounds[step]}},
        eval__every=2, checkpoint__every=2, checkpoint__keep=1, checkpoint__keep_best=keep_best)
    assert {path.name for path in (tmp_path / "w" / "checkpoints").iterdir()} == kept


@pytest.mark.slow
def test_a_run_starts_from_the_params_of_another(run, tmp_path):
    first, _ = run(tmp_path / "first")
    second, _ = run(tmp_path / "second", train__steps=1, init__checkpoint=str(tmp_path / "first"),
                    optimizer__learning_rate=1e-9, optimizer__warmup_steps=0, optimizer__decay_steps=0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), first.state.params, second.state.params)
    with pytest.raises(InputError, match=r"another architecture: model\.d_ff: 32 → 48"):
        run(tmp_path / "third", init__checkpoint=str(tmp_path / "first"), model__d_ff=48)


def test_what_a_killed_process_left_in_the_metrics_is_dropped(run, tmp_path):
    run(tmp_path / "w", train__stop_step=4)
    path = tmp_path / "w" / "metrics.jsonl"
    before = path.read_text()
    sample = json.dumps({"step": 4, "eval/samples": "a\u2028b"}, ensure_ascii=False)
    path.write_text(f'{before}{sample}\n{{"step": 5, "tr')
    _, lines = run(tmp_path / "w")
    assert [line["step"] for line in lines] == [3, 4, 4, 6, 9, 10]
    assert lines[2]["eval/samples"] == "a\u2028b"


def test_a_broken_config_in_the_workdir_is_named(run, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "config.json").write_text('{"mod')
    with pytest.raises(InputError, match=r"w/config\.json: not the config of a run"):
        run(tmp_path / "w")


def test_a_workdir_of_another_config_is_refused(run, tmp_path):
    run(tmp_path / "w", train__stop_step=2)
    with pytest.raises(InputError, match=r"optimizer\.b2: 0\.95 → 0\.9"):
        run(tmp_path / "w", optimizer__b2=0.9)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="neither empty nor a workdir"):
        run(tmp_path / "other")
    with pytest.raises(InputError, match="cannot write the workdir: Not a directory"):
        run(tmp_path / "other" / "thesis.txt" / "w")


def test_a_mesh_that_does_not_fit_is_refused(run, tmp_path):
    for changes, message in (
        ({"mesh__fsdp": 3}, r"config\.mesh = .*must multiply to the number of devices, 8"),
        ({"data__batch_size": 12}, r"batch_size.* = 12: must be divisible by mesh\.data × mesh\.fsdp = 8"),
        ({"mesh__tensor": 8, "mesh__fsdp": 1}, r"num_heads = 4: must be divisible by mesh\.tensor = 8"),
    ):
        with pytest.raises(InputError, match=message):
            run(tmp_path / "w", 8, **changes)
        assert not (tmp_path / "w").exists()


def test_the_standard_error_of_a_ratio_is_the_spread_of_repeats():
    rng = np.random.default_rng(0)
    sizes_KN = rng.integers(5, 20, (2000, 50))
    totals_KN = sizes_KN * rng.normal(3, 1, (2000, 50))
    ratios, stderrs = zip(*(ratio_and_stderr(t, s) for t, s in zip(totals_KN, sizes_KN, strict=True)), strict=True)
    assert abs(np.mean(stderrs) / np.std(ratios) - 1) < 0.1
    assert np.isnan(ratio_and_stderr(np.ones(1), np.ones(1))[1])


def test_config_of_a_run_is_kept(run, tmp_path, text_file):
    run(tmp_path / "w", train__stop_step=1)
    saved = from_dict(json.loads((tmp_path / "w" / "config.json").read_text()))
    assert saved.diffusion.mask_id >= 0
    assert dataclasses.replace(saved.train, stop_step=0).steps == 10
