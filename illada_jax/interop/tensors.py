"""Directories of safetensors files, read slice by slice and written tensor by tensor."""

import dataclasses
import difflib
import itertools
import json
import math
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np
from absl import logging
from safetensors import SafetensorError, safe_open

from illada_jax.errors import InputError
from illada_jax.files import CONFIG_BYTES, read_json

INDEX = "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
PROGRESS = {"desc": "weights", "unit": "tensor", "delay": 1, "leave": False, "disable": None}  # for tqdm
_LISTED = 5  # names in an error message
_COMPARED = 1000  # names to find the nearest of
# No model of a known family has as many tensors, or as long a list of them: LLaDA 8B has 291.
_MAX_TENSORS = 100_000
_MAX_LIST_BYTES = 1 << 24
_COMPARED_BYTES = 1 << 26  # of two tensors at a time, in float32
_NUMBERED = re.compile(r"-\d+-of-\d+\.safetensors$")
# Names of PyTorch's wrappers of modules (DataParallel, compile, FSDP, PEFT), which trainers leave in tensor names.
_WRAPPERS = re.compile(r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|"
                       r"base_model\.model)\.")
_BUFFERS = re.compile(r"(?:^|\.)rotary_emb\.\w+$")  # follow from config.json; old versions of transformers saved them


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """The metadata of a tensor, of float32, float16 or bfloat16; `file` is None if it has not been written yet."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: pathlib.Path | None = None
    name: str = ""  # in the file

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorDirectory:
    """The tensors of a model in a directory, under names without those of wrappers; rotary buffers are left out."""

    def __init__(self, directory: pathlib.Path):
        """Reads the headers of the files of the model; `tensors` is the metadata by name.

        These are the files that the index names; without an index `model.safetensors`, else the numbered files, else
        all. A warning names the files that are not read.

        Raises:
          InputError: a file is missing or truncated, a tensor is in two files, in none, or not a float of 16 or 32
            bits, or a list of tensors is too long; the message names it.
        """
        self._directory = directory
        self.tensors: dict[str, TensorInfo] = {}
        files = sorted(directory.glob("*.safetensors"))
        index = _read_index(directory, {file.name for file in files})
        if not files:
            pickled = sorted(directory.glob("*.bin"))
            reason = f", only {pickled[0].name}, a pickle; save the model as safetensors first" if pickled else ""
            raise InputError(f"{directory}: contains no safetensors{reason}")
        chosen = _files_of_model(files, index)
        others = ", ".join(file.name for file in files if file not in chosen)
        if others:
            logging.warning("%s: not read, because they do not belong to the model: %s", directory, others)
        for file in chosen:
            self._add(file)
        found = {name: tensor.file.name for name, tensor in self.tensors.items()}
        index = {_plain_name(name): file for name, file in (index or {}).items() if not _BUFFERS.search(name)}
        for name in sorted(index.keys() | found.keys()) if index else ():
            if found.get(name) != index.get(name):
                raise InputError(f"{directory}: the tensor {name} is in {found.get(name, 'no file')}; by {INDEX} it "
                                 f"must be in {index.get(name, 'no file')}")

    def _add(self, path: pathlib.Path) -> None:
        """Adds the metadata of the tensors of a file."""
        if not path.is_file():  # a dangling link or a FIFO, for example
            raise InputError(f"{path}: cannot be read: no such file, or not a regular one")
        try:
            with open(path, "rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
            if _MAX_LIST_BYTES < size < path.stat().st_size:
                raise InputError(f"{path}: its header has {size:,} bytes; at most {_MAX_LIST_BYTES:,} are allowed")
            with safe_open(path, framework="np") as file:
                names = file.offset_keys()
                if len(names) > _MAX_TENSORS:
                    raise InputError(f"{path}: holds {len(names):,} tensors; at most {_MAX_TENSORS:,} are allowed")
                parts = {name: file.get_slice(name) for name in names if not _BUFFERS.search(name)}
                described = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
        except SafetensorError as error:
            with open(path, "rb") as stream:
                pointer = stream.read(12) == b"version http"
            reason = "a git-lfs pointer, not the file itself" if pointer else f"truncated or corrupt ({error})"
            raise InputError(f"{path}: {reason}; download it again") from error
        for found_name, (shape, dtype) in described.items():
            name = _plain_name(found_name)
            other = self.tensors.get(name)
            if other and other.file == path:
                raise InputError(f"{path}: the tensor {name} is there twice, as {other.name} and {found_name}")
            if other:
                raise InputError(f"{self._directory}: the tensor {name} is in two files, {other.file.name} and "
                                 f"{path.name}")
            if dtype not in DTYPES:
                raise InputError(f"{path}: the tensor {name} has the dtype {dtype}; must be one of {', '.join(DTYPES)}")
            self.tensors[name] = TensorInfo(shape, DTYPES[dtype], path, found_name)

    def tie(self, name: str, copy: str) -> None:
        """Leaves one of two tied tensors, under `name`. Raises InputError if both are there and differ."""
        if copy in self.tensors and name in self.tensors and not self._equal(name, copy):
            raise InputError(f"{self.tensors[copy].file}: the tensor {copy} differs from {name}, to which config.json "
                             "ties it; remove it, or change config.json")
        if copy in self.tensors:
            tensor = self.tensors.pop(copy)
            self.tensors.setdefault(name, tensor)

    def _equal(self, name: str, other: str) -> bool:
        shape = self.tensors[name].shape
        if len(shape) != 2 or shape != self.tensors[other].shape:
            return False
        rows = max(1, _COMPARED_BYTES // max(1, 4 * shape[1]))
        parts = ((slice(start, min(start + rows, shape[0])),) for start in range(0, shape[0], rows))
        return all(np.array_equal(*(self.read(each, part).astype(np.float32) for each in (name, other)), equal_nan=True)
                   for part in parts)

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raises InputError if the tensors are not exactly these, in these shapes; names the difference."""
        missing, unknown = sorted(expected.keys() - self.tensors.keys()), sorted(self.tensors.keys() - expected.keys())
        for problem, names in (("missing", missing), ("unknown", unknown)):
            if names:
                some = ", ".join(names[:_LISTED]) + (", …" if len(names) > _LISTED else "")
                hint = self._nearest(names[0], unknown) if names is missing else ""
                raise InputError(f"{self._directory}: {len(names)} {problem} tensor{'s' * (len(names) > 1)}: {some}"
                                 f"{hint}")
        for name, tensor in self.tensors.items():
            if tensor.shape != expected[name]:
                raise InputError(f"{tensor.file}: the tensor {name} has the shape {list(tensor.shape)}; by config.json "
                                 f"it must be {list(expected[name])}")

    def _nearest(self, missing: str, unknown: list[str]) -> str:
        nearest = difflib.get_close_matches(missing, (unknown or list(self.tensors))[:_COMPARED], n=1, cutoff=0.0)
        return f"; the nearest found to {missing} is {self.tensors[nearest[0]].name}" if nearest else ""

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a slice of a tensor, and nothing else, from disk."""
        # Reopened for each slice: pages that were read count as memory of the process as long as the file is mapped.
        with safe_open(self.tensors[name].file, framework="np") as file:
            return file.get_slice(self.tensors[name].name)[index]


def _plain_name(name: str) -> str:
    """The name of a tensor without those of wrappers."""
    return _WRAPPERS.sub("", name)


def _files_of_model(files: list[pathlib.Path], index: dict[str, str] | None) -> list[pathlib.Path]:
    """Those of the safetensors files of a directory that hold the model."""
    if index is not None:
        single = next((file for file in files if file.name == "model.safetensors"), None)
        if single and single.name not in index.values():
            raise InputError(f"{single.parent}: holds two models, {single.name} and the files of {INDEX}; remove one")
        return [file for file in files if file.name in index.values()]
    single = [file for file in files if file.name == "model.safetensors"]
    return single or [file for file in files if _NUMBERED.search(file.name)] or files


def _read_index(directory: pathlib.Path, files: set[str]) -> dict[str, str] | None:
    """The file, one of `files`, of each tensor; None if there is no index."""
    path = directory / INDEX
    if not path.exists():
        return None
    try:
        index = read_json(path, CONFIG_BYTES)["weight_map"]
        if len(index) > _MAX_TENSORS:
            raise InputError(f"{path}: its weight_map names {len(index):,} tensors; at most {_MAX_TENSORS:,} are "
                             "allowed")
        missing = set(index.values()) - files
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: must be JSON with a weight_map from tensors to files") from error
    if missing:
        raise InputError(f"{path}: names {min(missing, key=str)!r}, which is not a file beside it")
    return index


def write_tensors(directory: pathlib.Path, tensors: dict[str, TensorInfo], arrays: Iterable[np.ndarray],
                  shard_bytes: int) -> None:
    """Writes tensors, and `arrays` as their values, into files of at most `shard_bytes`, and an index if necessary.

    A larger tensor has its own file. The `safetensors` package needs all tensors of a file in memory; this
    holds one at a time.
    """
    shards: list[dict[str, TensorInfo]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(other.nbytes for other in shards[-1].values()) + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    weight_map: dict[str, str] = {}
    arrays = iter(arrays)
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        with open(directory / file, "wb") as stream:
            stream.write(_header(shard))
            for array in itertools.islice(arrays, len(shard)):
                stream.write(np.ascontiguousarray(array).view(np.uint8).data)
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _header(shard: dict[str, TensorInfo]) -> bytes:
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in shard.items():
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content
