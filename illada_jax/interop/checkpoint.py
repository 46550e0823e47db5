"""A Hugging Face directory of a known family: its config, its ids, its tokenizer, and where its tensors are."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from illada_jax import config as config_lib
from illada_jax.config import Config, DataConfig, DecodeConfig, DiffusionConfig, ModelConfig
from illada_jax.data.tokenizers import CHAT_FILES, SPECIAL_NAMES, Tokenizer, tokenizer_from_files
from illada_jax.errors import InputError
from illada_jax.interop.families import Family, family_of, read_model_config
from illada_jax.interop.importing import import_params
from illada_jax.interop.tensors import INDEX, TensorDirectory

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
DECODE_KEY = "illada_jax"  # of generation_config.json: settings of the sampler
TOKENIZER_FILES = ("tokenizer.json", "sentencepiece.model", "special_ids.json", *CHAT_FILES)
_EOT_TOKENS = ("<|eot_id|>", "<|eot|>")


@dataclasses.dataclass(frozen=True)
class HuggingFaceCheckpoint:
    """What `read_checkpoint` found.

    Attributes:
      family: its family.
      config: the model, and the sampler that the family was published with; the rest are defaults.
      tokenizer: its tokenizer, with the special ids of the config.
      tensors: its tensors.
      step: of the training, which nobody has told.
      quantized: its matrices are not Int8.
    """

    family: Family
    config: Config
    tokenizer: Tokenizer
    tensors: TensorDirectory
    step: int = 0
    quantized: bool = False

    @property
    def dtype(self) -> np.dtype:
        """The narrowest of float32 and bfloat16 that holds every tensor exactly."""
        dtypes = {tensor.dtype for tensor in self.tensors.tensors.values()}
        return dtypes.pop() if {dtype.name for dtype in dtypes} == {"bfloat16"} else np.dtype(np.float32)

    def restore(self, dtype: jnp.dtype, mesh: Mesh | None, quantized: bool = False) -> Any:
        """The params in `dtype`, on the mesh or the first device; with `quantized`, matrices as Int8."""
        return import_params(self.tensors, self.family, self.config.model, dtype, mesh, quantized)


def is_checkpoint(directory: pathlib.Path) -> bool:
    """Whether a directory looks like a Hugging Face checkpoint, be it a broken one."""
    if (directory / INDEX).exists() or any(directory.glob("*.safetensors")) or any(directory.glob("*.bin")):
        return True
    return (directory / CONFIG).exists() and "model_type" in _read_json(directory / CONFIG)


def read_checkpoint(directory: pathlib.Path, special_ids: Mapping[str, int] | None = None) -> HuggingFaceCheckpoint:
    """Reads everything but the weights.

    Args:
      directory: holds config.json, safetensors and a tokenizer.
      special_ids: ids (mask, bos, eos, pad, eot) that go before those of config, tokenizer and family.

    Raises:
      InputError: a file is missing, broken or not supported; names the file and what is wrong with it.
    """
    path = directory / CONFIG
    values = _read_json(path)
    with _naming(path):
        family = family_of(values)
    tensors = TensorDirectory(directory)
    with _naming(path):
        model = read_model_config(family, values, family.tensors["head"] in tensors.tensors)
    generation = _read_json(directory / GENERATION_CONFIG) if (directory / GENERATION_CONFIG).exists() else {}
    tokenizer, stop_ids, eot_id = _read_tokenizer(directory, family, model, (values, generation), special_ids or {})
    decode = _read_decode(family, model, generation, stop_ids, eot_id)
    config = Config(model=model, data=DataConfig(length=model.max_length), decode=decode,
                    diffusion=DiffusionConfig(mask_id=tokenizer.mask_id))
    checkpoint = HuggingFaceCheckpoint(family, config, tokenizer, tensors)
    model = dataclasses.replace(model, dtype=checkpoint.dtype.name)
    return dataclasses.replace(checkpoint, config=dataclasses.replace(config, model=model))


def _read_tokenizer(directory: pathlib.Path, family: Family, model: ModelConfig, configs: Sequence[Mapping[str, Any]],
                    overrides: Mapping[str, int]) -> tuple[Tokenizer, tuple[int, ...], int]:
    """The tokenizer, further ids that end an answer, and the id of EoT or -1. Of `configs` the first goes first."""
    files = {name: (directory / name).read_bytes() for name in TOKENIZER_FILES if (directory / name).exists()}
    with _naming(directory):
        named = tokenizer_from_files(files)
    for name in overrides:
        if name not in (*SPECIAL_NAMES, "eot"):
            raise InputError(f"special_ids: unknown name {name!r}; known: {', '.join(SPECIAL_NAMES)}, eot")
    # A tokenizer of ours names all of its ids; one of Hugging Face's may lack some (LLaDA's: MASK).
    by_tokenizer = named.special_ids if "special_ids.json" in files else named.named_ids
    given = {name: [id_ for values in configs for id_ in _ids(values, name)] for name in SPECIAL_NAMES}
    found = {}
    for name in SPECIAL_NAMES:
        sources = (overrides.get(name), *given[name], by_tokenizer.get(name), family.special_ids[name])
        found[name] = next(id_ for id_ in sources if id_ is not None)
    # Several ids may end a text; the first is EOS. Whoever overrides it means it alone.
    ends = [] if "eos" in overrides else given["eos"]
    for name, id_ in (*found.items(), *(("eos", id_) for id_ in ends), ("eot", overrides.get("eot", 0))):
        if type(id_) is not int or not 0 <= id_ < model.vocab_size:
            raise InputError(f"{directory}: the id of {name}, {id_!r}, lies outside the vocabulary of "
                             f"{model.vocab_size}; give it with --{name}_id")
    if found["mask"] in (found["eos"], found["bos"]):
        raise InputError(f"{directory}: MASK must not share its id {found['mask']} with EOS or BOS; give it with "
                         "--mask_id")
    tokenizer = tokenizer_from_files({**files, "special_ids.json": _specials(files, found)})
    if tokenizer.vocab_size > model.vocab_size:
        raise InputError(f"{directory}: the tokenizer has {tokenizer.vocab_size} ids, the embedding "
                         f"{model.vocab_size} rows")
    eot = overrides.get("eot", next((named.special_tokens[t] for t in _EOT_TOKENS if t in named.special_tokens),
                                    family.eot_id))
    eot = eot if 0 <= eot < tokenizer.vocab_size else -1
    ends = [id_ for id_ in (*ends, eot) if id_ not in (-1, tokenizer.eos_id)]
    return tokenizer, tuple(dict.fromkeys(ends)), eot


def _ids(values: Mapping[str, Any], name: str) -> list[Any]:
    """What a config gives as ids of a special token: none, one or several. Some write -1 for none."""
    given = values.get(f"{name}_token_id")
    return [id_ for id_ in (given if isinstance(given, list) else [given]) if id_ not in (None, -1)]


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
    """Puts the path before the message of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _specials(files: Mapping[str, bytes], ids: Mapping[str, int]) -> bytes:
    described = json.loads(files.get("special_ids.json", b'{"kind": "huggingface"}'))
    return json.dumps({**described, **ids}, indent=1).encode()


def _read_decode(family: Family, model: ModelConfig, generation: Mapping[str, Any], stop_ids: tuple[int, ...],
                 eot_id: int) -> DecodeConfig:
    """The sampler: what an export of ours wrote down, else that of the family."""
    if DECODE_KEY in generation:
        return config_lib.override(DecodeConfig(), "decode", generation[DECODE_KEY])
    block = min(family.decode.block_length, model.max_length)
    tokens = min(family.decode.max_new_tokens, model.max_length // block * block)
    return dataclasses.replace(family.decode, block_length=block, steps_per_block=block, max_new_tokens=tokens,
                               stop_ids=stop_ids, eot_id=eot_id)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: must be a JSON object")
    return values
