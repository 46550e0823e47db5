"""Rendering of chat templates, which are untrusted programs.

Jinja's sandbox gives a template the conversation and the names of special tokens: no files, no modules, no internals of
Python. It bounds neither time nor memory. `reason_to_refuse` catches crude bombs (endless loops, huge strings); a
template that behaves on short conversations can still hang the process that renders a longer one.
"""

import functools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from illada_jax.data.tokenizers import template_sandbox
from illada_jax.errors import InputError

_TIMEOUT_SECONDS = 60  # wall-clock time; far above the limit of CPU time, since machines can be slow or busy
_TURNS = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
_CONVERSATIONS = (_TURNS[:1], _TURNS, [{"role": "system", "content": "Be brief"}, *_TURNS, *_TURNS])


def render(template: str, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool,
           variables: Mapping[str, Any]) -> str:
    """The text of a conversation.

    Rendering is sandboxed but not bounded: check an untrusted template with `reason_to_refuse` first.

    Raises:
      InputError: the template is broken, rejects the conversation, or fails.
    """
    compiled = _compile(template)
    try:
        return compiled.render(messages=messages, add_generation_prompt=add_generation_prompt, **variables)
    except jinja2.TemplateError as error:
        raise InputError(f"the chat template rejects the conversation: {_one_line(error)}") from error
    except RecursionError as error:
        raise InputError("the chat template fails: its macros call each other without end") from error
    except Exception as error:
        raise InputError(f"the chat template fails: {type(error).__name__}: {_one_line(error)}") from error


@functools.lru_cache(maxsize=16)
def reason_to_refuse(template: str, variables: tuple[tuple[str, str], ...]) -> str:
    """The limit of time or memory that a template exceeds on short conversations, or an empty string.

    The template is tried in a child process. Cached, so that a refused template is not tried again.
    """
    renderings = [{"messages": messages, "add_generation_prompt": add_generation_prompt, **dict(variables)}
                  for messages in _CONVERSATIONS for add_generation_prompt in (False, True)]
    # -P keeps the modules beside the script from hiding installed packages of the same name.
    command = [sys.executable, "-P", template_sandbox.__file__]
    try:
        child = subprocess.run(command, input=json.dumps({"template": template, "renderings": renderings}).encode(),
                               capture_output=True, timeout=_TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"does not finish within {_TIMEOUT_SECONDS} seconds"
    except OSError as error:
        return f"cannot be tried in a child process: {error}"
    if child.returncode < 0:
        return (f"takes more than {template_sandbox.MAX_CPU_SECONDS} seconds of CPU time or crashes Python "
                f"(signal {-child.returncode})")
    if child.returncode > 0:
        return f"cannot be tried in a child process: {_one_line(child.stderr.decode(errors='replace')[-300:])}"
    return child.stdout.decode().strip()


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    try:
        return template_sandbox.compile_template(template)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"the chat template is broken, line {error.lineno}: {_one_line(error.message)}") from error
    except Exception as error:  # Python rejects the code that Jinja generated
        raise InputError(f"the chat template is broken: {type(error).__name__}: {_one_line(error)}") from error


def _one_line(error: Any) -> str:
    return " ".join(str(error).split())[:300]
