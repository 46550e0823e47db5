"""Settings of an evaluation: of the scorers, the sampler and the adapter to lm-evaluation-harness.

They are written `key=value,key=value` like lm-eval's `--model_args`; presets and the command line use the same keys.
"""

import ast
import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from illada_jax.config import DecodeConfig, override
from illada_jax.errors import ConfigError, InputError
from illada_jax.scoring.scorer import ScoreConfig

_SEPARATOR = re.compile(r",(?![^(\[]*[)\]])")  # a comma outside brackets


@dataclass(frozen=True)
class LmEvalConfig:
    """Settings of the adapter to lm-evaluation-harness.

    Attributes:
      over_length: treatment of a context or candidate that is too long: `truncate` (drop its beginning; the results
        count such contexts and candidates) or `error`.
      rolling_stride: new tokens per window of `loglikelihood_rolling`; 0 is half of the context. Each window also sees
        as many of the earlier tokens as fit.
      rolling_mc_num: Monte-Carlo draws per window.
      ignore_until: ignore the stop strings of tasks, which a thought may contain: only EOS and stop ids end an answer.
      think_end: string that ends a thought; the answer is the text after its last occurrence. Empty: all of the text.
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
    """All settings of an evaluation; `decode` holds fields of DecodeConfig that override the checkpoint's config."""

    score: ScoreConfig = dataclasses.field(default_factory=ScoreConfig)
    decode: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lm_eval: LmEvalConfig = dataclasses.field(default_factory=LmEvalConfig)


_SECTIONS = (ScoreConfig, DecodeConfig, LmEvalConfig)
_NAMES = [{field.name for field in dataclasses.fields(section)} for section in _SECTIONS]
KNOWN_SETTINGS = set.union(*_NAMES)


def make_settings(values: Mapping[str, Any]) -> Settings:
    """Settings from keys and values. A key that scorers and sampler share (cfg_scale, seed, batch_size) sets both.

    Raises:
      InputError: a key is unknown (the message suggests similar ones) or a value is invalid.
    """
    for key in values:
        if key not in KNOWN_SETTINGS:
            raise InputError(f"setting {key!r}: unknown{did_you_mean(key, KNOWN_SETTINGS)}")
    score, decode, lm_eval = ({key: value for key, value in values.items() if key in names} for names in _NAMES)
    # Finds errors before a model is loaded. As in `LanguageModel.generate`, steps_per_block follows block_length.
    steps = decode.get("block_length", DecodeConfig.steps_per_block)
    override(DecodeConfig(), "decode", {"steps_per_block": steps, **decode})
    return Settings(override(ScoreConfig(), "score", score), decode, override(LmEvalConfig(), "lm_eval", lm_eval))


def parse_settings(text: str) -> dict[str, Any]:
    """Keys and values of `key=value,key=value`, where a value is a Python literal or text; else an InputError."""
    values = {}
    for part in filter(None, map(str.strip, _SEPARATOR.split(text))):
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise InputError(f"settings: {part!r} is not key=value")
        values[key.strip()] = _literal(value.strip())
    return values


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


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message that suggests known names; empty if none is similar."""
    close = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(map(repr, close))}?" if close else ""
