"""Traces as a self-contained HTML page: a slider over the steps, candidates, and the order as colours."""

import dataclasses
import importlib.resources
import json
import pathlib
from collections.abc import Sequence

from illada_jax.tracing.trace import Trace


def _part(name: str) -> str:
    return importlib.resources.files("illada_jax.tracing").joinpath(name).read_text(encoding="utf-8")


def write_page(path: str | pathlib.Path, traces: Sequence[Trace]) -> None:
    """Writes a self-contained page with all traces side by side: of several prompts, or of strategies (`compare`)."""
    template = _part("page.html").replace("/*STYLE*/", _part("page.css")).replace("/*SCRIPT*/", _part("page.js"))
    data = [{**dataclasses.asdict(trace), "agreement": trace.agreement} for trace in traces]
    for trace in data:
        trace["probability"] = [round(p, 4) for p in trace["probability"]]
        trace["candidates"] = [{column: [[piece, round(p, 4)] for piece, p in best] for column, best in step.items()}
                               for step in trace["candidates"]]
    # Escape "<": a model may write "</script>".
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    pathlib.Path(path).write_text(template.replace("/*TRACES*/null", text), encoding="utf-8")
