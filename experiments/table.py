"""The table of results, results.csv: its lines, read, put together and written."""

import csv
import dataclasses
import os
from pathlib import Path

from dynjax.config import UserError
from experiments.evaluate import is_budget


@dataclasses.dataclass(frozen=True)
class Result:
    """One line of results.csv: the score in percent (bits/dim and PSNR as they are), MACs in millions, latency in ms
    per image at batch 1."""

    row: str
    data: str
    split: str
    metric: str
    """What `score` is: mIoU, accuracy, bits/dim or PSNR."""
    protocol: str
    budget: str
    paper_score: str
    """Empty where the row is of no paper."""
    paper_mmacs: str
    score: str
    score_std: str
    """Empty for one seed."""
    pixel_accuracy: str
    seeds: str
    mmacs: str
    macs_percent: str
    """Of the static twin's."""
    met: str
    hardware: str
    commit: str
    command: str
    latency_ms: str = ""
    """Empty where nothing was timed: of rows that draw pictures, whose samplers have benchmarks of their own."""
    static_latency_ms: str = ""
    speedup: str = ""
    batch32_latency_ms: str = ""
    """Per image, in batches of 32; empty where they were not timed."""
    batch32_static_latency_ms: str = ""
    batch32_speedup: str = ""


def read(path: Path) -> list[Result]:
    """The lines of a results.csv; none if it is missing. Raises UserError."""
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            results = [Result(**line) for line in csv.DictReader(file)]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except TypeError as error:
        raise UserError(f"{path} has other columns than results.csv: {error}") from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    for number, result in enumerate(results, start=2):
        if None in dataclasses.astuple(result) or not is_budget(result.budget):
            raise UserError(f"{path}, line {number}: budget is {result.budget!r}, or a cell is missing")
    return results


def write(path: Path, results: list[Result]) -> None:
    """Whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    with open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Result)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(dataclasses.asdict, results))
    os.replace(part, path)


def merge(old: list[Result], new: list[Result]) -> list[Result]:
    """Lines by row, data, split and budget: a new one takes the place of an old one, others go to the end."""
    lines = {(line.row, line.data, line.split, line.budget): line for line in [*old, *new]}
    return list(lines.values())
