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
from illada_jax.config import override, to_dict
from illada_jax.parallel.fingerprints import digest, fingerprint

LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "orbax-checkpoint", "tokenizers", "sentencepiece", "lm_eval", "datasets")


def make_manifest(lm: Any, checkpoint: str, settings: Any, evaluation: dict[str, Any]) -> dict[str, Any]:
    """The manifest as a JSON-compatible dict.

    Args:
      lm: the `LanguageModel`.
      checkpoint: the path or id it was loaded from.
      settings: an `evaluation.settings.Settings`.
      evaluation: tasks, few-shot examples, limit, preset, seeds and the like.
    """
    manifest = {
        "evaluation": evaluation,
        "score": dataclasses.asdict(settings.score),
        # Tasks may set max_new_tokens and temperature unless the settings do; the results hold their configs.
        "decode": to_dict(override(lm.config.decode, "decode", _without_missing_ids(settings.decode))),
        "decode_given": dict(settings.decode),
        "lm_eval": dataclasses.asdict(settings.lm_eval),
        "checkpoint": {"path": checkpoint, "params": fingerprint(lm.params), "model": to_dict(lm.config.model)},
        "tokenizer": lm.tokenizer.fingerprint,
        "libraries": {name: _version(name) for name in LIBRARIES},
        "python": platform.python_version(),
        "platform": f"{jax.default_backend()}, {jax.local_devices()[0].device_kind}",
        "illada_jax": {"version": illada_jax.__version__, "commit": git_commit()},
    }
    return json.loads(json.dumps(manifest))


def _without_missing_ids(decode: Any) -> dict[str, Any]:
    """The settings with a placeholder for end_of_thinking_ids, which are looked up when a prompt is decoded."""
    return {"end_of_thinking_ids": (0,), **decode} if decode.get("end_of_thinking_boost") else dict(decode)


def manifest_fingerprint(manifest: dict[str, Any]) -> str:
    """The checksum that identifies a manifest."""
    return digest(json.dumps(manifest, sort_keys=True))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit of the checkout, followed by `+` if tracked files differ; None outside of a git checkout."""
    here = pathlib.Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
