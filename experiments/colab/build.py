"""Makes the .ipynb of every notebook here from its source, which is what to edit.

    pip install 'illada_jax[colab]'
    python experiments/colab/build.py

A source is a Python file in jupytext's percent format. A notebook has no outputs: whoever opens it makes them. The test
`tests/notebooks` holds that both are in step, and runs every notebook from its source.
"""

import pathlib

HERE = pathlib.Path(__file__).parent
SOURCES = sorted(path for path in HERE.glob("*.py") if path.name != "build.py")


def read(source: pathlib.Path):
    """The notebook that a source describes (an `nbformat.NotebookNode`), the same every time."""
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
    """Writes them all."""
    for source in SOURCES:
        target = source.with_suffix(".ipynb")
        target.write_text(written(source), encoding="utf-8")
        print(f"{target}: {len(read(source).cells)} cells")


if __name__ == "__main__":
    main()
