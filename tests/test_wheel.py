"""The wheel, built from this repository, works in a fresh environment without the repository."""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import venv

import pytest

import illada_jax

ROOT = pathlib.Path(__file__).parent.parent
# Older versions of setuptools need the package `wheel`; fetching a build backend would need a network.
can_build = importlib.util.find_spec("setuptools.command.bdist_wheel") is not None
pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(not can_build, reason="needs setuptools>=70.1: pip install 'illada_jax[test]'")]


def run(*command: object, cwd: pathlib.Path, **environment: str) -> str:
    """Standard output of a command that must succeed, without this repository on Python's path."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "XLA_FLAGS")}
    result = subprocess.run([str(part) for part in command], cwd=cwd, env=inherited | environment, capture_output=True,
                            text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def fresh_bin(tmp_path_factory):
    """The `bin` directory of an environment that has the wheel, and its dependencies from that of the tests."""
    directory = tmp_path_factory.mktemp("wheel")
    # From a copy: building in the repository would leave files there, and could include leftovers.
    copy = directory / "copy"
    shutil.copytree(ROOT / "illada_jax", copy / "illada_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    pip = (sys.executable, "-m", "pip")
    run(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", directory, copy, cwd=directory)
    shutil.rmtree(copy)
    (wheel,) = directory.glob("*.whl")
    assert wheel.name == f"illada_jax-{illada_jax.__version__}-py3-none-any.whl"
    environment = directory / "environment"
    venv.create(environment)
    run(*pip, "--python", environment / "bin" / "python", "install", "-q", "--no-deps", "--no-index", wheel,
        cwd=directory)
    # Paths in a .pth file come last, and .pth files in them are not followed: an editable install stays out.
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    return environment / "bin"


def test_the_wheel_is_imported_and_not_the_repository(fresh_bin, tmp_path):
    file = run(fresh_bin / "python", "-c", "import illada_jax; print(illada_jax.__file__)", cwd=tmp_path).strip()
    assert pathlib.Path(file).is_relative_to(fresh_bin.parent)
    assert run(fresh_bin / "illada", "--version", cwd=tmp_path) == f"illada_jax {illada_jax.__version__}\n"


def test_the_demo_generates_and_is_traced(fresh_bin, tmp_path):
    """The weights, the tokenizer and the parts of the page are in the wheel."""
    text = run(fresh_bin / "illada", "generate", "--prompt=Return the", "--max_new_tokens=8", "--trace=out.html",
               cwd=tmp_path, JAX_PLATFORMS="cpu")
    assert text.strip()
    assert "<html" in (tmp_path / "out.html").read_text(encoding="utf-8")


def test_every_file_of_the_package_is_in_the_wheel(fresh_bin):
    def files(root: pathlib.Path) -> set[pathlib.Path]:
        return {path.relative_to(root) for path in root.rglob("*") if path.is_file() and path.suffix != ".pyc"}

    (packages,) = fresh_bin.parent.glob("lib/python*/site-packages")
    assert files(ROOT / "illada_jax") == files(packages / "illada_jax")
