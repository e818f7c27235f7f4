import ast
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = sorted(path for name in ("dynjax", "experiments") for path in (ROOT / name).rglob("*.py"))
LONGEST_FUNCTION, LONGEST_FILE = 70, 400
"""Lines; of a function without its docstring."""
HEAVY = ("tensorflow_datasets", "tensorboardX", "orbax", "grain", "matplotlib", "tyro", "sklearn", "skimage", "tqdm")


@pytest.mark.parametrize("module", ["dynjax", "dynjax.config", "dynjax.data", "dynjax.models", "experiments.rows"])
def test_imports_are_light(module):
    code = f"import {module}, sys; print(*sorted(set({HEAVY}) & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == []


def test_imports_point_down_only():
    ran = subprocess.run(
        [pathlib.Path(sys.executable).parent / "lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_layers_are_the_rooms_of_the_house():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    inside = [path for path in (ROOT / "dynjax").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    rooms = {path.stem for path in inside} - {"__init__"}
    assert {name for layer in layers for name in re.findall(r"\w+", layer)} == rooms


def _functions(path):
    """Name and lines, without the docstring, of each."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            said = node.body[0] if ast.get_docstring(node) is not None else None
            yield node.name, node.end_lineno - node.lineno + 1 - (said.end_lineno - said.lineno + 1 if said else 0)


def test_functions_and_files_are_short():
    files = [(path, len(path.read_text().splitlines())) for path in SOURCES]
    functions = [(path, name, lines) for path in SOURCES for name, lines in _functions(path)]
    assert [each for each in files if each[-1] > LONGEST_FILE] == []
    assert [each for each in functions if each[-1] > LONGEST_FUNCTION] == []


def test_jaxtyping_works_in_every_module():
    """Deferred annotations would turn the shape checks off."""
    deferred = [
        path for path in (ROOT / "dynjax").rglob("*.py") if "from __future__ import annotations" in path.read_text()
    ]
    assert deferred == []


def test_requirements_are_those_of_the_package():
    def names(lines):
        return {line.split(">")[0].split("[")[0].strip().lower() for line in lines if line.strip() and line[0] != "#"}

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = names((ROOT / "requirements.txt").read_text().splitlines())
    wanted = names(project["dependencies"]) | names(project["optional-dependencies"]["dev"])
    assert wanted <= installed


def test_no_requirement_is_pinned():
    text = (ROOT / "requirements.txt").read_text() + (ROOT / "pyproject.toml").read_text()
    assert "==" not in text
