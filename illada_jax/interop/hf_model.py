"""A Hugging Face directory of a known family as a model: its config, ids, tokenizer, and lazily its tensors."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from illada_jax import config as config_lib
from illada_jax.config import Config, DataConfig, DecodeConfig, DiffusionConfig, ModelConfig
from illada_jax.data.tokenizers import SPECIAL_NAMES, TOKENIZER_FILES, Tokenizer, tokenizer_from_files
from illada_jax.errors import InputError
from illada_jax.files import CONFIG_BYTES, TOKENIZER_BYTES, parse_json, read_file, read_json
from illada_jax.interop.families import Family, find_family, read_model_config
from illada_jax.interop.importing import import_params
from illada_jax.interop.tensors import INDEX, TensorDirectory

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
DECODE_KEY = "illada_jax"  # key of generation_config.json for the sampler's settings
_EOT_TOKENS = ("<|eot_id|>", "<|eot|>")


@dataclasses.dataclass(frozen=True)
class HFModel:
    """A Hugging Face directory as a LazyModel.

    Its config has the model, in the narrower of float32 and bfloat16 that holds every tensor exactly, and the sampler
    that the family was published with; the training step is unknown.
    """

    family: Family
    config: Config
    tokenizer: Tokenizer
    tensors: TensorDirectory
    step: int = 0
    quantized: bool = False

    def restore(self, dtype: jnp.dtype, mesh: Mesh | None, quantized: bool = False) -> Any:
        """See LazyModel."""
        return import_params(self.tensors, self.family, self.config.model, dtype, mesh, quantized)


def is_hf_directory(directory: pathlib.Path) -> bool:
    """True if a directory looks like a Hugging Face checkpoint, even a broken one."""
    if (directory / INDEX).exists() or any(directory.glob("*.safetensors")) or any(directory.glob("*.bin")):
        return True
    return (directory / CONFIG).exists() and "model_type" in read_json(directory / CONFIG, CONFIG_BYTES)


def open_hf_model(directory: pathlib.Path, special_ids: Mapping[str, int] | None = None) -> HFModel:
    """Reads everything but the weights: config.json, the headers of safetensors, a tokenizer.

    `special_ids` (mask, bos, eos, pad, eot) override those of config, tokenizer and family. Raises InputError if a file
    is missing, broken or not supported.
    """
    values = read_json(directory / CONFIG, CONFIG_BYTES)
    with _naming(directory / CONFIG):
        family = find_family(values)
    tensors = TensorDirectory(directory)
    with _naming(directory / CONFIG):
        model = read_model_config(family, values, tensors.tensors)
    dtypes = {tensor.dtype.name for tensor in tensors.tensors.values()}
    model = dataclasses.replace(model, dtype="bfloat16" if dtypes == {"bfloat16"} else "float32")
    path = directory / GENERATION_CONFIG
    generation = read_json(path, CONFIG_BYTES) if path.exists() else {}
    tokenizer, stop_ids, eot_id = _read_tokenizer(directory, family, model, (values, generation), special_ids or {})
    config = Config(model=model, data=DataConfig(length=model.max_length),
                    decode=_read_decode_config(family, model, generation, stop_ids, eot_id),
                    diffusion=DiffusionConfig(mask_id=tokenizer.mask_id))
    return HFModel(family, config, tokenizer, tensors)


def _read_tokenizer(directory: pathlib.Path, family: Family, model: ModelConfig, configs: Sequence[Mapping[str, Any]],
                    overrides: Mapping[str, int]) -> tuple[Tokenizer, tuple[int, ...], int]:
    """(tokenizer, further stop ids, the id of EoT or -1). Earlier `configs` take precedence."""
    files = {name: read_file(directory / name, TOKENIZER_BYTES) for name in TOKENIZER_FILES
             if (directory / name).exists()}
    with _naming(directory):
        named = tokenizer_from_files(files)
    for name in overrides:
        if name not in (*SPECIAL_NAMES, "eot"):
            raise InputError(f"special_ids: unknown name {name!r}; known: {', '.join(SPECIAL_NAMES)}, eot")
    # The tokenizers of this package define all special ids; a Hugging Face tokenizer may lack some (LLaDA's: MASK).
    by_tokenizer = named.special_ids if "special_ids.json" in files else getattr(named, "named_ids", named.special_ids)
    configured = {name: [id_ for values in configs for id_ in _ids(values, name)] for name in SPECIAL_NAMES}
    first = {name: ids[0] for name, ids in configured.items() if ids}
    merged = {**family.special_ids, **by_tokenizer, **first, **overrides}
    ids = {name: merged[name] for name in SPECIAL_NAMES}
    # Several ids may end a text; the first is EOS. An override replaces them all.
    stop_ids = [] if "eos" in overrides else configured["eos"]
    for name, id_ in (*ids.items(), *(("eos", id_) for id_ in stop_ids), ("eot", overrides.get("eot", 0))):
        if type(id_) is not int or not 0 <= id_ < model.vocab_size:
            raise InputError(f"{directory}: the id of {name}, {id_!r}, is outside the vocabulary of "
                             f"{model.vocab_size}; give it with --{name}_id")
    if ids["mask"] in (ids["eos"], ids["bos"]):
        raise InputError(f"{directory}: MASK must not share its id {ids['mask']} with EOS or BOS; give it with "
                         "--mask_id")
    described = parse_json(files.get("special_ids.json", b'{"kind": "huggingface"}'), "special_ids.json") | ids
    tokenizer = tokenizer_from_files({**files, "special_ids.json": json.dumps(described, indent=1).encode()})
    if tokenizer.vocab_size > model.vocab_size:
        raise InputError(f"{directory}: the tokenizer has {tokenizer.vocab_size} ids, the embedding "
                         f"{model.vocab_size} rows")
    eot_ids = [named.special_tokens[token] for token in _EOT_TOKENS if token in named.special_tokens]
    eot_id = overrides.get("eot", (*eot_ids, family.eot_id)[0])
    eot_id = eot_id if 0 <= eot_id < tokenizer.vocab_size else -1
    stop_ids = [id_ for id_ in (*stop_ids, eot_id) if id_ not in (-1, tokenizer.eos_id)]
    return tokenizer, tuple(dict.fromkeys(stop_ids)), eot_id


def _ids(values: Mapping[str, Any], name: str) -> list[Any]:
    """The ids that a config gives for a special token: none, one or several. Some configs write -1 for none."""
    ids = values.get(f"{name}_token_id")
    return [id_ for id_ in (ids if isinstance(ids, list) else [ids]) if id_ not in (None, -1)]


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
    """Prefixes the message of an InputError with the path."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _read_decode_config(family: Family, model: ModelConfig, generation: Mapping[str, Any], stop_ids: tuple[int, ...],
                        eot_id: int) -> DecodeConfig:
    """The sampler that an export of this package wrote, else that of the family."""
    if DECODE_KEY in generation:
        return config_lib.override(DecodeConfig(), "decode", generation[DECODE_KEY])
    block = min(family.decode.block_length, model.max_length)
    max_new_tokens = min(family.decode.max_new_tokens, model.max_length // block * block)
    return dataclasses.replace(family.decode, block_length=block, steps_per_block=block,
                               max_new_tokens=max_new_tokens, stop_ids=stop_ids, eot_id=eot_id)
