"""Exports and re-imports: nothing changes, and an interrupted export leaves no target."""

import dataclasses
import json
import os
import subprocess
import sys
import tracemalloc

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from illada_jax import interop
from illada_jax.config import Config, DataConfig, DecodeConfig, ModelConfig, SftConfig
from illada_jax.data.tokenizers import ByteTokenizer
from illada_jax.data.tokenizers.chat import DEFAULT_TEMPLATE, encode_chat
from illada_jax.errors import InputError
from illada_jax.interop import exporting
from illada_jax.interop.exporting import export_model
from illada_jax.interop.families import FAMILIES, ILLADA, LLADA
from illada_jax.interop.hf_model import open_hf_model
from illada_jax.training.saved_model import LoadedModel, open_saved_model, save_model
from tests.interop.util import CASES, TEMPLATE, checkpoint
from tests.util import random_params

DTYPES = {"illada-gqa-tied": "bfloat16", "illada-mha-untied": "float32", "llada-mha-untied": "bfloat16",
          "llada-gqa-tied": "float32"}
BYTES = ByteTokenizer()
MODEL = ModelConfig(vocab_size=BYTES.vocab_size + 4, d_model=24, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=4,
                    d_ff=40, max_length=64, tied_head=False, rope_theta=1234.0, norm_eps=1e-4)
DECODE = DecodeConfig(temperature=0.5, block_length=4, steps_per_block=2, stop_ids=(9,), suppressed_ids=(7, 8))


def equal(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.fixture
def workdir(tmp_path):
    """A model and a tokenizer of this package."""
    config = Config(model=MODEL, data=DataConfig(length=32), decode=DECODE)
    save_model(tmp_path / "workdir", LoadedModel(config, random_params(MODEL), BYTES, 7), False, "")
    return tmp_path / "workdir"


@pytest.mark.parametrize("case", CASES)
def test_official_layouts_survive_bit_for_bit(tmp_path, case):
    """Through a workdir and back, in the original dtype (a workdir holds float16 as float32)."""
    path, dtype = checkpoint(tmp_path, case), DTYPES[case]
    loaded = interop.load_model(path, dtype=dtype)
    save_model(tmp_path / "workdir", loaded, False, case.partition("-")[0])
    saved = open_saved_model(tmp_path / "workdir")
    assert saved.dtype == dtype and saved.family == case.partition("-")[0]
    equal(interop.load_model(tmp_path / "workdir", dtype).params, loaded.params)
    stored = np.dtype("float16" if case == "llada-gqa-tied" else saved.dtype)
    export_model(saved, tmp_path / "out", FAMILIES[saved.family], stored, shard_bytes=9_000)
    source, target = (_tensors(directory) for directory in (path, tmp_path / "out"))
    assert source.keys() == target.keys()
    equal(dict(source), dict(target))
    again = interop.load_model(tmp_path / "out", dtype=dtype)
    equal(again.params, loaded.params)
    assert again.config == loaded.config and again.tokenizer.files() == loaded.tokenizer.files()
    assert again.tokenizer.chat_template == TEMPLATE


def _tensors(directory):
    return {name: x for file in directory.glob("*.safetensors") for name, x in load_file(file).items()}


@pytest.mark.parametrize("family", [ILLADA, LLADA], ids=lambda family: family.model_type)
def test_a_model_of_ours_survives(workdir, tmp_path, family):
    export_model(open_saved_model(workdir), tmp_path / "out", family, np.dtype(np.float32), shard_bytes=10**9)
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "README.md", "special_ids.json"}
    ours, again = interop.load_model(workdir), interop.load_model(tmp_path / "out")
    equal(again.params, ours.params)
    assert again.config.model == ours.config.model and again.config.decode == DECODE
    assert again.tokenizer.files() == BYTES.files()
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["mask_token_id"] == BYTES.mask_id and values["rope_theta"] == 1234.0


@pytest.mark.parametrize("sft", ["none", "illada", "llada"])
def test_a_fine_tuned_model_carries_its_chat_template(tmp_path, sft):
    """The default one if its tokenizer has none, so that the export holds conversations as its workdir does."""
    config = Config(model=MODEL, data=DataConfig(length=32), decode=DECODE, sft=SftConfig(format=sft))
    save_model(tmp_path / "w", LoadedModel(config, random_params(MODEL), BYTES, 7), False, "")
    export_model(open_saved_model(tmp_path / "w"), tmp_path / "out", ILLADA, np.dtype(np.float32), 10**9)
    tokenizer = interop.open_model(tmp_path / "out").tokenizer
    assert tokenizer.chat_template == (None if sft == "none" else DEFAULT_TEMPLATE)
    assert tokenizer.fingerprint == BYTES.fingerprint
    messages = [{"role": "user", "content": "a<bos>"}, {"role": "assistant", "content": "b"}]
    assert encode_chat(tokenizer, messages, True) == encode_chat(BYTES, messages, True)


