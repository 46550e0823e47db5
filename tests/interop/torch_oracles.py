"""Independent implementations of the two families in PyTorch, over tensors with the names of the public files.

Used by the fixture script and by the live tests; nothing here knows illada_jax.
"""

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES = {"illada": {"layers": "num_hidden_layers", "width": "hidden_size", "ff": "intermediate_size"},
          "llada": {"layers": "n_layers", "width": "d_model", "ff": "mlp_hidden_size"}}


def random_state(config: dict, seed: int) -> dict[str, torch.Tensor]:
    """Random tensors by their public names, large enough for a wrong layout to show."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape, std: std * torch.randn(*shape, generator=generator)  # noqa: E731
    sizes = SHAPES[config["model_type"]]
    layers, width, ff = (config[sizes[name]] for name in ("layers", "width", "ff"))
    if config["model_type"] == "illada":
        heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
        block, names = "model.layers.{}.", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                                            "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
                                            "input_layernorm", "post_attention_layernorm")
        embedding, norm, head = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
        tied = config["tie_word_embeddings"]
    else:
        heads, kv = config["n_heads"], config["n_kv_heads"]
        block, names = "model.transformer.blocks.{}.", ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj",
                                                        "ff_out", "attn_norm", "ff_norm")
        embedding, norm, head = "model.transformer.wte.weight", "model.transformer.ln_f.weight", \
            "model.transformer.ff_out.weight"
        tied = config["weight_tying"]
    kv_width = width // heads * kv
    shapes = [(width, width), (kv_width, width), (kv_width, width), (width, width), (ff, width), (ff, width),
              (width, ff), (width,), (width,)]
    unit = width**-0.5
    state = {embedding: draw(config["vocab_size"], width, std=2.8 * unit)}
    for layer in range(layers):
        for name, shape in zip(names, shapes, strict=True):
            tensor = draw(*shape, std=1.6 * unit) if len(shape) == 2 else 1 + draw(*shape, std=0.2)
            state[f"{block.format(layer)}{name}.weight"] = tensor
    state[norm] = 1 + draw(width, std=0.2)
    if not tied:
        state[head] = draw(config["vocab_size"], width, std=2 * unit)
    return state


@torch.no_grad()
def logits(config: dict, state: dict[str, torch.Tensor], tokens_BL: torch.Tensor, real_BL: torch.Tensor):
    """Float32 logits [B, L, V]; positions where `real_BL` is False are padding, which no position attends to."""
    state = {name: tensor.float() for name, tensor in state.items()}
    function = illada_logits if config["model_type"] == "illada" else llada_logits
    return function(config, state, tokens_BL, real_BL)


def illada_logits(config, state, tokens_BL, real_BL):
    """The Llama of `transformers`, made bidirectional by its mask."""
    keys = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    network = LlamaForCausalLM(LlamaConfig(**keys, attn_implementation="eager")).float().eval()
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    network.tie_weights()
    mask_B1LL = torch.zeros(len(tokens_BL), 1, tokens_BL.shape[1], tokens_BL.shape[1])
    mask_B1LL.masked_fill_(~real_BL[:, None, None, :], torch.finfo(torch.float32).min)
    return network(tokens_BL, attention_mask=mask_B1LL, use_cache=False).logits


def llada_logits(config, state, tokens_BL, real_BL):
    """LLaDA from its description: RMSNorm, rotate-half RoPE, attention over everything, SwiGLU."""
    heads, width = config["n_heads"], config["d_model"]
    part = width // heads
    frequencies = 1 / config["rope_theta"] ** (torch.arange(0, part, 2).double() / part)
    angles = torch.arange(tokens_BL.shape[1]).double()[:, None] * frequencies
    cos, sin = (torch.cat([f(angles)] * 2, dim=-1).float() for f in (torch.cos, torch.sin))

    def norm(x, name):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config["rms_norm_eps"]) * state[name + ".weight"]

    def linear(x, name):
        return F.linear(x, state[name + ".weight"])

    def turn(x):
        return x * cos + torch.cat([-x[..., part // 2:], x[..., : part // 2]], dim=-1) * sin

    x = state["model.transformer.wte.weight"][tokens_BL]
    for layer in range(config["n_layers"]):
        block = f"model.transformer.blocks.{layer}."
        y = norm(x, block + "attn_norm")
        q, k, v = (linear(y, block + name).unflatten(-1, (-1, part)).transpose(1, 2)
                   for name in ("q_proj", "k_proj", "v_proj"))
        k, v = (t.repeat_interleave(heads // config["n_kv_heads"], dim=1) for t in (k, v))
        scores = turn(q) @ turn(k).transpose(-1, -2) / part**0.5
        scores = scores.masked_fill(~real_BL[:, None, None, :], -torch.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), block + "attn_out")
        y = norm(x, block + "ff_norm")
        x = x + linear(F.silu(linear(y, block + "ff_proj")) * linear(y, block + "up_proj"), block + "ff_out")
    x = norm(x, "model.transformer.ln_f")
    head = "model.transformer.wte" if config["weight_tying"] else "model.transformer.ff_out"
    return linear(x, head)
