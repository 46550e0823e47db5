"""The public checkpoint layouts, one table per family: names of tensors, keys of `config.json`, special ids.

All names and ids are those of the released files (GSAI-ML/LLaDA-8B-*, LLaDA-1.5 and GSAI-ML/iLLaDA-8B-*), which store
a linear layer as [out, in].
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from illada_jax import config as config_lib
from illada_jax.config import MAX_SIZE, DecodeConfig, ModelConfig
from illada_jax.errors import ConfigError, InputError


@dataclasses.dataclass(frozen=True)
class Family:
    """The checkpoint layout of one family of models."""

    model_type: str  # its name in config.json
    architecture: str  # the class of its modelling file
    tensors: Mapping[str, str]  # the name of each param's tensor, by path; `{}` is the layer's number
    keys: Mapping[str, tuple[str, ...]]  # of config.json that may hold each field of ModelConfig; the first is written
    supported: Mapping[str, tuple[Any, ...]]  # values of further keys; the first is written, unless it is None
    special_ids: Mapping[str, int]  # defaults for ids that neither config nor tokenizer define
    eot_id: int  # the end of a turn; -1 if there is none
    decode: DecodeConfig  # the sampler that the models were published with


LLADA = Family(
    model_type="llada",
    architecture="LLaDAModelLM",
    tensors={
        "embedding": "model.transformer.wte.weight",
        "layers/attention_norm/scale": "model.transformer.blocks.{}.attn_norm.weight",
        "layers/attention/q": "model.transformer.blocks.{}.q_proj.weight",
        "layers/attention/k": "model.transformer.blocks.{}.k_proj.weight",
        "layers/attention/v": "model.transformer.blocks.{}.v_proj.weight",
        "layers/attention/o": "model.transformer.blocks.{}.attn_out.weight",
        "layers/mlp_norm/scale": "model.transformer.blocks.{}.ff_norm.weight",
        "layers/mlp/gate": "model.transformer.blocks.{}.ff_proj.weight",
        "layers/mlp/up": "model.transformer.blocks.{}.up_proj.weight",
        "layers/mlp/down": "model.transformer.blocks.{}.ff_out.weight",
        "final_norm/scale": "model.transformer.ln_f.weight",
        "head": "model.transformer.ff_out.weight",
    },
    keys={
        "vocab_size": ("embedding_size", "vocab_size"),
        "d_model": ("d_model",),
        "num_layers": ("n_layers",),
        "num_heads": ("n_heads",),
        "num_kv_heads": ("n_kv_heads", "n_heads"),
        "d_ff": ("mlp_hidden_size",),
        "max_length": ("max_sequence_length",),
        "rope_theta": ("rope_theta",),
        "norm_eps": ("rms_norm_eps",),
        "tied_head": ("weight_tying",),
    },
    supported={
        "block_type": ("llama",),
        "block_group_size": (1,),
        "activation_type": ("silu",),
        "layer_norm_type": ("rms",),
        "layer_norm_with_affine": (True,),
        "layer_norm_eps": (None,),
        "attention_layer_norm": (False,),
        "bias_for_layer_norm": (False, None),
        "include_bias": (False,),
        "include_qkv_bias": (False, None),
        "input_emb_norm": (False,),
        "scale_logits": (False,),
        "multi_query_attention": (None, False),
        "clip_qkv": (None,),
        "alibi": (False,),
        "rope": (True,),
        "quantization_config": (None,),
    },
    special_ids={"mask": 126_336, "bos": 126_080, "eos": 126_081, "pad": 126_081},
    eot_id=126_348,
    decode=DecodeConfig(length="fixed", max_new_tokens=128, block_length=32, steps_per_block=32),
)

ILLADA = Family(
    model_type="illada",
    architecture="ILLaDAForCausalLM",
    tensors={
        "embedding": "model.embed_tokens.weight",
        "layers/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
        "layers/attention/q": "model.layers.{}.self_attn.q_proj.weight",
        "layers/attention/k": "model.layers.{}.self_attn.k_proj.weight",
        "layers/attention/v": "model.layers.{}.self_attn.v_proj.weight",
        "layers/attention/o": "model.layers.{}.self_attn.o_proj.weight",
        "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
        "layers/mlp/gate": "model.layers.{}.mlp.gate_proj.weight",
        "layers/mlp/up": "model.layers.{}.mlp.up_proj.weight",
        "layers/mlp/down": "model.layers.{}.mlp.down_proj.weight",
        "final_norm/scale": "model.norm.weight",
        "head": "lm_head.weight",
    },
    keys={
        "vocab_size": ("vocab_size",),
        "d_model": ("hidden_size",),
        "num_layers": ("num_hidden_layers",),
        "num_heads": ("num_attention_heads",),
        "num_kv_heads": ("num_key_value_heads", "num_attention_heads"),
        "d_ff": ("intermediate_size",),
        "max_length": ("max_position_embeddings",),
        "rope_theta": ("rope_theta",),
        "norm_eps": ("rms_norm_eps",),
        "tied_head": ("tie_word_embeddings",),
    },
    supported={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "layer_norm_eps": (None,),
        "sliding_window": (None,),
        "partial_rotary_factor": (None, 1.0),
        "quantization_config": (None,),
    },
    special_ids={"mask": 5, "bos": 0, "pad": 1, "eos": 2},
    eot_id=-1,
    decode=DecodeConfig(length="variable", max_new_tokens=1024, block_length=32, steps_per_block=32),
)

FAMILIES = {family.model_type: family for family in (LLADA, ILLADA)}
_SIZES = ("vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "d_ff", "max_length")


def find_family(values: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises InputError for an unknown model_type or a key for an unsupported feature."""
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(f"model_type = {model_type!r}: must be one of {', '.join(map(repr, FAMILIES))}")
    family = FAMILIES[model_type]
    for key, allowed in family.supported.items():
        if key in values and values[key] not in allowed:
            raise InputError(f"{key} = {values[key]!r}: not supported; must be {' or '.join(map(repr, allowed))}")
    return family


