"""illada_jax: masked diffusion language models (iLLaDA, LLaDA) in JAX.

>>> import illada_jax
>>> lm = illada_jax.load("demo")
>>> answer = lm.generate(["The with statement"], max_new_tokens=8)[0]
>>> answer.stopped_by in ("eos", "length"), answer.nfe <= 8
(True, True)

`demo` is a small model in the package; pass a workdir, a directory of official weights or a Hub id instead.
`illada_jax.api` is the Python interface. The commands are `illada_jax.main` (training), `illada_jax.generate`,
`illada_jax.evaluate`, `illada_jax.prepare`, `illada_jax.convert`, `illada_jax.aot` and `illada_jax.plot`.

## The packages

| package | from | to |
|---|---|---|
| `illada_jax.data` | text, conversations | batches of tokens |
| `illada_jax.model` | tokens | logits |
| `illada_jax.diffusion` | batches | masked batches and the loss |
| `illada_jax.parallel` | arrays | arrays sharded over chips |
| `illada_jax.training` | a config | checkpoints |
| `illada_jax.decoding` | a prompt | an answer |
| `illada_jax.scoring` | candidates | log-probabilities |
| `illada_jax.evaluation` | a model and tasks | results with all settings recorded |
| `illada_jax.interop` | official weights | a model, and back |
| `illada_jax.planning` | a config | memory and time on chips you do not have |
| `illada_jax.tracing` | an answer | a page or picture of how it was written |

Every package's page says where to start. `illada_jax.config` has all settings.

## Glossary

.. include:: glossary.md
"""

import sys
from typing import Any

from illada_jax.errors import exit_on_interrupt

__version__ = "0.2.0"
__all__ = ["Generation", "LanguageModel", "load"]

if sys.argv[:1] == ["-m"]:  # `python -m illada_jax.COMMAND`, which imports the package first
    exit_on_interrupt()


def __getattr__(name: str) -> Any:
    """Imports the Python interface on first use, so that commands that do not need it start faster."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from illada_jax import api

    return getattr(api, name)


def __dir__() -> list[str]:
    """All names, those not imported yet too, for `help` and completion."""
    return sorted({*globals(), *__all__})
