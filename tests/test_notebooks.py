"""Every notebook has a text form that says the same, holds no outputs, and runs from start to end on a toy scale."""

import pathlib

import jupytext
import nbclient
import pytest

ROOT = pathlib.Path(__file__).parents[1]
TEXTS = sorted((ROOT / "notebooks").glob("*.py"))

pytestmark = pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)


def test_both_forms_say_the_same(text):
    forms = [jupytext.read(path) for path in (text, text.with_suffix(".ipynb"))]
    said, again = ([(cell.cell_type, cell.source) for cell in form.cells] for form in forms)
    assert said == again, f"jupytext --to ipynb {text.relative_to(ROOT)} writes the notebook anew"


def test_is_kept_without_outputs(text):
    """Pictures in base64 would make every change of a notebook unreadable."""
    cells = [cell for cell in jupytext.read(text.with_suffix(".ipynb")).cells if cell.cell_type == "code"]
    assert [cell for cell in cells if cell.outputs or cell.execution_count] == []


def test_runs(text, monkeypatch):
    monkeypatch.setenv("DYNJAX_FAST", "1")
    notebook = jupytext.read(text)
    place = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", output["text"]


def test_every_notebook_has_a_text_form(text):
    assert {path.stem for path in TEXTS} == {path.stem for path in text.parent.glob("*.ipynb")}
