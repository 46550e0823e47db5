"""Conversion in both directions, in Python and by the command."""

import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from illada_jax import api
from illada_jax.config import Config, DataConfig, ModelConfig
from illada_jax.data.tokenizers import ByteTokenizer
from illada_jax.errors import InputError
from illada_jax.interop import importing
from illada_jax.interop.conversion import Conversion
from illada_jax.interop.hf_model import open_hf_model
from illada_jax.model.int8 import Int8
from illada_jax.parallel.mesh import parse_mesh
from illada_jax.training.saved_model import LoadedModel, check_initial, open_saved_model, save_model
from tests.interop.util import checkpoint
from tests.util import random_params

MODEL = ModelConfig(vocab_size=264, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=24,
                    max_length=64, tied_head=False)


def run(source, target, **options):
    return Conversion(str(source), str(target), **options).run()


@pytest.fixture
def workdir(tmp_path):
    loaded = LoadedModel(Config(model=MODEL, data=DataConfig(length=32)), random_params(MODEL), ByteTokenizer(), 30)
    save_model(tmp_path / "workdir", loaded, False, "")
    return tmp_path / "workdir"


def test_official_weights_become_a_workdir(tmp_path):
    source, target = checkpoint(tmp_path, "llada-mha-untied"), tmp_path / "work" / "dir"
    printed = run(source, target)
    assert printed == f"{target}: workdir, llada, bfloat16"
    saved = open_saved_model(target)
    assert saved.dtype == "bfloat16" and saved.config.model.dtype == "bfloat16" and not saved.quantized
    direct, converted = api.load(str(source)), api.load(str(target))
    jax.tree.map(np.testing.assert_array_equal, direct.params, converted.params)
    assert converted.generate(["ab"], max_new_tokens=32)[0] == direct.generate(["ab"], max_new_tokens=32)[0]
    assert (target / "tokenizer" / "tokenizer.json").exists()
    check_initial(saved, saved.config, saved.tokenizer)
    assert "llada" in run(target, tmp_path / "out", shard_gigabytes=1e-5)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert open_hf_model(tmp_path / "out").family.model_type == "llada"


def test_eight_bits_at_load_and_as_a_checkpoint_are_the_same(tmp_path, workdir):
    source = checkpoint(tmp_path, "llada-mha-untied")
    run(source, tmp_path / "a", quantize="int8", mesh="fsdp=2,tensor=2")
    run(workdir, tmp_path / "b", quantize="int8", dtype="bfloat16")
    for unquantized, converted in ((source, tmp_path / "a"), (workdir, tmp_path / "b")):
        saved = open_saved_model(converted)
        assert saved.quantized and saved.dtype == "bfloat16"
        at_load, stored = api.load(str(unquantized), "bfloat16", quantize="int8"), api.load(str(converted), "bfloat16")
        assert isinstance(stored.params["head"], Int8) and isinstance(stored.params["layers"]["mlp"]["up"], Int8)
        jax.tree.map(np.testing.assert_array_equal, at_load.params["layers"]["mlp"], stored.params["layers"]["mlp"])
        assert api.load(str(converted), quantize="int8").params["head"].values.dtype == "int8"
        with pytest.raises(InputError, match="its weights are int8"):
            check_initial(saved, saved.config, saved.tokenizer)
        for quantize in ("none", "int8"):
            with pytest.raises(InputError, match="its weights are int8"):
                run(converted, tmp_path / "never", quantize=quantize)
    assert open_saved_model(tmp_path / "b").step == 30 and not (tmp_path / "never").exists()


def test_eight_bits_on_a_mesh_write_the_same(tmp_path):
    path = str(checkpoint(tmp_path, "illada-gqa-tied"))
    settings = {"max_new_tokens": 8, "block_length": 8}
    alone = api.load(path, quantize="int8").generate(["abc", "d"], **settings)
    spread = api.load(path, quantize="int8", mesh=parse_mesh("data=2,fsdp=2,tensor=2"))
    assert [r.tokens for r in spread.generate(["abc", "d"], **settings)] == [r.tokens for r in alone]


def test_a_workdir_is_exported_in_the_requested_layout_and_dtype(tmp_path, workdir):
    printed = run(workdir / "checkpoints" / "30", tmp_path / "out", family="llada", dtype="float16")
    assert "llada, step 30, float16" in printed
    assert {t.dtype.name for t in open_hf_model(tmp_path / "out").tensors.tensors.values()} == {"float16"}
    run(workdir, tmp_path / "other")
    assert open_hf_model(tmp_path / "other").family.model_type == "illada"


def test_ids_by_flag(tmp_path):
    source = checkpoint(tmp_path, "illada-mha-untied", mask_token_id=100_000)
    with pytest.raises(InputError, match="give it with --mask_id"):
        run(source, tmp_path / "a")
    run(source, tmp_path / "a", special_ids={"mask": 4, "eot": 77})
    saved = open_saved_model(tmp_path / "a")
    assert saved.tokenizer.mask_id == saved.config.diffusion.mask_id == 4
    assert saved.config.decode.eot_id == 77 and saved.config.decode.stop_ids == (77,)


