"""A file imports only lower layers, every file belongs to a layer, and no import is circular."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "illada_jax"
FOUNDATION = {"config", "data", "model", "diffusion", "parallel", "keys", "errors", "files", "console"}
COMMANDS = {"main", "generate", "evaluate", "prepare", "convert", "aot", "plot"}
# What a file of each package may import beside its own package. A package or file that is not named here is an error.
MAY_IMPORT = {
    "errors": set(),
    "console": set(),
    "files": {"errors"},
    "keys": set(),
    "config": {"errors"},
    "data": {"config", "errors", "files"},
    "model": {"config", "errors"},
    "diffusion": {"config", "data", "errors"},
    "parallel": {"config", "errors"},
    "training": FOUNDATION,
    "decoding": FOUNDATION,
    "scoring": FOUNDATION | {"decoding"},
    "interop": FOUNDATION | {"training"},
    "tracing": FOUNDATION | {"decoding"},
    "planning": FOUNDATION | {"training", "decoding", "scoring"},
    "api": FOUNDATION | {"decoding", "scoring", "interop"},
    "evaluation": FOUNDATION | {"training", "decoding", "scoring", "api"},
    "cli": {"console", "errors", "files", "api", "config", "parallel"},
    "main": FOUNDATION | {"cli", "training", "evaluation", "interop"},
    "generate": {"cli", "api", "tracing", "data", "config", "errors", "files"},
    "evaluate": {"cli", "api", "config", "errors", "files", "evaluation", "parallel", "scoring"},
    "prepare": {"cli", "data", "config", "errors"},
    "convert": {"cli", "interop", "errors"},
    "aot": {"cli", "config", "errors", "files", "parallel", "planning"},
    "plot": {"cli", "errors", "training"},
    "__init__": {"api", "errors"},
    "__main__": {"errors"},
}
# What imports JAX when it is imported: `data` and the command that prepares it do without.
WITHOUT_JAX = [*(PACKAGE / "data").rglob("*.py"), PACKAGE / "prepare.py", PACKAGE / "config.py", PACKAGE / "errors.py"]
FILES = sorted(PACKAGE.rglob("*.py"))


def package_of(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: pathlib.Path, top_level: bool = False) -> set[str]:
    """Modules that a file imports, by full name; `top_level`: those that are imported with it."""
    tree, names = ast.parse(path.read_text()), set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def module_of(path: pathlib.Path) -> str:
    return ".".join(["illada_jax", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    assert package_of(path) in MAY_IMPORT, f"{path}: not in MAY_IMPORT"
    found = {name.split(".")[1] for name in imports(path) if name.startswith("illada_jax.")}
    above = (found & {package_of(p) for p in FILES}) - MAY_IMPORT[package_of(path)] - {package_of(path)}
    assert not above, f"{path} imports {above}"


def test_nobody_imports_a_command():
    for path in FILES:
        found = {name.split(".")[1] for name in imports(path) if name.startswith("illada_jax.")}
        assert not found & COMMANDS, f"{path} imports a command"


def test_no_import_goes_round():
    """Imports inside functions count too: none hides a circle."""
    edges = {name: {other for other in imports(path) if other in MODULES and other != name and other != "illada_jax"}
             for name, path in MODULES.items() if name != "illada_jax"}
    state: dict[str, str] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert state.get(name) != "open", f"{' → '.join((*trail[trail.index(name):], name))}"
        if name not in state:
            state[name] = "open"
            for other in sorted(edges[name]):
                visit(other, (*trail, name))
            state[name] = "done"

    for name in sorted(edges):
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_torch_and_private_interfaces_stay_out(path):
    found = imports(path)
    assert not {name.split(".")[0] for name in found} & {"torch", "transformers", "tensorflow"}
    assert not [name for name in found if name.startswith("jax._src")], f"{path}: a private interface of JAX"


def test_data_needs_no_jax():
    for path in WITHOUT_JAX:
        assert "jax" not in {name.split(".")[0] for name in imports(path)}, path
