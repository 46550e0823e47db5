"""Flags for the special ids of a Hugging Face directory, for every command that reads one: a command adopts them."""

from absl import flags

IDS = {name: flags.DEFINE_integer(f"{name}_id", None, f"id of {name.upper()} in a Hugging Face directory, before what "
                                  "its config and tokenizer say")
       for name in ("mask", "bos", "eos", "pad", "eot")}


def special_ids() -> dict[str, int]:
    """Those that were given, by name."""
    return {name: flag.value for name, flag in IDS.items() if flag.value is not None}
