"""Conversions: official weights to a workdir, a workdir to the official layout, either one to eight bits."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Mapping

import jax.numpy as jnp
from etils import epath

from illada_jax.config import Config
from illada_jax.errors import InputError
from illada_jax.interop.exporting import export_model, target_directory
from illada_jax.interop.families import FAMILIES
from illada_jax.interop.hf_model import open_hf_model
from illada_jax.interop.loading import find_hf_directory
from illada_jax.interop.tensors import DTYPES
from illada_jax.parallel.mesh import parse_mesh
from illada_jax.training.saved_model import LazyModel, LoadedModel, SavedModel, open_saved_model, save_model

DEFAULT_SHARD_GIGABYTES = 5.0


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A conversion. Options that do not apply to the source must keep their defaults.

    Attributes:
      source: a workdir, one checkpoint in it, or a Hugging Face directory or Hub id.
      target: the directory to write.
      dtype: dtype of the weights written; None keeps it (float16 becomes float32 in a workdir).
      quantize: `none`, or `int8` to write a workdir with int8 matrices.
      mesh: devices that hold the weights during the conversion, see `parse_mesh`.
      shard_gigabytes: size of an exported file of weights; None is DEFAULT_SHARD_GIGABYTES.
      family: layout of an export; None uses the one the weights came from, else iLLaDA's.
      special_ids: ids by name that override those of a Hugging Face directory.
    """

    source: str
    target: str
    dtype: str | None = None
    quantize: str = "none"
    mesh: str = ""
    shard_gigabytes: float | None = None
    family: str | None = None
    special_ids: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def run(self) -> str:
        """Converts and returns a line that describes the result. The target appears whole or not at all.

        Raises:
          InputError: the source is broken or not supported, an option does not apply to it, or the target is not
            empty.
        """
        directory = find_hf_directory(self.source)
        exports = directory is None and self.quantize == "none"
        if not exports:
            self._refuse("shard_gigabytes", "family")
            if self.dtype == "float16":
                raise InputError("dtype = 'float16': a workdir holds float32 or bfloat16")
        if directory is not None:
            model = open_hf_model(directory, self.special_ids)
            dtype = self.dtype or model.dtype.name
            config = dataclasses.replace(model.config, model=dataclasses.replace(model.config.model, dtype=dtype))
            family = model.family.model_type
            self._write_workdir(model, config, dtype, family)
            return f"{self.target}: workdir, {family}, {dtype}{', matrices int8' * (self.quantize == 'int8')}"
        self._refuse("special_ids")
        saved = open_saved_model(self.source)
        if saved.quantized:
            raise InputError(f"{saved.directory}: its weights have eight bits; convert the model they were made from")
        dtype = self.dtype or saved.dtype.name
        if exports:
            return self._export(saved, dtype)
        self._write_workdir(saved, saved.config, dtype, saved.family)
        return f"{self.target}: workdir, step {saved.step}, {dtype}, matrices int8"

    def _write_workdir(self, source: LazyModel, config: Config, dtype: str, family: str) -> None:
        int8 = self.quantize == "int8"
        with self._target_directory() as directory:
            params = source.restore(jnp.dtype(dtype), parse_mesh(self.mesh), int8)
            save_model(directory, LoadedModel(config, params, source.tokenizer, source.step), int8, family)

    def _export(self, saved: SavedModel, dtype: str) -> str:
        self._refuse("mesh")
        family = FAMILIES[self.family or saved.family or "illada"]
        tensor_dtype = next(each for each in DTYPES.values() if each.name == dtype)
        shard_bytes = int((self.shard_gigabytes or DEFAULT_SHARD_GIGABYTES) * 1e9)
        export_model(saved, pathlib.Path(self.target), family, tensor_dtype, shard_bytes)
        return f"{self.target}: Hugging Face directory, {family.model_type}, step {saved.step}, {dtype}"

    def _target_directory(self) -> contextlib.AbstractContextManager[epath.PathLike]:
        """The directory to write a workdir into. A remote one is written in place: Orbax commits its checkpoint."""
        if "://" not in self.target:
            return target_directory(pathlib.Path(self.target))
        if epath.Path(self.target).exists():
            raise InputError(f"{self.target}: already exists; choose another target")
        return contextlib.nullcontext(self.target)

    def _refuse(self, *names: str) -> None:
        for name in names:
            if getattr(self, name):
                raise InputError(f"{name} = {getattr(self, name)!r}: does not apply to this source, {self.source}")
