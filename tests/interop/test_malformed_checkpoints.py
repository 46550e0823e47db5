"""Directories as found in practice: one clear error each, or, if they are valid, the right behaviour."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from illada_jax import api, interop
from illada_jax.errors import InputError
from tests.interop.util import checkpoint

INDEX = "model.safetensors.index.json"


def fails(path, *parts, **options):
    """Loading is one line of error that holds all the parts."""
    with pytest.raises(InputError) as caught:
        interop.load_model(path, **options)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def rewrite(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_a_missing_shard(tmp_path):
    path = checkpoint(tmp_path, "illada-gqa-tied")
    (path / "model-00002-of-00003.safetensors").unlink()
    fails(path, f"{INDEX}: names 'model-00002-of-00003.safetensors', which is not a file beside it")


def test_a_missing_shard_without_an_index(tmp_path):
    path = checkpoint(tmp_path, "illada-gqa-tied")
    (path / "model-00002-of-00003.safetensors").unlink()
    (path / INDEX).unlink()
    fails(path, "7 missing tensors: model.layers.0.self_attn.o_proj.weight, ", ", …")


@pytest.mark.parametrize("content, message", [
    (lambda whole: whole[:-3], "truncated or corrupt"),
    (lambda whole: whole[:5], "truncated or corrupt"),
    (lambda whole: b"", "truncated or corrupt"),
    (lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a git-lfs pointer"),
])
def test_a_truncated_shard(tmp_path, content, message):
    path = checkpoint(tmp_path, "illada-gqa-tied")
    file = path / "model-00002-of-00003.safetensors"
    file.write_bytes(content(file.read_bytes()))
    fails(path, str(file), message)


def header(tensors, size=None):
    """The beginning of a safetensors file with arbitrary claims."""
    content = json.dumps(tensors).encode()
    return (len(content) if size is None else size).to_bytes(8, "little") + content


@pytest.mark.parametrize("content", [
    header({}, size=2**62),
    header({"model.norm.weight": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 2**60]}}),
    header({"model.norm.weight": {"dtype": "F32", "shape": [2**50], "data_offsets": [0, 2**52]}}) + bytes(64),
    header({"model.norm.weight": {"dtype": "F32", "shape": [16], "data_offsets": [0, 8]}}) + bytes(8),
    header({"model.norm.weight": {"dtype": "F32", "shape": [16], "data_offsets": [64, 0]}}) + bytes(64),
    header({"model.norm.weight": {"dtype": "F99", "shape": [16], "data_offsets": [0, 64]}}) + bytes(64),
    (9).to_bytes(8, "little") + b'{"a": [[[',
])
def test_a_header_that_lies(tmp_path, content):
    """Sizes are compared with the file before anything of that size is allocated."""
    path = checkpoint(tmp_path, "illada-gqa-tied")
    (path / "model-00003-of-00003.safetensors").write_bytes(content)
    fails(path, "model-00003-of-00003.safetensors: truncated or corrupt (")


def test_a_link_to_nothing(tmp_path):
    """As a cache of the Hub leaves it when its blobs are deleted."""
    path = checkpoint(tmp_path, "illada-gqa-tied")
    (path / "model-00003-of-00003.safetensors").unlink()
    (path / "model-00003-of-00003.safetensors").symlink_to(tmp_path / "gone")
    fails(path, "model-00003-of-00003.safetensors: cannot be read: ")


def test_remote_code_is_never_run(tmp_path):
    """Neither the Python files that `auto_map` names nor the code in a chat template is run."""
    path = checkpoint(tmp_path, "illada-gqa-tied", auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"})
    (path / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n")
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (path / "chat_template.jinja").write_text(escape)
    lm = api.load(str(path))
    with pytest.raises(InputError, match="chat template"):
        lm.chat([{"role": "user", "content": "x"}])
    assert not (tmp_path / "run").exists()


def test_an_index_that_names_a_missing_file(tmp_path):
    path = checkpoint(tmp_path, "llada-mha-untied")
    edit(path / INDEX, lambda i: i["weight_map"].update({"model.transformer.ln_f.weight": "other.safetensors"}))
    fails(path, INDEX, "names 'other.safetensors'")
    edit(path / INDEX, lambda i: i["weight_map"].update({"model.transformer.ln_f.weight": "../x.safetensors"}))
    fails(path, INDEX, "names '../x.safetensors', which is not a file beside it")
    for name in ("", "..", "/etc/passwd"):
        edit(path / INDEX, lambda i, name=name: i["weight_map"].update({"model.transformer.ln_f.weight": name}))
        fails(path)
    (path / INDEX).write_text("{}")
    fails(path, INDEX, "must be JSON with a weight_map")


def test_an_index_that_looks_in_the_wrong_file(tmp_path):
    path = checkpoint(tmp_path, "llada-mha-untied")
    edit(path / INDEX, lambda i: i["weight_map"].update(
        {"model.transformer.wte.weight": "model-00001-of-00002.safetensors"}))
    fails(path, "the tensor model.transformer.wte.weight is in model-00002-of-00002.safetensors; by ")
    edit(path / INDEX, lambda i: i["weight_map"].update({"a.b": "model-00001-of-00002.safetensors"}))
    fails(path, "the tensor a.b is in no file; by ", "it must be in model-00001-of-00002.safetensors")


def test_a_tensor_in_two_shards(tmp_path):
    path = checkpoint(tmp_path, "illada-gqa-tied")
    norm = load_file(path / "model-00003-of-00003.safetensors")["model.norm.weight"]
    rewrite(path / "model-00001-of-00003.safetensors", lambda tensors: tensors.update({"model.norm.weight": norm}))
    fails(path, "the tensor model.norm.weight is in two files, model-00001-of-00003.safetensors and model-00003-of-")


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("model.transformer.blocks.1.up_proj.weight"),
     "1 missing tensor: model.transformer.blocks.1.up_proj.weight"),
    (lambda t: t.update(bias=np.zeros(3, np.float32)), "1 unknown tensor: bias"),
    (lambda t: t.update({"model.transformer.ff_out.weight": np.zeros((272, 16), np.float16)}),
     "the tensor model.transformer.ff_out.weight differs from model.transformer.wte.weight, to which config.json ties"),
    (lambda t: t.update({"model.transformer.wte.weight": np.zeros((16, 272), np.float16)}),
     "model.transformer.wte.weight has the shape [16, 272]; by config.json it must be [272, 16]"),
    (lambda t: t.update({"model.transformer.blocks.0.k_proj.weight": np.zeros((16, 16), np.float16)}),
     "model.transformer.blocks.0.k_proj.weight has the shape [16, 16]; by config.json it must be [8, 16]"),
    (lambda t: t.update({"model.transformer.ln_f.weight": np.ones(16, np.int8)}),
     "the tensor model.transformer.ln_f.weight has the dtype I8; must be one of F32, F16, BF16"),
    (lambda t: t["model.transformer.blocks.1.ff_out.weight"].__setitem__((3, 4), np.nan),
     "the tensor model.transformer.blocks.1.ff_out.weight has values that are not finite"),
    (lambda t: t["model.transformer.wte.weight"].__setitem__((3, 4), np.inf),
     "the tensor model.transformer.wte.weight has values that are not finite"),
])
def test_tensors_that_do_not_fit(tmp_path, change, message):
    path = checkpoint(tmp_path, "llada-gqa-tied")
    rewrite(path / "model.safetensors", change)
    fails(path, message)
    if "finite" in message:
        fails(path, message, quantize="int8")


@pytest.mark.parametrize("case, change, message", [
    ("illada-gqa-tied", {"model_type": "Dream"}, "model_type = 'Dream': must be one of 'llada', 'illada'"),
    ("illada-gqa-tied", {"model_type": ...}, "model_type = None"),
    ("illada-gqa-tied", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling = {'type': 'linear'"),
    ("illada-gqa-tied", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters = "),
    ("illada-gqa-tied", {"layer_norm_eps": 1e-5}, "layer_norm_eps = 1e-05: not supported; must be None"),
    ("illada-gqa-tied", {"attention_bias": True}, "attention_bias = True: not supported; must be False"),
    ("illada-gqa-tied", {"mlp_bias": True}, "mlp_bias = True: not supported"),
    ("illada-gqa-tied", {"hidden_act": "gelu"}, "hidden_act = 'gelu': not supported; must be 'silu'"),
    ("illada-gqa-tied", {"head_dim": 8}, "head_dim = 8: not supported; must be 4"),
    ("illada-gqa-tied", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rope_parameters = "),
    ("illada-gqa-tied", {"sliding_window": 4096}, "sliding_window = 4096: not supported; must be None"),
    ("illada-gqa-tied", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config = {'quant_method'"),
    ("illada-gqa-tied", {"model_type": ["llada"]}, "model_type = ['llada']: must be one of"),
    ("illada-gqa-tied", {"hidden_size": ...}, "hidden_size: missing"),
    ("illada-gqa-tied", {"hidden_size": "16"}, "hidden_size = '16': must be a whole number"),
    ("illada-gqa-tied", {"rms_norm_eps": "small"}, "model.norm_eps = 'small'"),
    ("illada-gqa-tied", {"num_key_value_heads": 3}, "model.num_kv_heads = 3"),
    ("illada-gqa-tied", {"num_hidden_layers": 3}, "missing tensors: model.layers.2."),
    ("illada-gqa-tied", {"num_hidden_layers": 1}, "unknown tensors: model.layers.1."),
    ("llada-gqa-tied", {"include_qkv_bias": True}, "include_qkv_bias = True: not supported"),
    ("llada-gqa-tied", {"layer_norm_type": "default"}, "layer_norm_type = 'default': not supported; must be 'rms'"),
    ("llada-gqa-tied", {"block_type": "sequential"}, "block_type = 'sequential': not supported; must be 'llama'"),
    ("llada-gqa-tied", {"alibi": True}, "alibi = True: not supported"),
    ("llada-gqa-tied", {"weight_tying": False}, "1 missing tensor: model.transformer.ff_out.weight"),
    ("llada-gqa-tied", {"mask_token_id": 100_000}, "the id of mask, 100000, is outside the vocabulary of 272"),
    ("llada-gqa-tied", {"eos_token_id": [257, 100_000]}, "the id of eos, 100000, is outside the vocabulary of 272"),
    ("llada-gqa-tied", {"eos_token_id": ["</s>"]}, "the id of eos, '</s>', is outside the vocabulary of 272"),
])
def test_configs_that_are_not_supported(tmp_path, case, change, message):
    fails(checkpoint(tmp_path, case, **change), str(tmp_path / case), message)


def test_keys_of_the_config_have_defaults(tmp_path):
    """The family's software omits keys that have their default values."""
    path = checkpoint(tmp_path, "illada-gqa-tied", tie_word_embeddings=..., rope_scaling=..., attention_bias=...)
    assert interop.load_model(path).config.model.tied_head
    path = checkpoint(tmp_path, "illada-mha-untied", tie_word_embeddings=..., num_key_value_heads=None, rope_theta=...,
                      rope_parameters={"rope_type": "default", "rope_theta": 1234.0})
    model = interop.load_model(path).config.model
    assert not model.tied_head and model.num_kv_heads == 4 and model.rope_theta == 1234.0


