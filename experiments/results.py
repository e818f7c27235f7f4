"""The table of results: experiments/results.csv and RESULTS.md, which is generated from it.

python -m experiments.results add --workdir W [W2 W3 ...]   # lines of an evaluated workdir, one a budget
python -m experiments.results add --workdir W --samples DIR # and the pictures that experiments.sample made of it
python -m experiments.results render                        # writes RESULTS.md and README.md's table again

notes.md beside results.csv, kept by hand, goes into RESULTS.md.

Several workdirs are seeds of one row. A line is known by row, data, split and budget: adding it again replaces it.
A figure that nobody ran is empty.
"""

import csv
import dataclasses
import inspect
import shutil
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from dynjax.config import UserError
from dynjax.run import files
from dynjax.run.workdir import FREE_TO_CHANGE, config_to_dict, flat, read_config
from dynjax.show.curve import Point, read_curve
from experiments import cli, render, table
from experiments.evaluate import Record, read_record
from experiments.rows import ROWS
from experiments.table import Result

COMMAND = "experiments.results"
HERE = Path(__file__).parent
SHARES = ("accuracy", "mIoU")
"""Scores that are shown in percent; others (bits/dim, PSNR) as they are."""
DRAWN = ("grid", "film", "calls", "compute")
"""Pictures that experiments.sample makes, the first always."""
FIGURES = (
    "curve",
    "heatmaps",
    "kinds",
    "compute_histogram",
    "compute_by_class",
    "extremes",
    "exits",
    "reconstructions",
)
"""Pictures that experiments.evaluate makes, of one task or the other."""
FEW = ("curve", "heatmaps", "kinds", "extremes", "reconstructions")
"""Those of rows of small data."""


# Lines of evaluated workdirs


Times = dict[float, tuple[float, float]]
"""By budget, ms per image and the static twin's."""


def collect(workdirs: tuple[str, ...], protocol: str, paper_score: str = "", paper_mmacs: str = "") -> list[Result]:
    """The lines of workdirs that differ in their seed: mean scores, median latencies. Raises UserError."""
    records = [_read_evaluation(workdir) for workdir in workdirs]
    for name in ("row", "data", "split", "hardware", "size"):
        values = {str(getattr(record, name)) for record in records}
        if len(values) > 1:
            raise UserError(f"{' '.join(workdirs)} are not seeds of one row: {name} is {' and '.join(sorted(values))}")
    seeds = [record.seed for record in records]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{' '.join(workdirs)}: seeds {seeds} must differ")
    curves = [{point.budget: point for point in read_curve(Path(workdir) / "curve.csv")} for workdir in workdirs]
    budgets = [tuple(each) for each in curves]
    if len(set(budgets)) > 1:
        raise UserError(f"{' '.join(workdirs)} were evaluated at different budgets: {budgets}")
    batches = [_read_batches(Path(workdir) / "latency.csv") for workdir in workdirs]
    about = dict(protocol=protocol, paper_score=paper_score, paper_mmacs=paper_mmacs)
    return [_line(records, [each[budget] for each in curves], batches, about) for budget in budgets[0]]


def _line(records: list[Record], seeds: list[Point], batches: list[Times], about: dict[str, str]) -> Result:
    first, budget = records[0], seeds[0].budget
    percent = 100 if first.score in SHARES else 1
    digits = 2 if first.score in SHARES or first.score == "PSNR" else 4
    scores = [percent * each.score for each in seeds]
    accuracy = float(np.mean([each.pixel_accuracy for each in seeds]))
    ones = [(each.latency_ms_p50, each.static_latency_ms_p50) for each in seeds]
    of_32 = [each[budget] for each in batches if budget in each]
    return Result(
        row=first.row,
        data=f"{first.data} {'x'.join(map(str, first.size))}",
        split=first.split,
        metric=first.score,
        budget=f"{budget:g}",
        score=f"{percent * float(np.mean([each.score for each in seeds])):.{digits}f}",
        score_std=f"{np.std(scores, ddof=1):.{digits}f}" if len(scores) > 1 else "",
        pixel_accuracy="" if np.isnan(accuracy) else f"{100 * accuracy:.2f}",
        seeds=str(len(seeds)),
        mmacs=f"{float(np.mean([each.macs for each in seeds])) / 1e6:.1f}",
        macs_percent=f"{100 * float(np.mean([each.macs_fraction for each in seeds])):.1f}",
        met="yes" if all(each.met for each in seeds) else "no",
        hardware=first.hardware,
        commit=" ".join(sorted({record.commit for record in records})),
        command=first.command,
        **about,
        **_times([pair for pair in ones if not np.isnan(pair).any()], 2),
        **_times(of_32, 3, "batch32_"),
    )


