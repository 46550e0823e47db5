"""The manifest of an evaluation: everything needed to reproduce its numbers."""

import dataclasses
import importlib.metadata
import json
import pathlib
import platform
import subprocess
from typing import Any

import jax

import illada_jax
from illada_jax.api import LanguageModel
from illada_jax.config import to_dict
from illada_jax.evaluation.settings import Settings

LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "orbax-checkpoint", "tokenizers", "sentencepiece", "lm_eval", "datasets")


def make_manifest(lm: LanguageModel, checkpoint: str, settings: Settings, evaluation: dict[str, Any]) -> dict[str, Any]:
    """The manifest as a JSON-compatible dict; `evaluation` has tasks, few-shot examples, limit, seeds and the like."""
    manifest = {
        "evaluation": evaluation,
        "score": dataclasses.asdict(settings.score),
        # Tasks may set max_new_tokens and temperature unless the settings do; the results hold their configs.
        "decode": to_dict(lm.decode_settings(settings.decode)),
        "decode_given": dict(settings.decode),
        "lm_eval": dataclasses.asdict(settings.lm_eval),
        "checkpoint": {"path": checkpoint, "params": lm.fingerprint, "model": to_dict(lm.config.model)},
        "tokenizer": lm.tokenizer.fingerprint,
        "libraries": {name: _version(name) for name in LIBRARIES},
        "python": platform.python_version(),
        "platform": f"{jax.default_backend()}, {jax.local_devices()[0].device_kind}",
        "illada_jax": {"version": illada_jax.__version__, "commit": git_commit()},
    }
    return json.loads(json.dumps(manifest))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit of the checkout, followed by `+` if tracked files differ; None outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.check_output(command, cwd=pathlib.Path(__file__).parent, stderr=subprocess.DEVNULL,
                                       text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None
