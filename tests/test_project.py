import pathlib
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
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
