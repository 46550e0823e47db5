"""Checkpoints as trainers and other people leave them: understood, or refused by name. No size is believed."""

import re
import tracemalloc

import chex
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from illada_jax import interop
from illada_jax.interop import tensors
from tests.interop.test_malformed_checkpoints import INDEX, edit, fails, header, rewrite
from tests.interop.util import checkpoint


def contents(path):
    """The tensors of a checkpoint by their plain names, as an import reads them."""
    found = interop.open_model(path).tensors
    return {name: found.read(name, tuple(map(slice, tensor.shape))) for name, tensor in found.tensors.items()}


@pytest.mark.parametrize("case, numbered, beside", [
    ("illada-gqa-tied", True, "consolidated.safetensors"), ("illada-mha-untied", False, "optimizer.safetensors"),
    ("illada-mha-untied", False, "adapter_model.safetensors"), ("illada-gqa-tied", False, "scheduler.safetensors"),
    ("llada-gqa-tied", False, "model-00001-of-00002.safetensors"),
])
def test_foreign_files_beside_the_weights_are_named_and_not_read(tmp_path, case, numbered, beside, caplog):
    """Whatever they hold: other tensors, other types, or nothing that can be read."""
    path = checkpoint(tmp_path, case)
    expected = contents(path)
    if case == "illada-gqa-tied" and not numbered:
        (path / INDEX).unlink()  # leaves the numbered files
    for content in ({"step": np.ones(1, np.int64)}, load_file(next(path.glob("*.safetensors"))), None):
        save_file(content, path / beside) if content else (path / beside).write_bytes(b"nothing")
        caplog.clear()
        chex.assert_trees_all_equal(contents(path), expected)
        assert beside in caplog.text and "not read" in caplog.text


def test_two_models_in_one_directory(tmp_path):
    path = checkpoint(tmp_path, "illada-gqa-tied")
    save_file({"x": np.zeros(2, np.float32)}, path / "model.safetensors")
    fails(path, f"holds two models, model.safetensors and the files of {INDEX}; remove one")


def renamed(path, rename):
    """Renames the tensors of a checkpoint, in its files and its index."""
    for file in path.glob("*.safetensors"):
        save_file({rename(name): x for name, x in load_file(file).items()}, file)
    if (path / INDEX).exists():
        edit(path / INDEX, lambda i: i.update(weight_map={rename(n): f for n, f in i["weight_map"].items()}))


@pytest.mark.parametrize("rename", [
    lambda name: f"module.{name}", lambda name: f"_orig_mod.{name}", lambda name: f"base_model.model.{name}",
    lambda name: f"module._orig_mod.{name}", lambda name: f"_orig_mod.module.base_model.model.{name}",
    lambda name: f"base_model.model.module.{name}", lambda name: f"module.module.{name}",
    lambda name: re.sub(r"(layers|blocks)\.(\d+)\.", r"\1.\2._orig_mod.", name),  # layers compiled one by one
    lambda name: re.sub(r"(layers|blocks)\.(\d+)\.", r"\1.\2._fsdp_wrapped_module._checkpoint_wrapped_module.", name),
    lambda name: f"module.{name}" if "0" in name else name,
])
@pytest.mark.parametrize("case", ["illada-gqa-tied", "llada-mha-untied"])
def test_names_of_wrappers_are_understood(tmp_path, case, rename):
    path = checkpoint(tmp_path, case)
    expected = contents(path)
    renamed(path, rename)
    chex.assert_trees_all_equal(contents(path), expected)


def test_a_tensor_with_and_without_the_name_of_a_wrapper(tmp_path):
    path = checkpoint(tmp_path, "illada-mha-untied")
    rewrite(path / "model.safetensors", lambda t: t.update({"module.model.norm.weight": t["model.norm.weight"] + 1}))
    fails(path, "model.safetensors: the tensor model.norm.weight is there twice, as m", "module.model.norm.weight")


def test_other_names_are_shown_beside_the_missing_ones(tmp_path):
    path = checkpoint(tmp_path, "illada-mha-untied")
    renamed(path, lambda name: f"student.{name}")
    fails(path, "21 missing tensors: lm_head.weight, ", "; the nearest found to lm_head.weight is student.lm_head.")
    renamed(path, lambda name: name.replace("student.", "").replace("embed_tokens", "tok_embeddings"))
    fails(path, "1 missing tensor: model.embed_tokens.weight; the nearest found to model.embed_tokens.weight is "
          "model.tok_embeddings.weight")


