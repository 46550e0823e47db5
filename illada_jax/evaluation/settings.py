"""Settings of an evaluation: those of the scorers, those of the sampler, and how they meet the harness.

They are written `key=value,key=value`, as lm-eval's `--model_args`; presets and the command line use the same keys.
"""

import ast
import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from illada_jax.config import DecodeConfig, override
from illada_jax.errors import ConfigError, InputError
from illada_jax.scoring.scorer import ScoreConfig


@dataclass(frozen=True)
class LmEvalConfig:
    """How a model meets the harness.

    Attributes:
      over_length: what happens to a context that does not fit before its candidate or answer: `truncate` (its beginning
        is dropped, and counted in the results) or `error`.
      rolling_stride: new tokens of a window of `loglikelihood_rolling`; 0 takes half of the context. As many tokens
        before them as fit are visible.
      rolling_mc_num: draws for each window.
      ignore_until: stop strings of tasks are ignored: only EOS and stop ids end an answer (a thought may hold them).
      think_end: where an answer begins: text up to the last of these is dropped; empty keeps all.
    """

    over_length: Literal["truncate", "error"] = "truncate"
    rolling_stride: int = 0
    rolling_mc_num: int = 128
    ignore_until: bool = False
    think_end: str = ""

    def __post_init__(self):
        for name, least in (("rolling_stride", 0), ("rolling_mc_num", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"setting {name} = {getattr(self, name)}: must be {least} or more")


@dataclass(frozen=True)
class Settings:
    """All knobs of an evaluation.

    Attributes:
      score: the scorers.
      decode: fields of DecodeConfig that differ from the checkpoint's own.
      lm_eval: the rest.
    """

    score: ScoreConfig = dataclasses.field(default_factory=ScoreConfig)
    decode: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lm_eval: LmEvalConfig = dataclasses.field(default_factory=LmEvalConfig)


def _names(section: type) -> set[str]:
    return {field.name for field in dataclasses.fields(section)}


def make_settings(values: Mapping[str, Any]) -> Settings:
    """The settings that keys name. A key that scorers and sampler share (cfg_scale, seed, batch_size) sets both.

    Raises:
      InputError: an unknown key (with those that are near) or a wrong value.
    """
    known = _names(ScoreConfig) | _names(DecodeConfig) | _names(LmEvalConfig)
    for key in values:
        if key not in known:
            raise InputError(f"setting {key!r}: unknown{near(key, known)}")
    parts = [{key: value for key, value in values.items() if key in _names(section)}
             for section in (ScoreConfig, DecodeConfig, LmEvalConfig)]
    override(DecodeConfig(), "decode", {**_follow_block(parts[1])})  # to find mistakes before a model is loaded
    return Settings(override(ScoreConfig(), "score", parts[0]), parts[1],
                    override(LmEvalConfig(), "lm_eval", parts[2]))


def _follow_block(decode: dict[str, Any]) -> dict[str, Any]:
    """With another block length alone, steps follow it, as in `LanguageModel.generate`."""
    lenient = {"end_of_thinking_ids": (0,)} if decode.get("end_of_thinking_boost") else {}
    if "block_length" in decode:
        return {"steps_per_block": decode["block_length"], **lenient, **decode}
    return {**lenient, **decode}


def parse_settings(text: str) -> dict[str, Any]:
    """Keys and values of `key=value,key=value`; values are Python literals, or text.

    Raises:
      InputError: something is no key=value.
    """
    values = {}
    for part in filter(None, (part.strip() for part in _split(text))):
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise InputError(f"settings: {part!r} is not key=value")
        values[key.strip()] = _literal(value.strip())
    return values


def _split(text: str) -> list[str]:
    """Cuts at commas outside of brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _literal(value: str) -> Any:
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        parsed = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
    return tuple(parsed) if isinstance(parsed, list) else parsed


def format_settings(values: Mapping[str, Any]) -> str:
    """The inverse of `parse_settings`."""
    return ",".join(f"{key}={value}" for key, value in values.items())


def near(name: str, known: Iterable[str]) -> str:
    """The end of a message that says which known names are near an unknown one."""
    close = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(map(repr, close))}?" if close else ""
