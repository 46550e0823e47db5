"""Hugging Face checkpoints in and out, and the one way to open or load a model.

Begin with `loading.load_model`, behind which a workdir, official weights and a Hub id look the same. `families` has the
names and layouts of LLaDA and iLLaDA, `importing` and `exporting` stream safetensors with little host memory,
`conversion` is what the command does. No file of a stranger runs code, and no size in one is believed.

May import the foundation and training, whose checkpoints it reads; only commands and `illada_jax.api` import it.
"""

from illada_jax.interop.loading import load_model, open_source

__all__ = ["load_model", "open_source"]
