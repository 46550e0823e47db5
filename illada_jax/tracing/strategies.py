"""Descriptions of decoding strategies, and of the differences between several."""

from collections.abc import Sequence
from typing import Any

from illada_jax.config import DecodeConfig, to_dict

# Settings that have an effect only with certain values of another one: (the other, those values).
NEEDS = {
    "threshold": ("reveal", ("threshold",)), "factor": ("reveal", ("factor",)),
    "entropy_bound": ("reveal", ("entropy_bound",)), "steps_per_block": ("reveal", ("schedule",)),
    "cache_refresh": ("cache", ("prefix", "dual", "append")),
}
# Settings that change the text or the order of writing it, the most informative first.
_DESCRIBED = ("confidence", "reveal", "threshold", "factor", "entropy_bound", "steps_per_block", "block_length",
              "length", "cache", "cache_refresh", "temperature", "top_k", "top_p", "cfg_scale")


_ORDERS = {"low_confidence": "the most probable tokens first", "margin": "the clearest choices first",
           "entropy": "the least uncertain positions first", "random": "in random order"}
_AMOUNTS = {"schedule": "{steps_per_block} steps for a block of {block_length} tokens",
            "threshold": "all above a probability of {threshold} at once",
            "factor": "as many at once as the factor {factor} allows",
            "entropy_bound": "as many at once as an entropy of {entropy_bound} nats allows"}


def describe(decode: DecodeConfig) -> str:
    """The order of writing in words, and other settings that differ from the defaults.

    >>> describe(DecodeConfig())
    'the most probable tokens first, 32 steps for a block of 32 tokens'
    >>> describe(DecodeConfig(confidence="random", reveal="threshold", temperature=0.5))
    'in random order, all above a probability of 0.9 at once (temperature=0.5)'
    """
    settings, defaults = to_dict(decode), to_dict(DecodeConfig())
    text = f"{_ORDERS[decode.confidence]}, {_AMOUNTS[decode.reveal].format(**settings)}"
    said = ("confidence", "reveal", "threshold", "factor", "entropy_bound", "steps_per_block", "block_length")
    others = {name: value for name, value in _effective(decode).items()
              if name in _DESCRIBED and name not in said and value != defaults[name]}
    return f"{text} ({_words(others)})" if others else text


def differences(strategies: Sequence[DecodeConfig]) -> list[str]:
    """For each strategy, its settings that differ between the strategies and have an effect.

    >>> differences([DecodeConfig(), DecodeConfig(confidence="random")])
    ['confidence=low_confidence', 'confidence=random']
    >>> differences([DecodeConfig(), DecodeConfig(reveal="threshold", threshold=0.6)])
    ['reveal=schedule, steps_per_block=32', 'reveal=threshold, threshold=0.6']
    """
    effective = [_effective(decode) for decode in strategies]
    return [_words({name: value for name, value in settings.items()
                    if any(name not in other or other[name] != value for other in effective)})
            for settings in effective]


def _effective(decode: DecodeConfig) -> dict[str, Any]:
    """The settings that have an effect, the most informative first."""
    settings = to_dict(decode)
    ordered = {name: settings[name] for name in _DESCRIBED} | settings
    return {name: value for name, value in ordered.items()
            if name not in NEEDS or settings[NEEDS[name][0]] in NEEDS[name][1]}


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())
