"""Imports of the official layouts: logits against PyTorch's, on one device and on eight."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from illada_jax import interop
from illada_jax.config import MeshConfig
from illada_jax.errors import InputError
from illada_jax.parallel.mesh import make_mesh
from tests.interop.util import CASES, TEMPLATE, checkpoint, golden, run


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_pytorch(tmp_path, case):
    loaded = interop.load_model(checkpoint(tmp_path, case))
    tokens_BL, real_BL, expected_BLV = golden(case)
    for real in (real_BL, np.ones_like(real_BL)):
        rows = slice(None) if real is real_BL else slice(2, 3)
        got_BLV = run(loaded.config.model, loaded.params, tokens_BL[rows], real[rows])
        at = real[rows]
        np.testing.assert_allclose(got_BLV[at], expected_BLV[rows][at], atol=1e-4, rtol=0)
        assert (got_BLV[at].argmax(-1) == expected_BLV[rows][at].argmax(-1)).all()


@pytest.mark.parametrize("case", ["illada-gqa-tied", "llada-mha-untied"])
def test_a_mesh_holds_the_same_params(tmp_path, case):
    path = checkpoint(tmp_path, case)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    for quantize in ("none", "int8"):
        alone = interop.load_model(path, quantize=quantize)
        spread = interop.load_model(path, mesh=mesh, quantize=quantize)
        jax.tree.map(np.testing.assert_array_equal, spread.params, alone.params)
        q = spread.params["layers"]["attention"]["q"]
        q = q if quantize == "none" else q.values
        assert tuple(q.sharding.spec) == (None, "fsdp", "tensor", None)
        assert tuple(spread.params["embedding"].sharding.spec) == ("tensor", "fsdp")


def test_every_value_is_imported_in_the_requested_dtype(tmp_path):
    path = checkpoint(tmp_path, "llada-gqa-tied")
    loaded = interop.load_model(path, dtype="bfloat16")
    source = load_file(path / "model.safetensors")["model.transformer.blocks.1.q_proj.weight"]
    q_DNH = loaded.params["layers"]["attention"]["q"][1]
    assert q_DNH.dtype == "bfloat16" and loaded.config.model.dtype == "bfloat16"
    np.testing.assert_array_equal(np.asarray(q_DNH).reshape(16, 16).T, source.astype(q_DNH.dtype))


@pytest.mark.parametrize("case, ids", [
    ("illada-gqa-tied", {"mask": 5, "bos": 0, "eos": 2, "pad": 1}),
    ("llada-mha-untied", {"mask": 258, "bos": 256, "eos": 257, "pad": 257}),
])
def test_ids_tokenizer_and_sampler_come_along(tmp_path, case, ids):
    loaded = interop.load_model(checkpoint(tmp_path, case))
    tokenizer, config = loaded.tokenizer, loaded.config
    assert tokenizer.special_ids == ids and config.diffusion.mask_id == ids["mask"]
    assert tokenizer.decode(tokenizer.encode("Ünïcode\n text")) == "Ünïcode\n text"
    assert tokenizer.chat_template == TEMPLATE
    assert config.decode.length == ("fixed" if case.startswith("llada") else "variable")
    assert config.decode.eot_id == (259 if case.startswith("llada") else -1)
    assert config.decode.stop_ids == ((259,) if case.startswith("llada") else ())
    assert config.model.max_length == 64 and loaded.step == 0


def test_ids_by_flag_then_config_then_tokenizer_then_family(tmp_path):
    path = checkpoint(tmp_path, "illada-gqa-tied", mask_token_id=4, eos_token_id=[7, 8])
    loaded = interop.load_model(path)
    assert loaded.tokenizer.mask_id == 4 and loaded.tokenizer.eos_id == 7 and loaded.config.decode.stop_ids == (8,)
    assert interop.load_model(path, special_ids={"mask": 260}).tokenizer.mask_id == 260
    config = json.loads((path / "config.json").read_text())
    del config["mask_token_id"]
    (path / "config.json").write_text(json.dumps(config))
    assert interop.load_model(path).tokenizer.mask_id == 5
    description = json.loads((path / "tokenizer.json").read_text())
    for token in description["added_tokens"]:
        token["content"] = token["content"].replace("[MASK]", "other")
    vocab = description["model"]["vocab"]
    vocab["<other>"] = vocab.pop("<[MASK]>")
    (path / "tokenizer.json").write_text(json.dumps(description))
    assert interop.load_model(path).tokenizer.mask_id == 5  # the family's
    with pytest.raises(InputError, match="the id of eot, 300, is outside the vocabulary of 272"):
        interop.load_model(path, special_ids={"eot": 300})
    with pytest.raises(InputError, match="unknown name 'end'"):
        interop.load_model(path, special_ids={"end": 3})
    with pytest.raises(InputError, match="the id of mask, 300, is outside the vocabulary of 272"):
        interop.load_model(path, special_ids={"mask": 300})
    with pytest.raises(InputError, match="MASK must not share its id 7 with EOS or BOS"):
        interop.load_model(path, special_ids={"mask": 7})


def test_all_ids_that_end_a_text_end_it(tmp_path):
    """One in config.json, more in generation_config.json; -1 and an empty list mean none."""
    path = checkpoint(tmp_path, "illada-gqa-tied", eos_token_id=2, pad_token_id=-1, bos_token_id=[])
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7, 9], "bos_token_id": 3}))
    loaded = interop.load_model(path)
    assert loaded.tokenizer.special_ids == {"mask": 5, "bos": 3, "eos": 2, "pad": 1}
    assert loaded.config.decode.stop_ids == (7, 9)
    alone = interop.load_model(path, special_ids={"eos": 8, "eot": 11})
    assert alone.tokenizer.eos_id == 8 and alone.config.decode.stop_ids == (11,) and alone.config.decode.eot_id == 11


def test_a_tokenizer_that_loses_text_is_named_once(tmp_path, caplog):
    path = checkpoint(tmp_path, "illada-gqa-tied")
    interop.load_model(path)
    assert not caplog.records
    description = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps({**description, "normalizer": {"type": "Lowercase"}}))
    interop.load_model(path)
    message, = [record.getMessage() for record in caplog.records]
    assert str(path) in message and "'A b" in message and "comes back as 'a b" in message


def test_one_of_several_chat_templates_is_chosen(tmp_path):
    path = checkpoint(tmp_path, "illada-gqa-tied")
    named = [{"name": name, "template": f"{name} {TEMPLATE}"} for name in ("tools", "rag")]
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert interop.load_model(path, chat_template="rag").tokenizer.chat_template == f"rag {TEMPLATE}"
    with pytest.raises(InputError, match="several chat templates: tools, rag"):
        interop.load_model(path).tokenizer.chat_template  # noqa: B018
