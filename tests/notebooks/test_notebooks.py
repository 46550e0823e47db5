"""The notebooks: in step with their sources, the same first cell, and run from the source to the end.

Running takes minutes: `pytest -m notebooks tests/notebooks`, which `.ci/run` does, needs `pip install -e '.[colab]'`.
"""

import ast
import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

from illada_jax import config as config_lib
from tests.fixtures.make_configs import EXPERIMENTS, load

COLAB = EXPERIMENTS / "colab"
NEEDED = ("jupytext", "nbclient", "ipykernel", "matplotlib")
NAMES = ("sample", "train_sudoku", "official_weights", "evaluate")
SECONDS = 1200  # for one cell: stops a notebook that hangs, not one that is slow
missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
needs_jupyter = pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}: pip install 'illada_jax[colab]'")


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("build_notebooks", COLAB / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_cells(source: pathlib.Path) -> list[str]:
    return [part.partition("\n")[2].strip("\n") for part in source.read_text(encoding="utf-8").split("\n# %%")[1:]
            if not part.startswith(" [markdown]")]


def test_there_are_four_and_each_has_its_notebook():
    names = sorted(path.stem for path in COLAB.glob("*.ipynb"))
    assert names == sorted(NAMES)
    assert names == sorted(path.stem for path in COLAB.glob("*.py") if path.stem != "build")


@needs_jupyter
@pytest.mark.parametrize("name", NAMES)
def test_the_notebook_is_that_of_its_source(build, name):
    text = (COLAB / f"{name}.ipynb").read_text(encoding="utf-8")
    assert text == build.written(COLAB / f"{name}.py"), "type: python experiments/colab/build.py"


@needs_jupyter
@pytest.mark.notebooks
@pytest.mark.parametrize("name", NAMES)
def test_the_notebook_runs(build, name, tmp_path, request):
    """As a reader runs it, in an empty directory."""
    if "notebooks" not in request.config.option.markexpr:
        pytest.skip("takes a minute or more: pytest -m notebooks")
    import nbclient

    # The eight fake devices of the tests are not what a reader has.
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(EXPERIMENTS.parent), os.environ.get("PYTHONPATH")]))
    notebook = build.read(COLAB / f"{name}.py")
    client = nbclient.NotebookClient(notebook, timeout=SECONDS, kernel_name="python3",
                                     resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2, "plots"
    warnings = [output.text for output in outputs if output.output_type == "stream" and "Warning" in output.text]
    assert not warnings


def test_the_first_cell_is_the_same():
    first = {name: code_cells(COLAB / f"{name}.py")[0] for name in NAMES}
    assert len(set(first.values())) == 1


def run_first_cell(monkeypatch, cwd, *, repository="", tpu=False, gpu=False):
    """The package that it asks pip for, where illada_jax is not importable."""
    asked = []
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "illada_jax" else find_spec(name))
    monkeypatch.setattr(subprocess, "run", lambda command, check: asked.append((command, check)))
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi" if gpu else None)
    monkeypatch.setattr(pathlib.Path, "glob", lambda self, pattern: iter([self / "0"] if tpu else []))
    monkeypatch.chdir(cwd)
    cell = code_cells(COLAB / "sample.py")[0].replace('REPOSITORY = ""', f"REPOSITORY = {str(repository)!r}")
    exec(cell, {})
    (command, check), = asked
    assert command[:-1] == [sys.executable, "-m", "pip", "install", "-q"] and check
    return command[-1]


def test_the_first_cell_installs_what_the_machine_needs(monkeypatch, tmp_path):
    root = EXPERIMENTS.parent.resolve()
    assert run_first_cell(monkeypatch, COLAB) == f"{root}[plot]"
    assert run_first_cell(monkeypatch, COLAB, gpu=True) == f"{root}[plot,cuda]"
    assert run_first_cell(monkeypatch, COLAB, tpu=True) == f"{root}[plot,tpu]"
    assert run_first_cell(monkeypatch, tmp_path, repository=tmp_path, tpu=True) == f"{tmp_path}[plot,tpu]"
    address = "https://example.org/illada_jax"
    for given in (address, f"git+{address}"):
        assert run_first_cell(monkeypatch, tmp_path, repository=given) == f"illada_jax[plot] @ git+{address}"
    with pytest.raises(RuntimeError, match="Set REPOSITORY"):
        run_first_cell(monkeypatch, tmp_path)


def test_the_sudoku_notebook_trains_the_experiment():
    """Its config is that of experiments/sudoku.py, except for the differences that it states."""
    source = next(cell for cell in code_cells(COLAB / "train_sudoku.py") if "c = config_lib.defaults()" in cell)
    lines = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    names = {"config_lib": config_lib, "STEPS": 440}
    exec(compile(ast.Module(lines, []), "config", "exec"), names)
    changed = config_lib.differences(config_lib.to_dict(load(EXPERIMENTS / "sudoku.py")),
                                     config_lib.to_dict(names["config"]))
    assert {line.partition(":")[0] for line in changed} == {
        "eval.every", "eval.evaluators", "eval.final", "eval.rows", "train.log_every", "train.plateau_window",
        "train.tensorboard", "optimizer.decay_steps"}
