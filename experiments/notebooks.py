"""Writes notebooks from their text forms, run from start to end, with what they print and draw.

    python -m experiments.notebooks [notebooks/NAME.py ...]

Every run of the same text gives the same file, but for what the cells themselves measure.
"""

import argparse
import os
from pathlib import Path

import jupytext
import nbclient
import nbformat

FOLDER = Path(__file__).parents[1] / "notebooks"
MOST_BYTES = 1_000_000


def executed(text: Path) -> nbformat.NotebookNode:
    """The notebook of a text form, run in the folder of the repository.

    Raises:
        nbclient.exceptions.CellExecutionError: for a cell that fails.
        ValueError: for one that writes to stderr, since warnings and progress bars are no results.
    """
    notebook = jupytext.read(text)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # else drawn anew at every reading
    place = {"metadata": {"path": str(FOLDER.parent)}}
    nbclient.NotebookClient(
        notebook, timeout=None, kernel_name="python3", resources=place, record_timing=False, coalesce_streams=True
    ).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                raise ValueError(f"{text}: a cell writes to stderr: {output['text'][:500]}")
    notebook.metadata.pop("language_info", None)  # has the version of the interpreter
    notebook.metadata["jupytext"] = {"formats": "ipynb,py:percent"}
    return notebook


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("texts", type=Path, nargs="*", help="text forms; all of them by default")
    os.environ.pop("DYNJAX_FAST", None)  # outputs of the toy scale mean nothing
    for text in parser.parse_args(argv).texts or sorted(FOLDER.glob("*.py")):
        written = nbformat.writes(executed(text)) + "\n"
        if len(written) > MOST_BYTES:
            raise ValueError(f"{text} would be {len(written)} bytes with its pictures: at most {MOST_BYTES}")
        text.with_suffix(".ipynb").write_text(written)
        print(f"{text.with_suffix('.ipynb')}: {len(written)} bytes", flush=True)


if __name__ == "__main__":
    main()
