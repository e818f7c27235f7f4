"""Every notebook has a text form that says the same, is kept as people meet it, with what it prints and draws, and runs
from start to end on a toy scale."""

import pathlib
import re

import jupytext
import nbclient
import nbformat
import pytest

from experiments import notebooks

ROOT = pathlib.Path(__file__).parents[1]
TEXTS = sorted((ROOT / "notebooks").glob("*.py"))
OF_A_MACHINE = re.compile(r"(?<![\w.:/])/(root|home|tmp|work|Users|usr|opt)/|0x[0-9a-f]{6}|\x1b")
"""Paths, addresses in memory, and what moves the cursor of a terminal."""
DRAWS = re.compile(r"^(plt\.)?show\(", re.MULTILINE)
"""Not in a function that the cell only defines."""

texts = pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@texts
def test_both_forms_say_the_same(text):
    forms = [jupytext.read(path) for path in (text, text.with_suffix(".ipynb"))]
    said, again = ([(cell.cell_type, cell.source) for cell in form.cells] for form in forms)
    assert said == again, f"python -m experiments.notebooks {text.relative_to(ROOT)} writes the notebook anew"


@texts
def test_is_kept_with_its_outputs(text):
    path = text.with_suffix(".ipynb")
    assert path.stat().st_size <= 1_000_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"jupytext", "kernelspec"}
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    for cell in code(notebook):
        assert "execution" not in cell.metadata, "when it was run is different every time"
        for output in cell.outputs:
            assert output.output_type in ("stream", "display_data", "execute_result")
            assert output.get("name", "stdout") == "stdout"
            said = output.text if output.output_type == "stream" else output.data.get("text/plain", "")
            assert not OF_A_MACHINE.search(said)


@texts
def test_what_draws_is_kept_with_its_picture(text):
    drawn = [
        (cell.source, any("image/png" in output.get("data", {}) for output in cell.outputs))
        for cell in code(nbformat.read(text.with_suffix(".ipynb"), as_version=4))
    ]
    assert any(found for _, found in drawn) == ("plt.show()" in text.read_text())
    assert [source for source, found in drawn if DRAWS.search(source) and not found] == []


@pytest.mark.parametrize(
    ("source", "message"),
    [("import sys; print(1, file=sys.stderr)", "writes to stderr: 1"), ("print('x\\n' * 200_000)", "at most 1000000")],
)
def test_what_is_no_result_is_not_written(source, message, tmp_path):
    text = tmp_path / "some.py"
    text.write_text(f"# %%\n{source}\n")
    with pytest.raises(ValueError, match=message):
        notebooks.main([str(text)])
    assert list(tmp_path.iterdir()) == [text]


def test_the_same_text_gives_the_same_file(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNJAX_FAST", "1")  # of which outputs that are kept know nothing
    text, found = tmp_path / "some.py", []
    text.write_text("# %% [markdown]\n# # Some\n\n# %%\nimport os\n\nprint(os.environ.get('DYNJAX_FAST'))\n")
    for _ in range(2):
        notebooks.main([str(text)])
        found.append(text.with_suffix(".ipynb").read_text())
    assert found[0] == found[1] and '"None\\n"' in found[0]


OFTEN = ("01",)
"""The others run in `make test-slow`: their parts have tests of their own."""
runs = [pytest.param(text, marks=() if text.stem[:2] in OFTEN else pytest.mark.slow) for text in TEXTS]


@pytest.mark.parametrize("text", runs, ids=[text.stem for text in TEXTS])
def test_runs(text, monkeypatch):
    monkeypatch.setenv("DYNJAX_FAST", "1")
    notebook = jupytext.read(text)
    place = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", output["text"]


def test_every_notebook_has_a_text_form():
    assert {path.stem for path in TEXTS} == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
