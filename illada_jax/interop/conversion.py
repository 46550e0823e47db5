"""Conversions: official weights to a workdir, a workdir to the official layout, either one to int8."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Mapping

import jax.numpy as jnp
from etils import epath

from illada_jax.errors import InputError
from illada_jax.interop.exporting import export_model, target_directory
from illada_jax.interop.families import FAMILIES
from illada_jax.interop.hf_model import HFModel
from illada_jax.interop.loading import open_model
from illada_jax.parallel.mesh import parse_mesh
from illada_jax.training.saved_model import LoadedModel, SavedModel, save_model

DEFAULT_SHARD_GIGABYTES = 5.0


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A conversion; for its fields see the flags of the `convert` command.

    Options that do not apply to the source must keep their defaults.
    """

    source: str
    target: str
    dtype: str | None = None
    quantize: str = "none"
    mesh: str = ""
    shard_gigabytes: float | None = None
    family: str | None = None
    special_ids: Mapping[str, int] = dataclasses.field(default_factory=dict)
    chat_template: str = ""

    def run(self) -> str:
        """Converts and returns a line that describes the result. The target appears whole or not at all.

        Raises InputError if the source is not supported, an option does not apply to it, or the target is not empty.
        """
        source = open_model(self.source, self.special_ids)
        if self.chat_template:
            source.tokenizer.choose_chat_template(self.chat_template)
        if source.quantized:
            raise InputError(f"{self.source}: its weights are int8; convert the model they were quantised from")
        config = source.config
        if isinstance(source, HFModel):
            family, dtype = source.family.model_type, self.dtype or config.model.dtype
            config, origin = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype)), family
        else:
            family, dtype, origin = source.family, self.dtype or source.dtype.name, f"step {source.step}"
            if self.quantize == "none":
                return self._export(source, dtype)
        self._refuse("shard_gigabytes", "family")
        if dtype == "float16":
            raise InputError("dtype = 'float16': a workdir holds float32 or bfloat16")
        int8 = self.quantize == "int8"
        with self._target_directory() as directory:
            params = source.restore(jnp.dtype(dtype), parse_mesh(self.mesh), int8)
            save_model(directory, LoadedModel(config, params, source.tokenizer, source.step), int8, family)
        return f"{self.target}: workdir, {origin}, {dtype}{', matrices int8' * int8}"

    def _export(self, saved: SavedModel, dtype: str) -> str:
        self._refuse("mesh")
        family = FAMILIES[self.family or saved.family or "illada"]
        shard_bytes = int((self.shard_gigabytes or DEFAULT_SHARD_GIGABYTES) * 1e9)
        export_model(saved, pathlib.Path(self.target), family, jnp.dtype(dtype), shard_bytes)
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
