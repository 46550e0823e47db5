"""illada_jax: masked diffusion language models (iLLaDA, LLaDA) in JAX.

import illada_jax
lm = illada_jax.load("workdirs/quickstart")
print(lm.generate(["The with statement"], max_new_tokens=32)[0].text)
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["Generation", "LanguageModel", "load"]


def __getattr__(name: str) -> Any:
    """Loads the Python interface when it is first used: commands that need only a part start faster."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from illada_jax import api

    return getattr(api, name)
