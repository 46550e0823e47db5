"""One way to load a model, whatever it is: a workdir, a Hugging Face directory, the id of one on the Hub, or a demo."""

import importlib.resources
import pathlib
import re
from collections.abc import Mapping
from typing import Literal

from etils import epath
from jax.sharding import Mesh

from illada_jax.errors import InputError
from illada_jax.interop.checkpoint import is_checkpoint, read_checkpoint
from illada_jax.training.saved_model import LazyModel, Loaded, load_inference, open_model

Quantize = Literal["none", "int8"]
# Small models that are part of the package, see `illada_jax/demo/README.md`.
DEMOS = {"demo": "pretrained", "demo-chat": "chat"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model")


def load_model(path: str | epath.Path, dtype: Literal["float32", "bfloat16"] = "float32", mesh: Mesh | None = None,
               quantize: Quantize = "none", special_ids: Mapping[str, int] | None = None) -> Loaded:
    """Loads a model for decoding and scoring.

    Args:
      path: a workdir (its newest checkpoint), one checkpoint in it, a Hugging Face directory, a Hub id such as
        `GSAI-ML/LLaDA-8B-Instruct`, or one of DEMOS where no directory has that name.
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
    return load_inference(open_source(path, special_ids), dtype, mesh, quantize == "int8")


def open_source(path: str | epath.Path, special_ids: Mapping[str, int] | None = None) -> LazyModel:
    """Opens a model, whatever it is; its params are still to be read. For arguments and errors see `load_model`."""
    directory = find_checkpoint(path)
    if directory is not None:
        return read_checkpoint(directory, special_ids)
    if special_ids:
        raise InputError(f"special_ids: {path} is no Hugging Face checkpoint; its ids are in its tokenizer")
    return open_model(path)


def find_checkpoint(path: str | epath.Path) -> pathlib.Path | None:
    """The Hugging Face directory that `path` is or names (a Hub id is fetched if need be); None for all else."""
    directory = pathlib.Path(path)
    if directory.is_dir():
        return directory if is_checkpoint(directory) else None
    if str(path) in DEMOS:
        return pathlib.Path(str(importlib.resources.files("illada_jax"))) / "demo" / DEMOS[str(path)]
    # In `workdirs/nothing` it is a directory that is missing.
    if _HUB_ID.fullmatch(str(path)) and not directory.parent.exists() and directory.parts[0] != "workdirs":
        return _fetch(str(path))
    return None


def _fetch(hub_id: str) -> pathlib.Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError(f"{hub_id}: no such directory; to fetch it from the Hub, install illada_jax[hub]") from error
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # of the library, of its transport (whose errors it does not wrap) or of the disk
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"{hub_id}: no such directory, and it cannot be fetched from the Hub: {reason}") from error