@pytest.mark.parametrize("source, options, message", [
    ("workdir", {"special_ids": {"mask": 3}}, "is not a Hugging Face directory; its tokenizer defines its ids"),
    ("workdir", {"mesh": "fsdp=2"}, "mesh = 'fsdp=2': does not apply"),
    ("workdir", {"quantize": "int8", "dtype": "float16"}, "dtype = 'float16': a workdir holds"),
    ("workdir", {"quantize": "int8", "family": "llada"}, "family = 'llada': does not apply"),
    ("illada-gqa-tied", {"family": "llada"}, "family = 'llada': does not apply"),
    ("illada-gqa-tied", {"shard_gigabytes": 1.0}, "shard_gigabytes = 1.0: does not apply"),
    ("illada-gqa-tied", {"dtype": "float16"}, "dtype = 'float16': a workdir holds"),
    ("illada-gqa-tied", {"mesh": "fsdp"}, "mesh = 'fsdp': must look like fsdp=4,tensor=2"),
    ("illada-gqa-tied", {"mesh": "rows=2"}, "axes are data, fsdp, tensor"),
    ("illada-gqa-tied", {"mesh": "tensor=4"}, "config.model.num_kv_heads = 2: must be divisible by mesh.tensor = 4"),
    ("illada-gqa-tied", {"mesh": "fsdp=9"}, "must multiply to the number of devices"),
    ("illada-gqa-tied", {"target": "workdir"}, "already exists and is not empty"),
    ("nothing", {}, "nothing: not a checkpoint"),
])
def test_bad_input(tmp_path, workdir, source, options, message):
    path = checkpoint(tmp_path, source) if source.startswith("illada") else tmp_path / source
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError) as caught:
        run(path, tmp_path / options.pop("target", "target"), **options)
    assert message in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_an_interrupted_import_leaves_nothing(tmp_path, monkeypatch):
    source = checkpoint(tmp_path, "illada-gqa-tied")
    before = sorted(tmp_path.iterdir())
    read, count = importing._read, iter(range(100))

    def interrupted(*args):
        if next(count) == 9:
            raise KeyboardInterrupt
        return read(*args)

    monkeypatch.setattr(importing, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "target")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("at", ["importing._read", "saved_model.ocp.CheckpointManager.wait_until_finished"],
                         ids=["reading", "writing"])
def test_a_killed_import_leaves_nothing_that_looks_whole(tmp_path, at):
    """Killed between tensors or while Orbax writes: no target, and the next import removes the leftover."""
    source = checkpoint(tmp_path, "illada-gqa-tied")
    code = f"""
import os, signal
from illada_jax.interop import importing
from illada_jax.interop.conversion import Conversion
from illada_jax.training import saved_model
first = iter(range(9 if {at!r} == "importing._read" else 0))
run = {at}
{at} = lambda *args: run(*args) if next(first, None) is not None else os.kill(os.getpid(), signal.SIGKILL)
Conversion({str(source)!r}, {str(tmp_path / "target")!r}).run()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL.value, killed.stderr
    leftover, = tmp_path.glob("target.tmp-*")
    assert sorted(tmp_path.iterdir()) == [source, leftover]
    if "read" in at:
        with pytest.raises(InputError, match="not a checkpoint"):
            api.load(str(leftover))
    run(source, tmp_path / "target")
    assert sorted(p.name for p in tmp_path.iterdir()) == [source.name, "target"]
    assert open_saved_model(tmp_path / "target").step == 0


@pytest.mark.slow
def test_the_commands_as_typed(tmp_path):
    """Converted, and decoded from the converted and from the official files: the same text."""
    source = checkpoint(tmp_path, "llada-gqa-tied")
    typed = lambda command, *options: subprocess.run(  # noqa: E731
        [sys.executable, "-m", f"illada_jax.{command}", *options], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    made = typed("convert", f"--source={source}", f"--target={tmp_path / 'w'}", "--mask_id=200", "--dtype=float32")
    assert (made.returncode, made.stdout) == (0, f"{tmp_path / 'w'}: workdir, llada, float32\n"), made.stderr
    assert open_saved_model(tmp_path / "w").tokenizer.mask_id == 200
    again = typed("convert", f"--source={source}", f"--target={tmp_path / 'w'}")
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.count("\n") == 1 and "already exists and is not empty" in again.stderr
    decode = ["--prompt=ab", "--max_new_tokens=32", "--output=json", "--quantize=int8"]
    first, second = (typed("generate", f"--checkpoint={path}", *decode) for path in (source, tmp_path / "w"))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert len(json.loads(first.stdout)["tokens"]) > 0
