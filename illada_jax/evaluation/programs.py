"""Tasks of the harness that run generated programs: which they are, and the sandbox in place of what they run them by.

The metric that runs programs comes from the package `evaluate`, which imports PyTorch where that is installed; so it is
touched only for such tasks.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from illada_jax.errors import InputError
from illada_jax.evaluation.sandbox import SandboxedCodeEval


def program_tasks(index: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The tasks among `names`, and in groups and tags of these, whose files say that they run generated programs.

    Args:
      index: the harness's entries by name (`TaskManager.task_index`).
      names: tasks, groups or tags.
    """
    found: dict[str, None] = {}

    def visit(member: str | dict[str, Any], inherited: bool) -> None:
        own = member if isinstance(member, dict) else {}
        name = own.get("group", own.get("task")) if own else member
        entry = index.get(name)
        config = entry.cfg or {} if entry else {}
        runs = inherited or bool({**config, **own}.get("unsafe_code"))
        lists = [part["task"] for part in (own, config) if isinstance(part.get("task"), list)]
        members = lists[0] if lists else sorted(entry.tags) if entry and entry.cfg is None else []
        for child in members:
            visit(child, runs)
        if runs and not members:
            found[name] = None

    for name in names:
        visit(name, False)
    return list(found)


@contextlib.contextmanager
def confined(manager: Any, names: Sequence[str]) -> Iterator[None]:
    """While it lasts, tasks that load the metric that runs programs get the sandbox.

    Args:
      manager: the harness's `TaskManager`.
      names: what `program_tasks` gave; nothing is touched if it is empty.

    Raises:
      InputError: one of these tasks runs programs by other means, which the sandbox would not confine.
    """
    if not names:
        yield
        return
    import evaluate as metrics

    load = metrics.load

    def load_confined(name: str, *rest: Any, **more: Any) -> Any:
        return SandboxedCodeEval() if name == "code_eval" else load(name, *rest, **more)

    metrics.load = load_confined
    try:
        for name, task in manager.load(list(names))["tasks"].items():
            functions = [metric["metric"] for metric in task.config.metric_list or ()]
            values = [value for function in functions for value in getattr(function, "__globals__", {}).values()]
            if not any(isinstance(value, SandboxedCodeEval) for value in values):
                raise InputError(f"task {name}: runs generated programs by means of its own, which the sandbox cannot "
                                 "confine")
        yield
    finally:
        metrics.load = load
