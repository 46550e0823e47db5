"""Metrics that compare a decoded answer with the reference: functions (prompt, answer, reference) → [0, 1]."""

import math
import pkgutil
import re
from collections.abc import Callable

from illada_jax.errors import ConfigError

AnswerMetric = Callable[[str, str, str], float]
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def make_answer_metric(name: str) -> AnswerMetric:
    """The metric `exact` or `numeric`, or the function that `package.module:function` names, else a ConfigError."""
    if name in ANSWER_METRICS:
        return ANSWER_METRICS[name]
    allowed = f"must be one of {', '.join(map(repr, ANSWER_METRICS))}, or 'package.module:function'"
    if ":" not in name:
        raise ConfigError(f"config.eval.answer_metric = {name!r}: {allowed}")
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"config.eval.answer_metric = {name!r}: {error}; it {allowed}") from error
    if not callable(found):
        raise ConfigError(f"config.eval.answer_metric = {name!r}: is not a function; it {allowed}")
    return found


def exact(_: str, answer: str, reference: str) -> float:
    """1 if answer and reference are equal after stripping white space."""
    return float(answer.strip() == reference.strip())


def numeric(_: str, answer: str, reference: str) -> float:
    """1 if the last numbers in both texts are equal; commas may separate thousands."""
    found, expected = _last_number(answer), _last_number(reference)
    return float(found is not None and expected is not None and math.isclose(found, expected, rel_tol=1e-9))


def _last_number(text: str) -> float | None:
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


ANSWER_METRICS: dict[str, AnswerMetric] = {"exact": exact, "numeric": numeric}
