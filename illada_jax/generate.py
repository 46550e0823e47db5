"""Continues prompts, or fills gaps in them, with a trained model.

  python -m illada_jax.generate --checkpoint=workdirs/quickstart --prompt="The with statement" --max_new_tokens=32
  python -m illada_jax.generate --checkpoint=workdirs/quickstart --infill --prompt="A list is [[mask:6]] sequence."

Settings that are not given are those of the checkpoint's config. Several `--prompt` are decoded together.
`--output=json` prints one line per prompt, with its text, tokens, network evaluations (nfe) and seconds.
"""

import json
import time

from absl import flags

from illada_jax import api, cli
from illada_jax.errors import InputError

SETTINGS = [
    flags.DEFINE_integer("max_new_tokens", None, "budget of new tokens"),
    flags.DEFINE_integer("block_length", None, "tokens of a block"),
    flags.DEFINE_integer("steps_per_block", None, "steps that a block takes; block_length writes one token per step"),
    flags.DEFINE_float("temperature", None, "of the sampling; 0 is greedy"),
    flags.DEFINE_string("reveal", None, "how many positions a step reveals"),
    flags.DEFINE_string("confidence", None, "the order in which positions are revealed"),
    flags.DEFINE_integer("batch_size", None, "prompts that are decoded at the same time"),
    flags.DEFINE_integer("seed", None, "seed of the sampling"),
]
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "a workdir, or one checkpoint in it", required=True)
PROMPT = flags.DEFINE_multi_string("prompt", [], "text to continue; with --infill, text with gaps [[mask:N]]")
INFILL = flags.DEFINE_bool("infill", False, "fill the gaps of the prompts")
STOP = flags.DEFINE_multi_string("stop", [], "a string that ends the answer")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "type of params and compute")
OUTPUT = flags.DEFINE_enum("output", "text", ["text", "json"], "what is printed")


def main(argv: list[str]) -> None:
    """Loads the model, decodes all prompts, prints the results in the order of the prompts."""
    del argv
    if not PROMPT.value:
        raise InputError("--prompt: give at least one")
    lm = api.load(CHECKPOINT.value, DTYPE.value)
    settings = {flag.name: flag.value for flag in SETTINGS if flag.value is not None}
    start = time.monotonic()
    results, seconds = {}, {}
    for index, result in lm.as_completed(PROMPT.value, infill=INFILL.value, stop=STOP.value, **settings):
        results[index], seconds[index] = result, time.monotonic() - start
    for index, prompt in enumerate(PROMPT.value):
        print(format_result(prompt, results[index], seconds[index]))


def format_result(prompt: str, result: api.Generation, seconds: float) -> str:
    """The text, or a JSON line."""
    if OUTPUT.value == "text":
        return result.text
    record = {"prompt": prompt, "text": result.text, "tokens": result.tokens, "nfe": result.nfe,
              "stopped_by": result.stopped_by, "seconds": round(seconds, 3)}
    return json.dumps(record, ensure_ascii=False)


if __name__ == "__main__":
    cli.run(main)
