"""Writes the API reference with pdoc, from the docstrings (extra: docs). Warnings are errors.

    python .ci/docs.py site

Plain `python -m pdoc illada_jax` would omit modules that a package does not list in `__all__`, and could not import all
commands in one process, as several define flags of the same name.
"""

import functools
import importlib
import pathlib
import pkgutil
import sys
import warnings

import pdoc
from absl import flags

import illada_jax


def load(package) -> list[str]:
    """Imports all modules of a package and returns their names; those that need another extra are left out."""
    names = [package.__name__]
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if info.name.endswith("__main__"):
            continue
        for name in list(flags.FLAGS):
            delattr(flags.FLAGS, name)
        try:
            importlib.import_module(info.name)
            names.append(info.name)
        except ModuleNotFoundError as error:
            if error.name.partition(".")[0] == package.__name__:
                raise
            print(f"left out {info.name}: needs {error.name}")
    return names


def submodules(module: pdoc.doc.Module) -> list[pdoc.doc.Module]:
    """All modules of a package, whether or not `__all__` lists them."""
    infos = pkgutil.iter_modules(getattr(module.obj, "__path__", []), f"{module.modulename}.")
    return [pdoc.doc.Module.from_name(info.name) for info in infos if info.name in sys.modules]


def main(target: str) -> None:
    """Writes all pages into the directory `target`."""
    warnings.filterwarnings("error", module="pdoc")
    for name in illada_jax.__all__:  # they are imported lazily
        setattr(illada_jax, name, getattr(illada_jax, name))
    names = load(illada_jax)
    for module in map(importlib.import_module, names):
        if not module.__doc__:
            sys.exit(f"error: {module.__name__} has no docstring")
        for name, value in list(vars(module).items()):  # flags are documented by --help
            values = list(value.values()) if isinstance(value, dict) else value
            values = values if isinstance(values, list) else [value]
            if any(isinstance(each, flags.FlagHolder) for each in values):
                delattr(module, name)
    pdoc.doc.Module.submodules = functools.cached_property(submodules)
    pdoc.doc.Module.submodules.__set_name__(pdoc.doc.Module, "submodules")
    pdoc.extract.walk_specs = lambda specs: list(specs)  # every module is named exactly once
    pdoc.render.configure(docformat="google", footer_text=f"illada_jax {illada_jax.__version__}")
    pdoc.pdoc(*names, output_directory=pathlib.Path(target))
    print(f"wrote {target}/illada_jax.html and {len(names) - 1} more")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["site"])
