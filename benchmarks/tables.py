"""What benchmarks share: the machine in words, the trained row that they need, and the table that they write."""

import csv
import os
import platform
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from dynjax.config import Config, UserError
from dynjax.run import checkpoint
from experiments.evaluate import with_path


def machine() -> str:
    """Device, cores and kind of processor."""
    device = jax.devices()[0]
    return f"{device.device_kind or device.platform}, {os.cpu_count()} cores, {platform.machine()}"


def trained(workdir: str, row: str, data: str, path: str = "") -> tuple[Config, nnx.Module, int]:
    """Configuration (with the data in folder `path`), model and step of a workdir of `row`, or of one like it.

    Raises UserError, which says how the workdir is made: `data` is the folder that the row's data are usually in.
    """
    if not (Path(workdir) / "config.json").exists():
        raise UserError(
            f"--workdir {workdir} is no workdir of a training run; this makes it: "
            f"python -m experiments.train {row} --workdir {workdir} --data.path {data}"
        )
    config, model, step = checkpoint.load(workdir)
    return with_path(config, path), model, step


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """`rows` as CSV; folders are made. The header has the columns of all, in the order in which they come."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