def test_shards_have_the_requested_size(workdir, tmp_path):
    export_model(open_saved_model(workdir), tmp_path / "out", LLADA, np.dtype(np.float32), shard_bytes=12_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    names = {f"model-{n:05}-of-{m:05}.safetensors" for m in [len(set(index["weight_map"].values()))]
             for n in range(1, m + 1)}
    sizes = {}
    for file in names:
        tensors = load_file(tmp_path / "out" / file)
        assert {name for name, where in index["weight_map"].items() if where == file} == set(tensors)
        sizes[file] = sum(x.nbytes for x in tensors.values())
        assert sizes[file] <= 12_000 or len(tensors) == 1  # the embedding alone is larger
    assert len(names) > 5 and index["metadata"]["total_size"] == sum(sizes.values())
    equal(interop.load_model(tmp_path / "out").params, interop.load_model(workdir).params)


def test_numpy_makes_no_copy_of_a_tensor(tmp_path, monkeypatch):
    """Without a change of dtype a param is written as restored; memory of jax itself is not counted."""
    wide = dataclasses.replace(MODEL, vocab_size=100_000, tied_head=True)
    save_model(tmp_path / "w", LoadedModel(Config(model=wide), random_params(wide), BYTES, 0), False, "")
    saved = open_saved_model(tmp_path / "w")
    monkeypatch.setattr(exporting, "_PIECE_BYTES", 1 << 16)
    tracemalloc.start()
    export_model(saved, tmp_path / "out", ILLADA, np.dtype(np.float32), 10**9)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest = wide.vocab_size * wide.d_model * 4
    assert peak < 1.2 * largest, peak / largest


def test_what_a_family_cannot_express_is_refused(workdir, tmp_path):
    saved = open_saved_model(workdir)
    wide = dataclasses.replace(saved.config.model, head_dim=8)
    other = dataclasses.replace(saved, config=dataclasses.replace(saved.config, model=wide))
    with pytest.raises(InputError, match=r"config\.model\.head_dim = 8: .* 'llada' needs .* = 4"):
        export_model(other, tmp_path / "out", LLADA, np.dtype(np.float32), 10**9)
    assert not (tmp_path / "out").exists()


def test_values_that_do_not_fit_are_named(tmp_path):
    params = random_params(MODEL)
    params["layers"]["mlp"]["up"][1, 2, 3] = 1e6
    save_model(tmp_path / "w", LoadedModel(Config(model=MODEL), params, BYTES, 0), False, "")
    with pytest.raises(InputError, match="layers/mlp/up has values that are not finite in float16"):
        export_model(open_saved_model(tmp_path / "w"), tmp_path / "out", ILLADA, np.dtype(np.float16), 10**9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w"]


@pytest.mark.parametrize("error, seen", [(OSError(28, "No space left on device"), InputError),
                                         (KeyboardInterrupt(), KeyboardInterrupt)])
@pytest.mark.parametrize("at", [0, 3, 17])
def test_an_interrupted_export_leaves_nothing(workdir, tmp_path, monkeypatch, error, seen, at):
    saved = open_saved_model(workdir)
    read, count = type(saved).read_param, iter(range(100))

    def read_param(*args):
        if next(count) == min(at, 11):
            raise error
        return read(*args)

    monkeypatch.setattr(type(saved), "read_param", read_param)
    with pytest.raises(seen):
        export_model(saved, tmp_path / "out", ILLADA, np.dtype(np.float32), 10_000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["workdir"]


def test_a_killed_export_leaves_nothing_that_looks_whole(workdir, tmp_path):
    """Killed before the last file: the leftover is refused, and the next export removes it."""
    code = f"""
import os, numpy as np
from illada_jax.interop import exporting, families
from illada_jax.training.saved_model import open_saved_model
write = exporting._write_json
exporting._write_json = lambda path, values: write(path, values) if path.name != "config.json" else os._exit(9)
exporting.export_model(open_saved_model({str(workdir)!r}), __import__("pathlib").Path({str(tmp_path / "out")!r}),
                       families.ILLADA, np.dtype(np.float32), 10_000)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).returncode == 9
    leftover, = tmp_path.glob("out.tmp-*")
    assert sorted(tmp_path.iterdir()) == [leftover, tmp_path / "workdir"]
    with pytest.raises(InputError, match=r"config\.json: No such file"):
        open_hf_model(leftover)
    export_model(open_saved_model(workdir), tmp_path / "out", ILLADA, np.dtype(np.float32), 10_000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "workdir"]
    interop.load_model(tmp_path / "out")


def test_an_existing_target_is_not_touched(workdir, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="already exists and is not empty"):
        export_model(open_saved_model(workdir), target, ILLADA, np.dtype(np.float32), 10**9)
    assert [p.name for p in target.iterdir()] == ["mine.txt"]
    (target / "mine.txt").unlink()
    export_model(open_saved_model(workdir), target, ILLADA, np.dtype(np.float32), 10**9)
    interop.load_model(target)
