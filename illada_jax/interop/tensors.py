"""Directories of safetensors files, read slice by slice and written tensor by tensor."""

import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from illada_jax.errors import InputError
from illada_jax.files import CONFIG_BYTES, read_json

INDEX = "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
PROGRESS = {"desc": "weights", "unit": "tensor", "delay": 1, "leave": False, "disable": None}  # for tqdm
_LISTED = 5  # names in an error message


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """The metadata of a tensor, of float32, float16 or bfloat16; `file` is None if it has not been written yet."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: pathlib.Path | None = None

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorDirectory:
    """The tensors of a directory: `model.safetensors`, or several files and their index."""

    def __init__(self, directory: pathlib.Path):
        """Reads the headers of all files; `tensors` is the metadata by name.

        Raises:
          InputError: a file is missing, truncated or not in the index, or a tensor is in two files, in none, or not a
            float of 16 or 32 bits; the message names it.
        """
        self._directory = directory
        self.tensors: dict[str, TensorInfo] = {}
        files = sorted(directory.glob("*.safetensors"))
        index = _read_index(directory, {file.name for file in files})
        if not files:
            pickled = sorted(directory.glob("*.bin"))
            reason = f", only {pickled[0].name}, a pickle; save the model as safetensors first" if pickled else ""
            raise InputError(f"{directory}: contains no safetensors{reason}")
        for file in files:
            self._add(file)
        found = {name: tensor.file.name for name, tensor in self.tensors.items()}
        for name in sorted(index.keys() | found.keys()) if index is not None else ():
            if found.get(name) != index.get(name):
                raise InputError(f"{directory}: the tensor {name} is in {found.get(name, 'no file')}; by {INDEX} it "
                                 f"must be in {index.get(name, 'no file')}")

    def _add(self, path: pathlib.Path) -> None:
        """Adds the metadata of the tensors of a file."""
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: must be a regular file")
        try:
            with safe_open(path, framework="np") as file:
                parts = {name: file.get_slice(name) for name in file.offset_keys()}
                described = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
        except OSError as error:  # a dangling link, for example
            raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
        except SafetensorError as error:
            with open(path, "rb") as stream:
                pointer = stream.read(12) == b"version http"
            reason = "a git-lfs pointer, not the file itself" if pointer else f"truncated or corrupt ({error})"
            raise InputError(f"{path}: {reason}; download it again") from error
        for name, (shape, dtype) in described.items():
            if name in self.tensors:
                raise InputError(f"{self._directory}: the tensor {name} is in two files, "
                                 f"{self.tensors[name].file.name} and {path.name}")
            if dtype not in DTYPES:
                raise InputError(f"{path}: the tensor {name} has the dtype {dtype}; must be one of {', '.join(DTYPES)}")
            self.tensors[name] = TensorInfo(shape, DTYPES[dtype], path)

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raises InputError if the tensors are not exactly these, in these shapes; names the difference."""
        for problem, names in (("missing", expected.keys() - self.tensors.keys()),
                               ("unknown", self.tensors.keys() - expected.keys())):
            if names:
                some = ", ".join(sorted(names)[:_LISTED]) + (", …" if len(names) > _LISTED else "")
                raise InputError(f"{self._directory}: {len(names)} {problem} tensor{'s' * (len(names) > 1)}: {some}")
        for name, tensor in self.tensors.items():
            if tensor.shape != expected[name]:
                raise InputError(f"{tensor.file}: the tensor {name} has the shape {list(tensor.shape)}; by config.json "
                                 f"it must be {list(expected[name])}")

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a slice of a tensor, and nothing else, from disk."""
        # Reopened for each slice: pages that were read count as memory of the process as long as the file is mapped.
        with safe_open(self.tensors[name].file, framework="np") as file:
            return file.get_slice(name)[index]


def _read_index(directory: pathlib.Path, files: set[str]) -> dict[str, str] | None:
    """The file, one of `files`, of each tensor; None if there is no index."""
    path = directory / INDEX
    if not path.exists():
        return None
    try:
        index = read_json(path, CONFIG_BYTES)["weight_map"]
        missing = set(index.values()) - files
    except (ValueError, KeyError, TypeError, AttributeError) as error:
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