def test_an_unsupported_config_is_reported_before_missing_files(tmp_path):
    path = checkpoint(tmp_path, "illada-gqa-tied", model_type="Dream")
    for file in path.glob("*.safetensors"):
        file.unlink()
    fails(path, "model_type = 'Dream'")


def test_a_checkpoint_of_pickles_only(tmp_path):
    path = checkpoint(tmp_path, "illada-mha-untied")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    fails(path, "contains no safetensors", "only pytorch_model.bin, a pickle")


@pytest.mark.parametrize("name, content, message", [
    ("config.json", None, "config.json: No such file"),
    ("config.json", "{", "config.json: not JSON"),
    ("config.json", "[]", "config.json: must be a JSON object"),
    ("tokenizer.json", None, "no tokenizer among"),
    ("tokenizer.json", "{}", "not a tokenizer.json"),
    ("generation_config.json", "{,", "generation_config.json: not JSON"),
    ("generation_config.json", '{"illada_jax": {"temperture": 1}}', "config.decode.temperture: unknown key"),
])
def test_files_beside_the_weights(tmp_path, name, content, message):
    path = checkpoint(tmp_path, "illada-mha-untied")
    (path / name).unlink() if content is None else (path / name).write_text(content)
    fails(path, message)


def test_a_tokenizer_with_more_ids_than_rows(tmp_path):
    path = checkpoint(tmp_path, "illada-mha-untied")
    edit(path / "tokenizer.json", lambda d: d["model"]["vocab"].update({f"more{i}": 262 + i for i in range(11)}))
    fails(path, "the tokenizer has 273 ids, the embedding 272 rows")