def _times(timed: list[tuple[float, float]], digits: int, prefix: str = "") -> dict[str, str]:
    """Columns of median latencies; none where nothing was timed."""
    if not timed:
        return {}
    own, static = (float(np.median(values)) for values in zip(*timed, strict=True))
    cells = (f"{own:.{digits}f}", f"{static:.{digits}f}", f"{static / own:.2f}")
    names = ("latency_ms", "static_latency_ms", "speedup")
    return {f"{prefix}{name}": cell for name, cell in zip(names, cells, strict=True)}


def _read_batches(path: Path) -> Times:
    """Those of batches of 32; empty where they were not timed. Raises UserError."""
    if not path.exists():
        return {}
    names = ("budget", "latency_ms_p50", "static_latency_ms_p50")
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = [[float(line[name]) for name in names] for line in csv.DictReader(file) if line["batch"] == "32"]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is no latency.csv of experiments.evaluate: {error!r}") from None
    return {budget: (own, twin) for budget, own, twin in lines}


def _read_evaluation(workdir: str | Path) -> Record:
    record = read_record(workdir)
    if record is None:
        raise UserError(f"{workdir} has no evaluation.json: run experiments.evaluate on it first")
    return record


# The command


@dataclasses.dataclass(frozen=True)
class Add:
    """Put evaluated workdirs into results.csv."""

    workdir: tuple[str, ...]
    """Workdirs of one row that differ in their seed."""
    protocol: str = ""
    """How it was trained, in a few words; otherwise the protocol in the row's docstring."""
    paper_score: str = ""
    paper_mmacs: str = ""
    samples: str = ""
    """Folder of experiments.sample, whose pictures are shown too."""
    folder: str = str(HERE)
    """Where results.csv, RESULTS.md and figures/ are."""


@dataclasses.dataclass(frozen=True)
class Render:
    """Write RESULTS.md from results.csv."""

    folder: str = str(HERE)


Choice = Annotated[Add, tyro.conf.subcommand("add")] | Annotated[Render, tyro.conf.subcommand("render")]


def row_protocol(row: str) -> str:
    """The paragraph of a row's docstring that begins with Protocol."""
    said = inspect.cleandoc(ROWS[row].__doc__ or "") if row in ROWS else ""
    paragraphs = [" ".join(part.split()) for part in said.split("\n\n")]
    return next((part.removeprefix("Protocol: ") for part in paragraphs if part.startswith("Protocol: ")), "")


def changes(workdir: str) -> str:
    """Where a run is otherwise than its row says: "Run with --steps 100. Stopped at step 60." or nothing."""
    if not (Path(workdir) / "config.json").exists():
        return ""
    config, _ = read_config(workdir)
    if config.row not in ROWS:
        return ""
    row, run = (flat(config_to_dict(each)) for each in (ROWS[config.row](), config))
    free = (*FREE_TO_CHANGE, "seed")  # in which runs of one protocol may differ
    told = [name for name, value in run.items() if row.get(name) != value and name not in free]
    options = " ".join(f"--{name.replace('_', '-')} {run[name]}" for name in told)
    step = _read_evaluation(workdir).step
    said = [f"Run with {options}." if told else "", f"Stopped at step {step}." if step < config.steps else ""]
    return " ".join(filter(None, said))


def _pictures(choice: Add, row: str, budgets: int) -> list[Path]:
    """What is to be shown of a row. Raises UserError."""
    drawn = [Path(choice.samples) / f"{name}.png" for name in (DRAWN if choice.samples else ())]
    if drawn and not drawn[0].exists():
        raise UserError(f"--samples {choice.samples} has no {drawn[0].name}: run experiments.sample --out on it")
    drawn = [*filter(Path.exists, drawn)]
    # Of a row with one budget, pictures of budgets and of compute are plain.
    names = (FEW if row.startswith(render.SMALL) else FIGURES) if budgets > 1 else ()
    return [*filter(Path.exists, (Path(choice.workdir[0]) / f"{name}.png" for name in names)), *drawn]


def main(raw: list[str]) -> None:
    choice = cli.parse(Choice, raw, command=COMMAND)
    folder, row, new, pictures = Path(choice.folder), "", [], []
    results = table.read(folder / "results.csv")
    if isinstance(choice, Add):
        if not choice.workdir:
            raise UserError("--workdir is empty: give evaluated workdirs")
        row = _read_evaluation(choice.workdir[0]).row
        protocol = choice.protocol or " ".join(filter(None, [row_protocol(row), changes(choice.workdir[0])]))
        new = collect(choice.workdir, protocol, choice.paper_score, choice.paper_mmacs)
        pictures = _pictures(choice, row, len(new))
        results = table.merge(results, new)
    with files.writing(f"in {folder}"):
        if new:
            table.write(folder / "results.csv", results)
            (folder / "figures").mkdir(exist_ok=True)
            for picture in pictures:
                shutil.copyfile(picture, folder / "figures" / f"{row}_{picture.name}")
        render.write_pages(folder, results)
    print(f"{folder / 'RESULTS.md'}: {len(results)} lines")


if __name__ == "__main__":
    cli.run(main)
