"""Directories of safetensors files, read slice by slice and written tensor by tensor."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from illada_jax.errors import InputError

INDEX = "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_LISTED = 5  # names in an error message


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """The metadata of a tensor.

    Attributes:
      file: the file that holds it; None if it has not been written yet.
      shape: its shape.
      dtype: float32, float16 or bfloat16.
    """

    file: pathlib.Path | None
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class TensorDirectory:
    """The tensors of a directory: `model.safetensors`, or several files and their index.

    Attributes:
      tensors: their metadata, by name.
    """

    def __init__(self, directory: pathlib.Path):
        """Reads the headers of all files.

        Raises:
          InputError: a file is missing, truncated or not in the index, or a tensor is in two files, in none, or not a
            float of 16 or 32 bits; the message names it.
        """
        self._directory = directory
        self.tensors: dict[str, TensorInfo] = {}
        index = _read_index(directory)
        for file in _files(directory, index):
            for name, tensor in _read_header(file):
                if name in self.tensors:
                    raise InputError(f"{directory}: the tensor {name} is in two files, {self.tensors[name].file.name} "
                                     f"and {file.name}")
                self.tensors[name] = tensor
        if index is None:
            return
        for name in index.keys() - self.tensors.keys():
            raise InputError(f"{directory / index[name]}: the tensor {name}, which {INDEX} expects there, is missing")
        for name, tensor in self.tensors.items():
            if index.get(name) != tensor.file.name:
                raise InputError(f"{tensor.file}: holds the tensor {name}, which {INDEX} does not expect there")

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raises InputError if the tensors are not exactly these, in these shapes; names the difference."""
        for problem, names in (("missing", expected.keys() - self.tensors.keys()),
                               ("unknown", self.tensors.keys() - expected.keys())):
            if names:
                some = ", ".join(sorted(names)[:_LISTED]) + (", …" if len(names) > _LISTED else "")
                raise InputError(f"{self._directory}: {len(names)} {problem} tensor{'s' * (len(names) > 1)}: {some}")
        for name, shape in expected.items():
            if self.tensors[name].shape != shape:
                raise InputError(f"{self.tensors[name].file}: the tensor {name} has the shape "
                                 f"{list(self.tensors[name].shape)}; by config.json it must be {list(shape)}")

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a slice of a tensor, and nothing else, from disk."""
        # Reopened for each slice: the pages of a file that stays mapped count as memory of the process once read.
        with safe_open(self.tensors[name].file, framework="np") as file:
            return file.get_slice(name)[index]


def _read_index(directory: pathlib.Path) -> dict[str, str] | None:
    path = directory / INDEX
    if not path.exists():
        return None
    try:
        index = json.loads(path.read_bytes())["weight_map"]
        files = set(index.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: must be JSON with a weight_map from tensors to files") from error
    for file in files:
        if not isinstance(file, str) or pathlib.PurePath(file).name != file:
            raise InputError(f"{path}: {file!r} is not the name of a file beside it")
    return index


def _files(directory: pathlib.Path, index: dict[str, str] | None) -> list[pathlib.Path]:
    found = sorted(directory.glob("*.safetensors"))
    if index is None:
        if found:
            return found
        pickled = sorted(directory.glob("*.bin"))
        reason = f", only {pickled[0].name}, a pickle; save the model as safetensors first" if pickled else ""
        raise InputError(f"{directory}: contains no safetensors{reason}")
    named = sorted(directory / file for file in set(index.values()))
    for file in named:
        if file not in found:
            raise InputError(f"{file}: missing; {INDEX} names it")
    for file in found:
        if file not in named:
            raise InputError(f"{file}: {INDEX} does not name it; remove one of the two")
    return named


def _read_header(path: pathlib.Path) -> Iterator[tuple[str, TensorInfo]]:
    try:
        with safe_open(path, framework="np") as file:
            parts = [(name, file.get_slice(name)) for name in file.offset_keys()]
            described = [(name, part.get_dtype(), tuple(part.get_shape())) for name, part in parts]
    except OSError as error:  # a dangling link, for example
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        with open(path, "rb") as file:
            pointer = file.read(12) == b"version http"
        reason = "a git-lfs pointer, not the file itself" if pointer else f"truncated or corrupt ({error})"
        raise InputError(f"{path}: {reason}; download it again") from error
    for name, dtype, shape in described:
        if dtype not in DTYPES:
            raise InputError(f"{path}: the tensor {name} has the dtype {dtype}; must be one of {', '.join(DTYPES)}")
        yield name, TensorInfo(path, shape, DTYPES[dtype])


def write_tensors(directory: pathlib.Path, tensors: dict[str, TensorInfo], values: Iterable[tuple[str, np.ndarray]],
                  shard_bytes: int, progress: Callable[[int], Any]) -> None:
    """Writes tensors one after another into files of about `shard_bytes`, and an index if there are several files.

    The `safetensors` package needs all tensors of a file in memory; this holds one at a time.

    Args:
      directory: an existing directory.
      tensors: their metadata, in the order of writing.
      values: (name, array) in the same order.
      shard_bytes: maximum size of a file, unless a single tensor is larger.
      progress: called with the size in bytes of each tensor after it is written.
    """
    shards: list[dict[str, TensorInfo]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(other.nbytes for other in shards[-1].values()) + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    weight_map, values = {}, iter(values)
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        with open(directory / file, "wb") as stream:
            stream.write(_header(shard))
            for expected, tensor in shard.items():
                name, array = next(values)
                if (name, array.shape, array.dtype) != (expected, tensor.shape, tensor.dtype):
                    raise ValueError(f"{expected} {tensor} was expected, not {name} {array.dtype}{array.shape}")
                stream.write(np.ascontiguousarray(array).view(np.uint8).data)
                weight_map[name] = file
                progress(tensor.nbytes)
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
