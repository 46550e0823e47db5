"""Descriptions of decoding strategies, and of the differences between several."""

from collections.abc import Sequence

from illada_jax.config import DecodeConfig, to_dict

# Settings that have an effect only with certain values of another one: (the other, those values).
NEEDS = {
    "threshold": ("reveal", ("threshold",)), "factor": ("reveal", ("factor",)),
    "entropy_bound": ("reveal", ("entropy_bound",)), "steps_per_block": ("reveal", ("schedule",)),
    "cache_refresh": ("cache", ("prefix", "dual")),
}
# Settings that change the text or the order of writing it, the most informative first.
_DESCRIBED = ("confidence", "reveal", "threshold", "factor", "entropy_bound", "steps_per_block", "block_length",
              "length", "cache", "cache_refresh", "temperature", "top_p", "cfg_scale")


def describe(decode: DecodeConfig) -> str:
    """The settings that decide the order of writing, and others that differ from the defaults.

    >>> describe(DecodeConfig())
    'confidence=low_confidence, reveal=schedule, steps_per_block=32'
    >>> describe(DecodeConfig(confidence="margin", reveal="threshold", temperature=0.5))
    'confidence=margin, reveal=threshold, threshold=0.9, temperature=0.5'
    """
    defaults = DecodeConfig()
    shown = [name for name in _DESCRIBED if _has_effect(decode, name)
             and (name in ("confidence", "reveal", *NEEDS) or getattr(decode, name) != getattr(defaults, name))]
    return _words(decode, shown)


def differences(strategies: Sequence[DecodeConfig]) -> list[str]:
    """For each strategy, its settings that differ between the strategies and have an effect.

    >>> differences([DecodeConfig(), DecodeConfig(confidence="random")])
    ['confidence=low_confidence', 'confidence=random']
    >>> differences([DecodeConfig(), DecodeConfig(reveal="threshold", threshold=0.6)])
    ['reveal=schedule, steps_per_block=32', 'reveal=threshold, threshold=0.6']
    """
    names = [*_DESCRIBED, *(name for name in to_dict(DecodeConfig()) if name not in _DESCRIBED)]

    def value(decode: DecodeConfig, name: str):
        return getattr(decode, name) if _has_effect(decode, name) else None

    differing = [name for name in names if len({value(decode, name) for decode in strategies}) > 1]
    return [_words(decode, [name for name in differing if _has_effect(decode, name)]) for decode in strategies]


def _has_effect(decode: DecodeConfig, name: str) -> bool:
    other, values = NEEDS.get(name, ("", ()))
    return not other or getattr(decode, other) in values


def _words(decode: DecodeConfig, names: Sequence[str]) -> str:
    return ", ".join(f"{name}={getattr(decode, name)}" for name in names)
