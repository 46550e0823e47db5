"""The sandbox in which chat templates run, and the program that tries a template under limits.

The environment is that of transformers, but without a clock: a run must not depend on the date. The program is started
by the path of this file, so it imports nothing but Jinja. It reads a template and the variables of several renderings
from stdin, as JSON, and prints the reason to refuse the template, or an empty line.
"""

import contextlib
import json
import sys
import time
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils

MAX_CPU_SECONDS = 2
_MAX_MEMORY_GIB = 1
_MAX_CHARACTERS = 1_000_000  # of a conversation of a few words


def compile_template(template: str) -> jinja2.Template:
    """The template, ready to be rendered in the sandbox. Raises jinja2.TemplateSyntaxError if it is broken."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "dict": _dict, "namespace": _Namespace}
    return environment.from_string(template)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`, which encloses answers in some templates and is a scope for variables."""

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """A namespace that refuses names with a meaning to Python, such as `__call__`."""

    def __init__(*args: Any, **kwargs: Any):  # no named parameter, so that a template can set `self`
        self, *others = args
        jinja2.utils.Namespace.__init__(self)
        for name, value in dict(*others, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any):
        if str(name).startswith("_"):
            raise jinja2.sandbox.SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """Replaces the class `dict`, whose methods could change their arguments."""
    return dict(*args, **kwargs)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _limit_resources() -> None:
    """Limits the memory and the CPU time of this process, where the operating system can."""
    try:
        import resource
    except ImportError:  # Windows
        return
    seconds = int(time.process_time()) + 1 + MAX_CPU_SECONDS
    for kind, limit in ((resource.RLIMIT_AS, _MAX_MEMORY_GIB * 2**30), (resource.RLIMIT_CPU, seconds)):
        with contextlib.suppress(ValueError, OSError):  # the limit is lower already, or is not supported (macOS)
            resource.setrlimit(kind, (limit, limit))


def _reason_to_refuse(template: str, renderings: list[dict[str, Any]]) -> str:
    """The limit that a template exceeds, or an empty string. Other errors are reported by the process that renders."""
    longest = 0
    for variables in renderings:
        try:
            longest = max(longest, len(compile_template(template).render(variables)))
        except MemoryError:
            return f"needs more than {_MAX_MEMORY_GIB} GiB of memory"
        except Exception:  # the template is broken, or rejects the conversation
            continue
    return f"writes {longest:,} characters for a conversation of a few words" if longest > _MAX_CHARACTERS else ""


if __name__ == "__main__":
    request = json.load(sys.stdin)
    _limit_resources()
    print(_reason_to_refuse(request["template"], request["renderings"]))
