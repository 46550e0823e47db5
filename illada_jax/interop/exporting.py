"""A model of ours as a Hugging Face directory in the layout of a family, param by param, whole or not at all."""

import contextlib
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from illada_jax import config as config_lib
from illada_jax.config import Config
from illada_jax.data.tokenizers import Tokenizer
from illada_jax.errors import InputError
from illada_jax.interop.checkpoint import CONFIG, DECODE_KEY, GENERATION_CONFIG
from illada_jax.interop.families import Family, write_model_config
from illada_jax.interop.layout import Entry, entries
from illada_jax.interop.tensors import Tensor, write_tensors
from illada_jax.training.saved_model import SavedModel

_PIECE_BYTES = 1 << 24  # that are checked at a time
_NOTES = """\
# A masked diffusion language model

Written by illada_jax in the layout of the family `{family}`. It is not causal: attention looks both ways, logit i
predicts token i (nothing is shifted), and text is written by filling in masks (id {mask}), the surest first. The
settings of its sampler are in `generation_config.json` under `{key}`.

```bash
python -m illada_jax.generate --checkpoint=DIRECTORY --prompt="..."
```
"""


def export_model(saved: SavedModel, target: pathlib.Path, family: Family, dtype: np.dtype, shard_bytes: int) -> None:
    """Writes a Hugging Face directory: weights, config, tokenizer, the sampler's settings.

    Beside what is read, one param and one tensor are in memory.

    Args:
      saved: the model.
      target: a directory that does not exist yet, or is empty.
      family: in whose names and keys.
      dtype: type of the tensors: float32, bfloat16 or float16.
      shard_bytes: size of a file of weights.

    Raises:
      InputError: the family cannot express the model, its weights are Int8 or do not fit into `dtype`, or the target
        is not empty.
    """
    if saved.quantized:
        raise InputError(f"{saved.directory}: its weights have eight bits; export what it was made of")
    values = write_model_config(family, saved.config.model) | _ids(saved.tokenizer) | {"torch_dtype": dtype.name}
    wanted = list(entries(family, saved.config.model))
    tensors = {entry.name: Tensor(None, entry.shape, dtype) for entry in wanted}
    with whole_directory(target) as directory:
        total = sum(tensor.nbytes for tensor in tensors.values())
        with tqdm(total=total, unit="B", unit_scale=True, desc="weights", delay=1, leave=False,
                  disable=None) as progress:
            write_tensors(directory, tensors, _values(saved, wanted, dtype), shard_bytes, progress.update)
        for name, content in saved.tokenizer.files().items():
            (directory / name).write_bytes(content)
        _write_json(directory / GENERATION_CONFIG, _generation(saved.config, saved.tokenizer))
        (directory / "README.md").write_text(_NOTES.format(
            family=family.model_type, mask=saved.tokenizer.mask_id, key=DECODE_KEY))
        # Last: without it the directory is no checkpoint.
        _write_json(directory / CONFIG, values)


@contextlib.contextmanager
def whole_directory(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory to write into. It becomes `target` at the end, and vanishes if anything goes wrong before.

    What a killed process has left behind, `.NAME.partial`, is removed by the next that writes the same target.

    Raises:
      InputError: the target is there and not empty, or cannot be written.
    """
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise InputError(f"{target}: is there already and not empty; choose another target")
        partial = target.absolute().with_name(f".{target.absolute().name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            if target.exists():
                target.rmdir()
            partial.rename(target.absolute())
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {error.strerror or error}") from error


def _values(saved: SavedModel, wanted: list[Entry], dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) of all entries, which come param by param."""
    path, param = "", None
    for entry in wanted:
        if entry.path != path:
            path, param = entry.path, None  # the last one goes before the next one comes
            param = saved.read_param(path)
        inner = param if entry.layer is None else param[entry.layer]
        with np.errstate(over="ignore"):
            tensor = entry.to_tensor(inner).astype(dtype, copy=False)
        if not _is_finite(tensor):
            raise InputError(f"{saved.directory}: {path} has values that are not finite in {dtype.name}")
        yield entry.name, tensor


def _is_finite(tensor: np.ndarray) -> bool:
    """Piece by piece: the answers for all values at once would be half as large as a bfloat16 tensor."""
    pieces = np.array_split(tensor, -(-tensor.nbytes // _PIECE_BYTES))
    return all(np.isfinite(piece).all() for piece in pieces)


def _ids(tokenizer: Tokenizer) -> dict[str, int]:
    return {f"{name}_token_id": id_ for name, id_ in tokenizer.special_ids.items()}


def _generation(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    ends = list(dict.fromkeys([tokenizer.eos_id, *config.decode.stop_ids]))
    return {**_ids(tokenizer), "eos_token_id": ends[0] if len(ends) == 1 else ends,
            DECODE_KEY: config_lib.to_dict(config.decode)}


def _write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