@pytest.mark.parametrize("mask_id", [5, 268])
def test_padded_ids_are_never_written(tmp_path, mask_id):
    """The embedding has 272 rows, the tokenizer 262 ids; MASK may be beyond them."""
    path = checkpoint(tmp_path, "illada-mha-untied", mask_token_id=mask_id)
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"][:] = 0
    tensors["lm_head.weight"][262:] = 20 * np.sign(tensors["lm_head.weight"][262:] + 1)
    save_file(tensors, path / "model.safetensors")
    lm = api.load(str(path))
    best = np.asarray(lm.logits(np.arange(12)[None])).argmax(-1)
    assert (best >= 262).any()  # the network prefers them
    for result in lm.generate(["abc", "x"], max_new_tokens=24, block_length=8, temperature=5.0):
        assert len(result.tokens) and max(result.tokens) < 262
    for result in lm.infill(["abc [[mask:9]]"]):
        assert max(result.tokens) < 262
    assert lm.tokenizer.unused_ids == (tuple(range(262, 268)) if mask_id == 268 else ())


def test_neither_workdir_nor_checkpoint(tmp_path):
    fails(tmp_path, "not a checkpoint")
    fails(tmp_path / "nothing", "not a checkpoint")
    fails(tmp_path, "dtype = 'int4': must be 'float32' or 'bfloat16'", dtype="int4")
    fails(tmp_path, "quantize = 'int4': must be 'none' or 'int8'", quantize="int4")
    fails(tmp_path, "special_ids", "is not a Hugging Face directory", special_ids={"mask": 3})
