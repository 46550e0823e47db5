"""Opens and loads any model: a workdir, a Hugging Face directory, the Hub id of one, or a demo."""

import dataclasses
import importlib.resources
import pathlib
import re
from collections.abc import Mapping
from typing import Literal

import jax.numpy as jnp
from absl import logging
from etils import epath
from jax.sharding import Mesh

from illada_jax.data.tokenizers import lost_text
from illada_jax.errors import InputError
from illada_jax.interop.hf_model import is_hf_directory, open_hf_model
from illada_jax.training.saved_model import LazyModel, LoadedModel, open_saved_model

Quantize = Literal["none", "int8"]
# Small models that come with the package, see `illada_jax/demo/README.md`.
DEMOS = {"demo": "pretrained", "demo-chat": "chat"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model")


def load_model(path: str | epath.Path, dtype: Literal["float32", "bfloat16"] = "float32", mesh: Mesh | None = None,
               quantize: Quantize = "none", special_ids: Mapping[str, int] | None = None,
               chat_template: str = "") -> LoadedModel:
    """Loads a model for decoding and scoring. For arguments and errors see `illada_jax.load`."""
    for name, value, allowed in (("dtype", dtype, ("float32", "bfloat16")), ("quantize", quantize, ("none", "int8"))):
        if value not in allowed:
            raise InputError(f"{name} = {value!r}: must be {' or '.join(map(repr, allowed))}")
    lazy = open_model(path, special_ids)
    if chat_template:
        lazy.tokenizer.choose_chat_template(chat_template)
    lost = lost_text(lazy.tokenizer)
    if lost:
        logging.warning("%s: its tokenizer cannot hold every text: %s", path, lost)
    config = dataclasses.replace(lazy.config, model=dataclasses.replace(lazy.config.model, dtype=dtype))
    params = lazy.restore(jnp.dtype(dtype), mesh, quantize == "int8")
    return LoadedModel(config, params, lazy.tokenizer, lazy.step)


def open_model(path: str | epath.Path, special_ids: Mapping[str, int] | None = None) -> LazyModel:
    """Opens a model without reading its params. For arguments and errors see `illada_jax.load`."""
    directory = _find_hf_directory(path)
    if directory is not None:
        return open_hf_model(directory, special_ids)
    if special_ids:
        raise InputError(f"special_ids: {path} is not a Hugging Face directory; its tokenizer defines its ids")
    return open_saved_model(path)


def _find_hf_directory(path: str | epath.Path) -> pathlib.Path | None:
    """The Hugging Face directory that `path` is or names (a Hub id is downloaded if necessary); None for others."""
    directory = pathlib.Path(path)
    if directory.is_dir():
        return directory if is_hf_directory(directory) else None
    if str(path) in DEMOS:
        return pathlib.Path(str(importlib.resources.files("illada_jax"))) / "demo" / DEMOS[str(path)]
    # `workdirs/nothing` is a missing directory rather than a Hub id.
    if _HUB_ID.fullmatch(str(path)) and not directory.parent.exists() and directory.parts[0] != "workdirs":
        return _download(str(path))
    return None


def _download(hub_id: str) -> pathlib.Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError(f"{hub_id}: no such directory; downloads from the Hub need illada_jax[hub]") from error
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # of the library, the disk, or its transport, whose errors it does not wrap
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"{hub_id}: no such directory, and the Hub download failed: {reason}") from error
