"""Import and export of Hugging Face checkpoints, and the one way to open or load a model.

Begin with `loading`: `open_model` reads everything but the params and `load_model` reads those too, from a workdir,
official weights, a Hub id or a demo alike. `families` has the names and layouts of LLaDA and iLLaDA, `layout` maps
params to tensors, `hf_model` opens a Hugging Face directory, `tensors` reads and writes safetensors, `importing` and
`exporting` stream them with little host memory, and `conversion` is the work of the `convert` command. No file runs
code when it is read, and no size in it is trusted.

May import training, whose checkpoints it reads, and all packages below it; only commands and `illada_jax.api` import
it.
"""

from illada_jax.interop.loading import load_model, open_model

__all__ = ["load_model", "open_model"]
