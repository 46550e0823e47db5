"""One way to load a model, whatever it is: a workdir, a Hugging Face directory, or the id of one on the Hub."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Literal

import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from illada_jax.errors import InputError
from illada_jax.interop.checkpoint import HuggingFaceCheckpoint, is_checkpoint, read_checkpoint
from illada_jax.interop.importing import import_params
from illada_jax.training.saved_model import Loaded, load_inference

Quantize = Literal["none", "int8"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model")


def load_model(path: str | epath.Path, dtype: Literal["float32", "bfloat16"] = "float32", mesh: Mesh | None = None,
               quantize: Quantize = "none", special_ids: Mapping[str, int] | None = None) -> Loaded:
    """Loads a model for decoding and scoring.

    Args:
      path: a workdir (its newest checkpoint), one checkpoint in it, a Hugging Face directory, or a Hub id such as
        `GSAI-ML/LLaDA-8B-Instruct`.
      dtype: type of params and compute.
      mesh: devices that the params are spread over; None takes the first device.
      quantize: `int8` rounds the matrices to eight bits as they are read.
      special_ids: ids by name (mask, bos, eos, pad, eot) that go before those in a Hugging Face directory.

    Raises:
      InputError: there is no model, or it is broken or not supported; the message names what is wrong.
    """
    for name, value, allowed in (("dtype", dtype, ("float32", "bfloat16")), ("quantize", quantize, ("none", "int8"))):
        if value not in allowed:
            raise InputError(f"{name} = {value!r}: must be {' or '.join(map(repr, allowed))}")
    directory = find_checkpoint(path)
    if directory is None:
        if special_ids:
            raise InputError(f"special_ids: {path} is no Hugging Face checkpoint; its ids are in its tokenizer")
        return load_inference(path, dtype, mesh, quantize == "int8")
    checkpoint = read_checkpoint(directory, special_ids)
    return load_checkpoint(checkpoint, dtype, mesh, quantize)


def load_checkpoint(checkpoint: HuggingFaceCheckpoint, dtype: str, mesh: Mesh | None, quantize: Quantize) -> Loaded:
    """Imports the weights of a Hugging Face checkpoint; for the arguments see `load_model`."""
    model = dataclasses.replace(checkpoint.config.model, dtype=dtype)
    params = import_params(checkpoint.tensors, checkpoint.family, model, jnp.dtype(dtype), mesh, quantize == "int8")
    config = dataclasses.replace(checkpoint.config, model=model)
    return Loaded(config, params, checkpoint.tokenizer, step=0)


def find_checkpoint(path: str | epath.Path) -> pathlib.Path | None:
    """The Hugging Face directory that `path` is, or is the Hub id of (fetched if need be); None for all else."""
    directory = pathlib.Path(path)
    if directory.is_dir():
        return directory if is_checkpoint(directory) else None
    # In `workdirs/nothing` it is a directory that is missing.
    if _HUB_ID.fullmatch(str(path)) and not directory.parent.exists():
        return _fetch(str(path))
    return None


def _fetch(hub_id: str) -> pathlib.Path:
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise InputError(f"{hub_id}: no such directory; to fetch it from the Hub, install illada_jax[hub]") from error
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{hub_id}: no such directory, and it cannot be fetched from the Hub: {reason}") from error
