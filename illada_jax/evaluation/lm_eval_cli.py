"""The command line of lm-evaluation-harness with the model `illada_jax` registered (extra: eval).

    python -m illada_jax.evaluation.lm_eval_cli --model illada_jax --tasks arc_easy \\
        --model_args checkpoint=workdirs/sudoku

Versions of the harness after 0.4.13 find the model by its entry point: `lm_eval --model illada_jax …` works too.
`--model_args` takes `checkpoint`, `dtype`, `quantize` and every setting of `python -m illada_jax.evaluate --set=help`;
the harness's own `--batch_size` sets the rows per batch; `auto` takes them from `--model_args` or the checkpoint.
"""

import sys
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model

from illada_jax import api
from illada_jax.errors import InputError
from illada_jax.evaluation.lm_eval_model import LmEvalModel
from illada_jax.evaluation.settings import make_settings, parse_settings


@register_model("illada_jax")
class IlladaJax(LmEvalModel):
    """A model that the harness loads by its `--model_args`."""

    def __init__(self, checkpoint: str = "", batch_size: int | str | None = None, max_batch_size: Any = None,
                 device: str | None = None, **arguments: Any):
        """Loads the model; `arguments` are `dtype`, `quantize` and settings. Raises InputError for an invalid one."""
        del max_batch_size, device  # batch sizes are not searched; JAX chooses the device
        if not checkpoint:
            raise InputError("--model_args checkpoint=…: is required")
        if batch_size is not None and str(batch_size).partition(":")[0] == "auto":
            batch_size = None  # that of the settings, or else of the checkpoint
        if batch_size is not None and not str(batch_size).isdigit():
            raise InputError(f"--batch_size {batch_size}: must be a number or auto")
        of_load = {key: arguments.pop(key) for key in ("dtype", "quantize") if key in arguments}
        settings = make_settings(arguments if batch_size is None else {**arguments, "batch_size": int(batch_size)})
        super().__init__(api.load(checkpoint, **of_load), settings)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "IlladaJax":
        """The model of `key=value,key=value`, as the harness creates it."""
        return cls.create_from_arg_obj(parse_settings(arg_string), additional_config)


def main() -> None:
    """Runs the harness's command line; bad input is one line on stderr and exit code 2."""
    try:
        cli_evaluate()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
