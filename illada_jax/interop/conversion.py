"""Official weights to a workdir, a workdir to the official layout, either one to eight bits: what `convert` does."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Mapping

import jax.numpy as jnp
from etils import epath

from illada_jax.errors import InputError
from illada_jax.interop.checkpoint import read_checkpoint
from illada_jax.interop.exporting import export_model, whole_directory
from illada_jax.interop.families import FAMILIES
from illada_jax.interop.loading import find_checkpoint
from illada_jax.interop.tensors import DTYPES
from illada_jax.parallel.mesh import parse_mesh
from illada_jax.training.saved_model import Loaded, SavedModel, open_model, save_model

DEFAULT_SHARD_GIGABYTES = 5.0


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What is to be converted into what. Options that have no meaning for the source must be left as they are.

    Attributes:
      source: a workdir, one checkpoint in it, or a Hugging Face directory or Hub id.
      target: the directory to write.
      dtype: type of the weights written; None keeps it (float16 becomes float32 in a workdir).
      quantize: `none`, or `int8`: write a workdir with matrices of eight bits.
      mesh: devices that hold the weights meanwhile, see `parse_mesh`.
      shard_gigabytes: size of an exported file of weights.
      family: layout of an export; None: where the weights came from, else iLLaDA's.
      special_ids: ids by name that go before those in a Hugging Face directory.
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
        """Converts, and returns a line that says what was made. The target is there when it is whole, or not at all.

        Raises:
          InputError: the source is broken or not supported, an option does not fit it, or the target is not empty.
        """
        directory = find_checkpoint(self.source)
        exports = directory is None and self.quantize == "none"
        if not exports:
            self._refuse("shard_gigabytes", "family")
            if self.dtype == "float16":
                raise InputError("dtype = 'float16': a workdir holds float32 or bfloat16")
        if directory is not None:
            return self._to_workdir(directory)
        self._refuse("special_ids")
        saved = open_model(self.source)
        if saved.quantized:
            raise InputError(f"{saved.directory}: its weights have eight bits; convert what it was made of")
        return self._to_hugging_face(saved) if exports else self._to_int8(saved)

    def _to_workdir(self, directory: pathlib.Path) -> str:
        checkpoint = read_checkpoint(directory, self.special_ids)
        dtype = jnp.dtype(self.dtype or checkpoint.dtype.name)
        model = dataclasses.replace(checkpoint.config.model, dtype=dtype.name)
        config = dataclasses.replace(checkpoint.config, model=model)
        int8, family = self.quantize == "int8", checkpoint.family.model_type
        with self._writable() as place:
            params = checkpoint.restore(dtype, parse_mesh(self.mesh), int8)
            save_model(place, Loaded(config, params, checkpoint.tokenizer, checkpoint.step), int8, family)
        return f"{self.target}: workdir, {family}, {dtype.name}{', matrices int8' * int8}"

    def _to_int8(self, saved: SavedModel) -> str:
        dtype = jnp.dtype(self.dtype or saved.dtype)
        with self._writable() as place:
            params = saved.restore(dtype, parse_mesh(self.mesh), quantized=True)
            save_model(place, Loaded(saved.config, params, saved.tokenizer, saved.step), True, saved.family)
        return f"{self.target}: workdir, step {saved.step}, {dtype.name}, matrices int8"

    def _to_hugging_face(self, saved: SavedModel) -> str:
        self._refuse("mesh")
        family = FAMILIES[self.family or saved.family or "illada"]
        dtype = next(dtype for dtype in DTYPES.values() if dtype.name == (self.dtype or saved.dtype.name))
        shard_bytes = int((self.shard_gigabytes or DEFAULT_SHARD_GIGABYTES) * 1e9)
        export_model(saved, pathlib.Path(self.target), family, dtype, shard_bytes)
        return f"{self.target}: Hugging Face directory, {family.model_type}, step {saved.step}, {dtype.name}"

    def _writable(self) -> contextlib.AbstractContextManager[epath.PathLike]:
        """The directory to write a workdir into. A remote one is written in place: Orbax keeps its checkpoint whole."""
        if "://" not in self.target:
            return whole_directory(pathlib.Path(self.target))
        if epath.Path(self.target).exists():
            raise InputError(f"{self.target}: is there already; choose another target")
        return contextlib.nullcontext(self.target)

    def _refuse(self, *names: str) -> None:
        for name in names:
            if getattr(self, name):
                raise InputError(f"{name} = {getattr(self, name)!r}: has no meaning for this source, {self.source}")
