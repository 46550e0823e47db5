"""A file imports only what lies below it (design: the rooms)."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "illada_jax"
FOUNDATION = {"config", "data", "model", "diffusion", "parallel", "keys", "errors"}
MAY_IMPORT = {
    "errors": set(),
    "experiment": {"config", "data", "training", "errors"},
    "keys": set(),
    "config": {"errors"},
    "cli": {"errors"},
    "data": {"config", "errors"},
    "model": {"config", "errors"},
    "diffusion": {"data", "errors"},
    "parallel": {"config", "errors"},
    "training": FOUNDATION,
    "decoding": FOUNDATION,
    "scoring": FOUNDATION | {"decoding"},
    "interop": FOUNDATION | {"training"},
    "tracing": FOUNDATION | {"decoding"},
    "planning": FOUNDATION | {"training", "decoding", "scoring"},
    "evaluators": FOUNDATION | {"training", "decoding"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: pathlib.Path) -> tuple[set[str], set[str]]:
    """Rooms of illada_jax and other packages that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    rooms = {name.split(".")[1] for name in names if name.startswith("illada_jax.")}
    return rooms, {name.split(".")[0] for name in names if not name.startswith("illada_jax")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    rooms = {p.stem if p.is_file() else p.name for p in PACKAGE.iterdir()}
    allowed = MAY_IMPORT.get(room(path))
    if allowed is not None:
        above = (imported(path)[0] & rooms) - allowed - {room(path)}
        assert not above, f"{path} imports {above}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_torch_and_transformers_stay_out(path):
    assert not imported(path)[1] & {"torch", "transformers", "tensorflow"}


def test_data_knows_no_jax():
    for path in (PACKAGE / "data").glob("*.py"):
        assert "jax" not in imported(path)[1], path
