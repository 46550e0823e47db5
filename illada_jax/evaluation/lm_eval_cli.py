"""lm-evaluation-harness with this model registered as `illada_jax` (extra: eval).

    python -m illada_jax.evaluation.lm_eval_cli --model illada_jax --model_args checkpoint=workdirs/sudoku --tasks arc_easy

It is the harness's own command line. Versions of the harness after 0.4.13 find the model by its entry point, so that
`lm_eval --model illada_jax …` works too. `--model_args` takes `checkpoint`, `dtype`, `quantize` and every setting of
`python -m illada_jax.evaluate --set=help`; of the harness's own arguments `--batch_size` sets rows at a time.
"""

import sys
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model

from illada_jax import api
from illada_jax.errors import InputError
from illada_jax.evaluation.lm_eval_model import LmEvalModel
from illada_jax.evaluation.settings import make_settings, parse_settings

_MODEL = ("dtype", "quantize")


@register_model("illada_jax")
class IlladaJax(LmEvalModel):
    """A model that the harness loads by its arguments."""

    def __init__(self, checkpoint: str = "", batch_size: int | str | None = None, max_batch_size: Any = None,
                 device: str | None = None, **arguments: Any):
        """Loads the model.

        Args:
          checkpoint: what `illada_jax.load` takes.
          batch_size: rows at a time.
          max_batch_size: without effect; nothing is found out by trying.
          device: without effect; JAX has its own choice.
          **arguments: dtype, quantize, and settings.

        Raises:
          InputError: an argument is unknown or wrong.
        """
        del max_batch_size, device
        if not checkpoint:
            raise InputError("--model_args checkpoint=…: is required")
        if batch_size is not None and not str(batch_size).isdigit():
            raise InputError(f"--batch_size {batch_size}: must be a number")
        values = {key: value for key, value in arguments.items() if key not in _MODEL}
        values |= {} if batch_size is None else {"batch_size": int(batch_size)}
        settings = make_settings(values)
        lm = api.load(checkpoint, **{key: arguments[key] for key in _MODEL if key in arguments})
        super().__init__(lm, settings)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "IlladaJax":
        """The harness's way to make a model from `key=value,key=value`."""
        return cls.create_from_arg_obj(parse_settings(arg_string), additional_config)


def main() -> None:
    """The harness's command line."""
    try:
        cli_evaluate()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
