"""Chat templates are programs of strangers: rendered in a sandbox, with a budget, or refused.

Jinja's sandbox gives a template the conversation and the names of special tokens: no file, no module, no attribute of
Python's own. What it does not bound is bounded here: the iterations of loops, the calls, and how long a text may get.
"""

import functools
import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from illada_jax.errors import InputError

_MOST_WORK = 10_000_000  # of a rendering: characters and items that are gone through or written, and what follows
_ITERATION, _CALL = 10, 100
_LONGEST = 10_000_000  # characters or items that a value may be made to have
_WIDTH = re.compile(r"\d{5,}|\*")  # of a format: fields of such a width
_LARGEST_ARGUMENT = {"indent": 100, "tojson": 100, "wordwrap": 10_000}  # else that of Jinja's range
_REFUSED_METHODS = ("expandtabs", "translate", "format_map")
_local = threading.local()


def render(template: str, messages: list[dict[str, str]], add_generation_prompt: bool,
           variables: Mapping[str, str]) -> str:
    """The text of a conversation.

    Raises:
      InputError: the template is broken, refuses the conversation, fails, or does far more than a template has to.
    """
    _local.work = 0
    try:
        return _compile(template).render(messages=messages, add_generation_prompt=add_generation_prompt, **variables)
    except jinja2.TemplateError as error:
        raise InputError(f"the chat template refuses the conversation: {_line(error)}") from error
    except RecursionError as error:
        raise InputError("the chat template fails: its macros call each other without end") from error
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError,
            MemoryError) as error:
        raise InputError(f"the chat template fails: {type(error).__name__}: {_line(error)}") from error


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, finalize=_shown,
                               extensions=[_GenerationTag, jinja2.ext.loopcontrols])
    environment.filters |= {"tojson": _to_json, "format": _format}
    environment.filters = {name: _bounded(name, function) for name, function in environment.filters.items()}
    environment.filters |= {"counted": _counted, "concatenated": _concatenated}
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"the chat template is broken, line {error.lineno}: {_line(error.message)}") from error
    except (RecursionError, SyntaxError, ValueError, TypeError, AssertionError) as error:  # in what Jinja makes of it
        raise InputError(f"the chat template is broken: {type(error).__name__}: {_line(error)}") from error


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Counts iterations and calls, and looks at whatever can make a value long."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)

        def filtered(node: jinja2.nodes.Expr, by: str) -> jinja2.nodes.Filter:
            return jinja2.nodes.Filter(node, by, [], [], None, None, lineno=node.lineno)

        for loop in tree.find_all(jinja2.nodes.For):
            loop.iter = filtered(loop.iter, "counted")
        for node in tree.find_all(jinja2.nodes.Concat):
            node.nodes = [filtered(jinja2.nodes.List(node.nodes, lineno=node.lineno), "concatenated")]
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """See SandboxedEnvironment."""
        _work(_ITERATION + _size(left) + _size(right))
        if operator == "%" and isinstance(left, str):
            return _format(left, *(right if isinstance(right, tuple) else (right,)))
        if operator == "**":
            # At most 64 digits or so, also in turn.
            fits = all(isinstance(x, (int, float)) for x in (left, right)) and abs(left) < 1e6 and abs(right) < 12
        elif operator == "*":
            times = [x if isinstance(x, (int, float)) else _size(x) for x in (left, right)]
            fits = (_size(left) + _size(right) == 0) or times[0] * times[1] <= _LONGEST
        else:
            fits = _size(left) + _size(right) <= _LONGEST
        _require(fits, f"{operator} would make a value too large")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """See SandboxedEnvironment."""
        # Jinja puts a function of its own before `format`.
        inner = getattr(function, "__wrapped__", function)
        name, owner = getattr(inner, "__name__", ""), getattr(inner, "__self__", None)
        _work(_CALL + _size(owner))
        _check_call(name, owner, args, kwargs)
        return super().call(context, function, *args, **kwargs)


def _work(amount: int) -> None:
    _local.work = getattr(_local, "work", 0) + amount
    _require(_local.work <= _MOST_WORK, f"its loops, calls and texts take more than {_MOST_WORK:,}")


def _require(fits: bool, message: str) -> None:
    if not fits:
        raise jinja2.TemplateError(message)


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple, dict, range)) else 0


def _shown(value: Any) -> Any:
    """What is written counts."""
    _work(_size(value))
    return value


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _work(_ITERATION)
        yield item


def _concatenated(parts: list[Any]) -> str:
    texts = [str(part) for part in parts]
    _require(sum(map(len, texts)) <= _LONGEST, "~ would make a text too long")
    _work(sum(map(len, texts)))
    return "".join(texts)


def _bounded(name: str, function: Any) -> Any:
    """A filter that is looked at like a method of what it filters."""
    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        # Some get Jinja's own things first.
        mine = [arg for arg in args if not isinstance(arg, (jinja2.Environment, jinja2.runtime.Context))]
        _work(_ITERATION + _size(mine[0] if mine else None))
        if name == "join":
            _check_call(name, (kwargs | dict(zip(("d",), mine[1:], strict=False))).get("d", ""), mine[:1], {})
        else:
            _check_call(name, mine[0] if mine else None, mine[1:], kwargs)
        return function(*args, **kwargs)

    return bounded


def _check_call(name: str, owner: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuses what would make a very long text of a short one."""
    _require(name not in _REFUSED_METHODS or not isinstance(owner, (str, bytes)), f"{name} is not for templates")
    if name == "format" and isinstance(owner, str):
        _require(not _WIDTH.search(owner), "a field that wide is not written")
    if name == "join" and args and isinstance(args[0], (list, tuple)):
        length = sum(len(str(x)) if isinstance(x, str) else 20 for x in args[0])
        _require(length + len(args[0]) * len(str(owner)) <= _LONGEST, "join would make a text too long")
    if name == "replace" and isinstance(owner, str):
        new = next((x for x in (*args[1:2], kwargs.get("new"))), "")
        _require((len(owner) + 1) * (len(str(new)) + 1) <= _LONGEST, "replace would make a text too long")
    limit = _LARGEST_ARGUMENT.get(name, jinja2.sandbox.MAX_RANGE)
    for value in (*args, *kwargs.values()):
        _require(not isinstance(value, int) or abs(value) <= limit, f"{name} does not take a number that large")


def _format(text: Any, *args: Any, **kwargs: Any) -> str:
    _require(not _WIDTH.search(str(text)), "a field that wide is not written")
    return str(text) % (kwargs or args)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _line(error: Any) -> str:
    return " ".join(str(error).split())[:300]


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks answers in some templates; what it encloses is written as it is."""

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
