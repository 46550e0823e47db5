"""A run's working directory: `config.json` makes a directory a workdir."""

import contextlib
import json
from typing import Any

from etils import epath

from illada_jax import config as config_lib
from illada_jax.config import Config
from illada_jax.data.tokenizers import Tokenizer
from illada_jax.errors import InputError, StorageError
from illada_jax.files import read_json, remove_leftovers, write_atomically

CONFIG = "config.json"
_TOKENIZER = "tokenizer"


def prepare_workdir(workdir: epath.Path, config: Config, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Creates the workdir, or recognises one that an earlier process of this run created. For one process.

    Returns:
      The config that the workdir was created with, as a dict; None if it is new.

    Raises:
      InputError: the workdir cannot be written, or holds something else.
    """
    path = workdir / CONFIG
    if path.exists():
        values = read_json(path)
        try:
            return config_lib.to_dict(config_lib.from_saved(values))
        except (ValueError, AttributeError) as error:
            raise InputError(f"{path}: not the config of a run: {error}") from error
    try:
        with contextlib.suppress(FileNotFoundError):
            # A process killed before it wrote the config may have left these; they are rewritten.
            remove_leftovers(path)
            if {entry.name for entry in workdir.iterdir()} - {_TOKENIZER}:
                raise InputError(f"{workdir}: neither empty nor a workdir (it has no {CONFIG})")
        workdir.mkdir(parents=True, exist_ok=True)
        tokenizer.save(workdir / _TOKENIZER)
        write_config(workdir, config)
    except OSError as error:
        raise InputError(f"{workdir}: cannot write the workdir: {error.strerror or error}") from error
    return None


def restore_missing(workdir: epath.Path, config: Config, tokenizer: Tokenizer) -> list[str]:
    """Writes the files of `prepare_workdir` that are missing; returns their names. Raises StorageError if it cannot."""
    missing = [name for name in (CONFIG, _TOKENIZER) if not (workdir / name).exists()]
    try:
        if CONFIG in missing:  # first: without it the other files are no workdir
            workdir.mkdir(parents=True, exist_ok=True)
            write_config(workdir, config)
        if _TOKENIZER in missing:
            tokenizer.save(workdir / _TOKENIZER)
    except OSError as error:
        raise StorageError(f"{workdir}: cannot write {', '.join(missing)}: {error.strerror or error}") from error
    return missing


def resume_workdir(workdir: epath.Path, config: Config, tokenizer: Tokenizer) -> None:
    """Writes the config of a resumed run, after all checks, and the tokenizer if it is missing."""
    write_config(workdir, config)
    restore_missing(workdir, config, tokenizer)


def write_config(workdir: epath.Path, config: Config) -> None:
    """Writes the config, last of all files of a new workdir."""
    write_atomically(workdir / CONFIG, json.dumps(config_lib.to_dict(config), indent=2) + "\n")