def read_model_config(family: Family, values: Mapping[str, Any], tensors: Mapping[str, Any]) -> ModelConfig:
    """The model that a config.json describes; its head is tied if the config says so, or else if the weights have none.

    `tensors` are those of the weights, by name. Raises InputError if a key is missing or invalid, requires unsupported
    rotary positions, or gives a size that no model with so many tensors has.
    """
    given = {field: next((values[key] for key in keys if values.get(key) is not None), None)
             for field, keys in family.keys.items()}
    given["rope_theta"] = _rope_theta(values, given["rope_theta"])
    if given["tied_head"] is None:
        given["tied_head"] = family.tensors["head"] not in tensors
    for field, value in given.items():
        if value is None:
            raise InputError(f"{family.keys[field][0]}: missing")
        if field in _SIZES and (not isinstance(value, int) or not 1 <= value <= MAX_SIZE):
            raise InputError(f"{family.keys[field][0]} = {value!r}: must be a whole number above 0 and at most "
                             f"{MAX_SIZE:,}")
    if given["num_layers"] > len(tensors):  # before the tensors of all layers are listed
        raise InputError(f"{family.keys['num_layers'][0]} = {given['num_layers']}: the weights have only "
                         f"{len(tensors)} tensors")
    if given["d_model"] % given["num_heads"]:
        raise InputError(f"{family.keys['d_model'][0]} = {given['d_model']}: must be divisible by "
                         f"{family.keys['num_heads'][0]} = {given['num_heads']}")
    given["head_dim"] = given["d_model"] // given["num_heads"]
    if values.get("head_dim") not in (None, given["head_dim"]):
        raise InputError(f"head_dim = {values['head_dim']!r}: not supported; must be {given['head_dim']}, "
                         f"{family.keys['d_model'][0]} / {family.keys['num_heads'][0]}")
    try:
        return config_lib.override(ModelConfig(), "model", given)
    except ConfigError as error:
        raise InputError(f"invalid model: {error}") from error


def write_model_config(family: Family, model: ModelConfig) -> dict[str, Any]:
    """Inverse of `read_model_config`. Raises InputError if the family cannot express the model."""
    if model.head_dim * model.num_heads != model.d_model:
        raise InputError(f"config.model.head_dim = {model.head_dim}: a checkpoint of the family {family.model_type!r} "
                         f"needs model.d_model / model.num_heads = {model.d_model // model.num_heads}")
    values = {"model_type": family.model_type, "architectures": [family.architecture], "vocab_size": model.vocab_size}
    values |= {keys[0]: getattr(model, field) for field, keys in family.keys.items()}
    return values | {key: allowed[0] for key, allowed in family.supported.items() if allowed[0] is not None}


def _rope_theta(values: Mapping[str, Any], theta: Any) -> Any:
    """The base of the rotary frequencies, under any of its keys. Raises InputError for scaled or partial rotation."""
    for key in ("rope_scaling", "rope_parameters"):
        rope = values.get(key) or {}
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
        if kind != "default" or any(rope.get(name, 1.0) != 1.0 for name in ("factor", "partial_rotary_factor")):
            raise InputError(f"{key} = {values[key]!r}: not supported; must be null")
        theta = rope.get("rope_theta", theta)
    return theta