@pytest.mark.parametrize("name, value", [
    ("model.layers.{}.self_attn.rotary_emb.inv_freq", np.ones(4, np.float32)),
    ("model.rotary_emb.inv_freq", np.ones(2, np.float64)), ("model.rotary_emb.original_inv_freq", np.ones(2, np.int64)),
    ("module.model.layers.{}.self_attn.rotary_emb.cos_cached", np.ones((1, 1, 8, 4), np.float16)),
])
def test_rotary_buffers_are_left_out(tmp_path, name, value):
    """Of any type, in the files or only in the index."""
    path = checkpoint(tmp_path, "illada-gqa-tied")
    expected = contents(path)
    first = sorted(path.glob("*.safetensors"))[0]
    rewrite(first, lambda t: t.update({name.format(n): value for n in range(2)}))
    chex.assert_trees_all_equal(contents(path), expected)
    edit(path / INDEX, lambda i: i["weight_map"].update({name.format(7): first.name}))
    chex.assert_trees_all_equal(contents(path), expected)


@pytest.mark.parametrize("case, embedding, head", [
    ("illada-gqa-tied", "model.embed_tokens.weight", "lm_head.weight"),
    ("llada-gqa-tied", "model.transformer.wte.weight", "model.transformer.ff_out.weight")])
def test_a_tied_head_that_is_saved_too(tmp_path, case, embedding, head, monkeypatch):
    monkeypatch.setattr(tensors, "_COMPARED_BYTES", 1000)  # several parts
    path = checkpoint(tmp_path, case)
    expected = interop.load_model(path).params
    (path / INDEX).unlink(missing_ok=True)
    file = next(file for file in path.glob("*.safetensors") if embedding in load_file(file))
    original = load_file(file)
    for dtype in (original[embedding].dtype, np.float32):
        save_file({**original, head: original[embedding].astype(dtype)}, file)
        chex.assert_trees_all_equal(interop.load_model(path).params, expected)
    save_file({**{name: x for name, x in original.items() if name != embedding}, head: original[embedding]}, file)
    chex.assert_trees_all_equal(interop.load_model(path).params, expected)  # of two tied tensors the head was saved
    for change in (lambda x: x.__setitem__((-1, -1), 9), lambda x: x.__setitem__((0, 0), 9)):
        other = original[embedding].copy()
        change(other)
        save_file({**original, head: other}, file)
        fails(path, f"{file}: the tensor {head} differs from {embedding}, to which config.json ties it")
    for shape in ((271, 16), (16,), (), (0, 0)):
        save_file({**original, head: np.zeros(shape, np.float32)}, file)
        fails(path, f"the tensor {head} differs from {embedding}")
    save_file({**original, head: np.zeros((), np.float32), embedding: np.zeros((), np.float32)}, file)
    fails(path, f"the tensor {head} differs from {embedding}")


@pytest.mark.parametrize("case, key, value", [
    ("illada-gqa-tied", "num_hidden_layers", 10**12), ("illada-gqa-tied", "num_hidden_layers", 10_000),
    ("illada-gqa-tied", "hidden_size", 10**12), ("illada-gqa-tied", "vocab_size", 10**12),
    ("illada-gqa-tied", "intermediate_size", 2**62), ("illada-gqa-tied", "num_attention_heads", 10**12),
    ("illada-gqa-tied", "max_position_embeddings", 10**12), ("illada-gqa-tied", "num_hidden_layers", 1e12),
    ("llada-gqa-tied", "n_layers", 10**12), ("llada-gqa-tied", "d_model", 10**300),
    ("llada-gqa-tied", "embedding_size", 2**31), ("llada-gqa-tied", "max_sequence_length", 2**40),
])
def test_sizes_are_not_believed(tmp_path, case, key, value):
    """Refused by key before anything of the size is listed or allocated."""
    path = checkpoint(tmp_path, case, **{key: value})
    tracemalloc.start()
    fails(path, f"config.json: {key} = {value}: ")
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()


def test_large_sizes_are_compared_with_the_tensors(tmp_path):
    path = checkpoint(tmp_path, "illada-gqa-tied", hidden_size=2**24, vocab_size=2**24, intermediate_size=2**24,
                      num_hidden_layers=20)
    fails(path, "missing tensors: model.layers.10.")


def test_long_lists_of_tensors_are_refused(tmp_path, monkeypatch):
    path = checkpoint(tmp_path, "illada-gqa-tied")
    file, index = sorted(path.glob("*.safetensors"))[0], (path / INDEX).read_text()
    (path / INDEX).write_text('{"weight_map": {' + ",".join(f'"{n}":"{file.name}"' for n in range(10**6)) + "}}")
    fails(path, f"{INDEX}: its weight_map is too long: the file has ")
    (path / INDEX).write_text(index)
    monkeypatch.setattr(tensors, "_MAX_TENSORS", 19)
    fails(path, f"{INDEX}: its weight_map names 20 tensors; at most 19 are allowed")
    (path / INDEX).unlink()
    file.write_bytes(header({f"{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(20)}))
    fails(path, f"{file}: holds 20 tensors; at most 19 are allowed")
    monkeypatch.setattr(tensors, "_MAX_LIST_BYTES", 1000)
    file.write_bytes(file.read_bytes() + bytes(8))
    fails(path, f"{file}: its header has 1,", " bytes; at most 1,000 are allowed")
