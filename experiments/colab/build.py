"""Builds the .ipynb of every notebook here from its source; edit the source.

    pip install 'illada_jax[colab]'
    python experiments/colab/build.py

A source is a Python file in jupytext's percent format. The notebooks have no outputs; running them makes those.
`tests/notebooks` checks that both agree, and runs every notebook from its source.
"""

import pathlib

HERE = pathlib.Path(__file__).parent
SOURCES = sorted(path for path in HERE.glob("*.py") if path.name != "build.py")


def read(source: pathlib.Path):
    """The notebook of a source (an `nbformat.NotebookNode`), the same every time."""
    import jupytext

    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata.pop("jupytext", None)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # jupytext draws them at random
    return notebook


def written(source: pathlib.Path) -> str:
    """The text of the .ipynb."""
    import nbformat

    return nbformat.writes(read(source)) + "\n"


def main() -> None:
    """Writes all notebooks."""
    for source in SOURCES:
        target = source.with_suffix(".ipynb")
        target.write_text(written(source), encoding="utf-8")
        print(f"{target}: {len(read(source).cells)} cells")


if __name__ == "__main__":
    main()
