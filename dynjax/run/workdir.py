"""Workdirs: what a run leaves on disk, and how the same command finds its way back.

config.json            the configuration, the names of the classes and the number of training examples
labelled.txt           with data.labelled, which training pictures are labelled: number and name, a line each
checkpoints/STEP/      orbax: every array of the training state; sidecar/: data position per process; checksums.json
unreadable/            checkpoints that could not be read, moved aside
lock                   held by the run that trains here (lock.py)
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax

from dynjax.config import Config, UserError
from dynjax.run import checks, files

FREE_TO_CHANGE = ("checkpoint_every", "evaluate_every", "data.path", "init_from")
"""Fields that a resumed run may change: they say when to look at the numbers, or where things are now, and never what
the numbers are."""

LABELLED = "labelled.txt"


def config_to_dict(config: Config) -> dict:
    """The configuration as JSON types."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


@dataclasses.dataclass(frozen=True)
class Run:
    """What config.json says of a run."""

    config: Config
    classes: tuple[str, ...]
    """Names, in the order of the model's outputs."""
    examples: int | None = None
    """Of the training data; None where nobody said."""
    labelled: tuple[str, ...] = ()
    """Of these, which are labelled, in words; kept beside config.json, in labelled.txt."""


def flat(values: dict, prefix: str = "") -> dict[str, Any]:
    """The fields of nested dicts by their path, such as budget.target."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def read_run(workdir: str | Path) -> Run:
    """What made `workdir`; fields that are missing take their default. Raises UserError when there is none, or it makes
    no sense."""
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"{workdir} is no workdir of a training run: it has no config.json")
    try:
        run = files.typed(files.read_json(path), Run)
        checks.check_config(run.config)
    except (OSError, ValueError, UserError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return run


def read_config(workdir: str | Path) -> tuple[Config, tuple[str, ...]]:
    """The configuration that made `workdir` and the names of its classes. Raises UserError when there is none."""
    run = read_run(workdir)
    return run.config, run.classes


def check_workdir(
    workdir: str | Path,
    config: Config,
    classes: tuple[str, ...] = (),
    examples: int | None = None,
    labelled: tuple[str, ...] = (),
) -> None:
    """Makes and changes nothing. Raises UserError when another configuration, other classes, another number of
    training examples or other labelled ones made the folder, or nothing can be written there; what is not given is not
    compared."""
    workdir = Path(workdir)
    if (workdir / "config.json").exists():
        run = read_run(workdir)
        if run.config.row != config.row:
            made = f"was made by row {run.config.row}, this is row {config.row}"
            raise UserError(f"workdir {workdir} {made}: give another --workdir")
        then, now = flat(config_to_dict(run.config)), flat(config_to_dict(config))
        changed = [name for name in now if then.get(name) != now[name] and name not in FREE_TO_CHANGE]
        if changed:
            what = "; ".join(f"{name} is {then.get(name)} there and {now[name]} here" for name in changed)
            raise UserError(f"workdir {workdir} was made with another configuration: {what}: give another --workdir")
        if classes and run.classes and (other := other_classes(run.classes, classes)):
            raise UserError(f"workdir {workdir} was trained for other classes than this data has: {other}")
        if None not in (examples, run.examples) and examples != run.examples:
            what = f"{run.examples} training examples there and {examples} here"
            raise UserError(f"workdir {workdir} was made with other data: {what}: give another --workdir")
        if labelled and (workdir / LABELLED).exists() and (other := _other_labelled(workdir / LABELLED, labelled)):
            raise UserError(f"workdir {workdir} was made with other labelled pictures: {other}: give another --workdir")
    for folder in (workdir / "checkpoints", workdir / "unreadable"):
        if os.path.lexists(folder) and not folder.is_dir():
            raise UserError(f"{folder} is no folder: move it away")
    if trouble := files.folder_trouble(workdir):
        raise UserError(f"cannot write in workdir {workdir}: {trouble}")


def _other_labelled(file: Path, labelled: tuple[str, ...]) -> str:
    """How the labelled pictures that `file` names differ, in words; empty where they do not."""
    try:
        there = file.read_text("utf-8", "surrogateescape").splitlines()
    except OSError as error:
        return f"{file} cannot be read: {error.strerror or error}"
    differ = set(there) ^ set(labelled)
    return f"{min(differ)} is one there or here alone ({file})" if differ else ""


def other_classes(there: tuple[str, ...], here: tuple[str, ...]) -> str:
    """How the names of two lists of classes, or their order, differ, in words; empty where they do not."""
    if there == here:
        return ""
    first = next((i for i, (a, b) in enumerate(zip(there, here, strict=False)) if a != b), min(len(there), len(here)))

    def told(names: tuple[str, ...]) -> str:
        start = max(0, min(first - 5, len(names) - 10)) if len(names) > 10 else 0
        shown = ", ".join(names[start : start + 10]) or "none"
        return f"{'..., ' if start else ''}{shown}{', ...' if start + 10 < len(names) else ''} ({len(names)})"

    return f"{told(there)} there and {told(here)} here, which differ from class {first} on"


def write_config(
    workdir: str | Path,
    config: Config,
    classes: tuple[str, ...],
    examples: int | None = None,
    labelled: tuple[str, ...] = (),
) -> None:
    """Make the folder if need be, and write labelled.txt, where there is something to say, and config.json, each whole
    or not at all. Raises UserError."""
    stored = {"config": config_to_dict(config), "classes": list(classes), "examples": examples}
    if labelled:
        _write(Path(workdir) / LABELLED, "\n".join(labelled) + "\n")
    _write(Path(workdir) / "config.json", json.dumps(stored, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            part.write_text(text, "utf-8", "surrogateescape")
            os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
