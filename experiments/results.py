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
import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import tyro

from dynjax.config import UserError
from dynjax.run import files
from experiments import cli
from experiments.evaluate import Record, is_budget, read_record

COMMAND = "experiments.results"
HERE = Path(__file__).parent
KEY = ("row", "data", "split", "budget")
SHARES = ("accuracy", "mIoU")
"""Scores that are shown in percent; others (bits/dim, PSNR) as they are."""
SMALL = ("digits_", "mnist_", "mnist8bit_", "fashion_")
"""Rows that RESULTS.md shows and README.md does not."""
DRAWN = ("grid", "film", "calls")
"""Pictures that experiments.sample makes."""
FIGURES = ("curve", "heatmaps", "compute_histogram", "compute_by_class", "extremes", "exits")
"""Pictures that experiments.evaluate makes, of one task or the other."""
FEW = ("curve", "heatmaps", "extremes")
"""Those of rows of small data."""
OWN = ("seed",)
"""Fields in which runs of one protocol may differ."""
README_MARKERS = ("<!-- results:begin -->", "<!-- results:end -->")


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


def key(result: Result) -> tuple[str, ...]:
    return tuple(getattr(result, name) for name in KEY)


def collect(workdirs: tuple[str, ...], protocol: str, paper_score: str = "", paper_mmacs: str = "") -> list[Result]:
    """The lines of workdirs that differ in their seed: mean scores, median latencies. Raises UserError."""
    import numpy as np

    records = [_read_evaluation(workdir) for workdir in workdirs]
    for name in ("row", "data", "split", "hardware", "size"):
        values = {str(getattr(record, name)) for record in records}
        if len(values) > 1:
            raise UserError(f"{' '.join(workdirs)} are not seeds of one row: {name} is {' and '.join(sorted(values))}")
    seeds = [record.seed for record in records]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{' '.join(workdirs)}: seeds {seeds} must differ")
    points = [_read_points(Path(workdir), record) for workdir, record in zip(workdirs, records, strict=True)]
    budgets = [tuple(each) for each in points]
    if len(set(budgets)) > 1:
        raise UserError(f"{' '.join(workdirs)} were evaluated at different budgets: {budgets}")
    first, results = records[0], []
    metric = first.score
    percent = 100 if metric in SHARES else 1
    digits = 2 if metric in SHARES or metric == "PSNR" else 4
    for budget in budgets[0]:
        each = [{"pixel_accuracy": np.nan} | of_seed[budget] for of_seed in points]
        mean = {
            name: float(np.mean([point[name] for point in each])) for name in each[0] if name not in ("met", "at32")
        }
        scores = [percent * point["score"] for point in each]
        line = Result(
            row=first.row,
            data=f"{first.data} {first.size[0]}x{first.size[1]}",
            split=first.split,
            metric=metric,
            protocol=protocol,
            budget=f"{budget:g}",
            paper_score=paper_score,
            paper_mmacs=paper_mmacs,
            score=f"{percent * mean['score']:.{digits}f}",
            score_std=f"{np.std(scores, ddof=1):.{digits}f}" if len(scores) > 1 else "",
            pixel_accuracy="" if np.isnan(mean["pixel_accuracy"]) else f"{100 * mean['pixel_accuracy']:.2f}",
            seeds=str(len(each)),
            mmacs=f"{mean['macs'] / 1e6:.1f}",
            macs_percent=f"{100 * mean['macs_fraction']:.1f}",
            met="yes" if all(point["met"] for point in each) else "no",
            hardware=first.hardware,
            commit=" ".join(sorted({record.commit for record in records})),
            command=first.command,
        )
        if "latency_ms_p50" in each[0]:
            own = float(np.median([point["latency_ms_p50"] for point in each]))
            static = float(np.median([point["static_latency_ms_p50"] for point in each]))
            line = dataclasses.replace(
                line, latency_ms=f"{own:.2f}", static_latency_ms=f"{static:.2f}", speedup=f"{static / own:.2f}"
            )
        if at32 := [point["at32"] for point in each if "at32" in point]:
            own, static = (float(np.median(values)) for values in zip(*at32, strict=True))
            line = dataclasses.replace(
                line,
                batch32_latency_ms=f"{own:.3f}",
                batch32_static_latency_ms=f"{static:.3f}",
                batch32_speedup=f"{static / own:.2f}",
            )
        results.append(line)
    return results


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What was measured at one budget of a row that draws pictures, or gives them back."""

    score: float
    macs: float
    macs_fraction: float


def _read_points(workdir: Path, record: Record) -> dict[float, dict[str, Any]]:
    """By budget, what was measured: of curve.csv and latency.csv, or, of a row that draws pictures and has none, of
    evaluation.json. Raises UserError."""
    from dynjax.run.curve import read_curve

    if "score" in next(iter(record.scores.values())):
        try:
            found = {name: files.typed(each, Drawn, name, more=True) for name, each in record.scores.items()}
        except ValueError as error:
            raise UserError(f"{workdir / 'evaluation.json'} cannot be read: {error}") from None
        met = {name: record.calibration[name].met if name in record.calibration else True for name in found}
        return {float(name): dataclasses.asdict(each) | {"met": met[name]} for name, each in found.items()}
    batches = _read_batches(workdir / "latency.csv")
    found = {}
    for point in read_curve(workdir / "curve.csv"):
        more = {"at32": batches[point.budget]} if point.budget in batches else {}
        found[point.budget] = dataclasses.asdict(point) | more
    return found


def _read_batches(path: Path) -> dict[float, tuple[float, float]]:
    """By budget, ms per image and the static twin's in batches of 32; empty where they were not timed. Raises
    UserError."""
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


def merge(old: list[Result], new: list[Result]) -> list[Result]:
    """Lines by their key: a new one takes the place of an old one, others go to the end."""
    lines = {key(result): result for result in old}
    lines.update({key(result): result for result in new})
    return list(lines.values())


def render(results: list[Result], figures: list[str], notes: str = "") -> str:
    """RESULTS.md: a table per data set and split, `notes` (what was tried and what fell short), then the curves."""
    parts = [
        "# Results",
        "Generated from `results.csv` by `python -m experiments.results render`. Scores are in percent, but bits per "
        "dimension (lower is better) and PSNR in dB (mean ± standard deviation over seeds). "
        "MACs are per image, means over the split; % is the share of the static twin's. "
        "Latency is the median per image at batch 1, the static twin timed in the same run, alternating picture by "
        "picture; at 32 is the speed-up in batches of 32.",
    ]
    for data, split in dict.fromkeys((result.data, result.split) for result in results):
        lines = [result for result in results if (result.data, result.split) == (data, split)]
        parts.append(f"## {data}, {split}")
        for protocol in dict.fromkeys(result.protocol for result in lines if result.protocol):
            rows = dict.fromkeys(f"`{result.row}`" for result in lines if result.protocol == protocol)
            parts.append(f"{', '.join(rows)}: {protocol}")
        metric = " or ".join(dict.fromkeys(line.metric for line in lines))
        header = (
            f"| row | budget | {metric} | paper | seeds | MMAC | % | ms | static ms | speed-up | at 32 | met | commit |"
        )
        table = [header, "|---|" + "---:|" * 10 + "---|---|"]
        for line in lines:
            score = f"{line.score} ± {line.score_std}" if line.score_std else line.score
            paper = f"{line.paper_score} ({line.paper_mmacs} MMAC)" if line.paper_mmacs else line.paper_score
            cells = [f"`{line.row}`", line.budget, score, paper, line.seeds, line.mmacs, line.macs_percent]
            cells += [line.latency_ms, line.static_latency_ms, f"{line.speedup}x" if line.speedup else ""]
            cells += [f"{line.batch32_speedup}x" if line.batch32_speedup else "", line.met, line.commit]
            table.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(table))
        for hardware in dict.fromkeys(line.hardware for line in lines):
            parts.append(f"Measured on {hardware}.")
        parts.append("\n".join(["```", *dict.fromkeys(line.command for line in lines), "```"]))
    parts += [notes.strip()] if notes.strip() else []
    parts += [f"![{name}](figures/{name})" for name in figures]
    return "\n\n".join(parts) + "\n"


def fill_readme(readme: str, results: list[Result]) -> str:
    """`readme` with a short table of the results between its two markers, of each row the budget nearest to half,
    without rows of small data; as it is without markers."""
    begin, end = README_MARKERS
    if begin not in readme or end not in readme:
        return readme
    sets = list(dict.fromkeys((r.data, r.split) for r in results))
    nearest: dict[tuple[str, ...], Result] = {}
    large = [result for result in results if not result.row.startswith(SMALL)]
    for result in sorted(large, key=lambda r: abs(float(r.budget) - 0.5)):
        nearest.setdefault((result.row, result.data, result.split), result)
    shown = [r for each in sets for r in results if (r.data, r.split) == each and r in nearest.values()]
    lines = [
        "| row | data | budget | score | MACs, % of the twin | ms | twin, ms | speed-up | at batch 32 |",
        "|---|---|" + "---:|" * 7,
    ]
    for r in shown:
        cells = [
            f"`{r.row}`",
            f"{r.data}, {r.split}",
            r.budget,
            f"{r.metric} {r.score} ± {r.score_std}" if r.score_std else f"{r.metric} {r.score}",
            r.macs_percent,
            r.latency_ms,
            r.static_latency_ms,
            f"{r.speedup}x" if r.speedup else "",
            f"{r.batch32_speedup}x" if r.batch32_speedup else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    before, after = readme.split(begin)[0], readme.split(end)[1]
    return before + "\n".join([begin, "", *lines, "", end]) + after


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
    from experiments.rows import ROWS

    said = inspect.cleandoc(ROWS[row].__doc__ or "") if row in ROWS else ""
    paragraphs = [" ".join(part.split()) for part in said.split("\n\n")]
    return next((part.removeprefix("Protocol: ") for part in paragraphs if part.startswith("Protocol: ")), "")


def changes(workdir: str) -> str:
    """Where a run is otherwise than its row says: "Run with --steps 100. Stopped at step 60." or nothing."""
    from dynjax.run import checkpoint
    from experiments.rows import ROWS

    if not (Path(workdir) / "config.json").exists():
        return ""
    config, _ = checkpoint.read_config(workdir)
    if config.row not in ROWS:
        return ""
    row, run = (checkpoint.flat(checkpoint.config_to_dict(each)) for each in (ROWS[config.row](), config))
    free = (*checkpoint.FREE_TO_CHANGE, *OWN)
    told = [name for name, value in run.items() if row.get(name) != value and name not in free]
    options = " ".join(f"--{name.replace('_', '-')} {run[name]}" for name in told)
    step = _read_evaluation(workdir).step
    said = [f"Run with {options}." if told else "", f"Stopped at step {step}." if step < config.steps else ""]
    return " ".join(filter(None, said))


def main(raw: list[str]) -> None:
    choice = cli.parse(Choice, raw, command=COMMAND)
    folder = Path(choice.folder)
    results = read(folder / "results.csv")
    if isinstance(choice, Add):
        if not choice.workdir:
            raise UserError("--workdir is empty: give evaluated workdirs")
        drawn = [Path(choice.samples) / f"{name}.png" for name in (DRAWN if choice.samples else ())]
        if missing := [picture.name for picture in drawn if not picture.exists()]:
            raise UserError(f"--samples {choice.samples} has no {missing[0]}: run experiments.sample --out on it")
        row = _read_evaluation(choice.workdir[0]).row
        protocol = choice.protocol or " ".join(filter(None, [row_protocol(row), changes(choice.workdir[0])]))
        new = collect(choice.workdir, protocol, choice.paper_score, choice.paper_mmacs)
        results = merge(results, new)
    else:
        row, new, drawn = "", [], []
    try:
        if new:
            write(folder / "results.csv", results)
            (folder / "figures").mkdir(exist_ok=True)
            # Of a row with one budget, pictures of budgets and of compute are plain.
            names = (FEW if row.startswith(SMALL) else FIGURES) if len(new) > 1 else ()
            shown = [Path(choice.workdir[0]) / f"{name}.png" for name in names]
            for picture in filter(Path.exists, shown + drawn):
                shutil.copyfile(picture, folder / "figures" / f"{row}_{picture.name}")
        figures = sorted(path.name for path in (folder / "figures").glob("*.png"))
        notes = folder / "notes.md"
        said = notes.read_text(encoding="utf-8") if notes.exists() else ""
        (folder / "RESULTS.md").write_text(render(results, figures, said), encoding="utf-8")
        readme = folder.parent / "README.md"
        if readme.exists():
            readme.write_text(fill_readme(readme.read_text(encoding="utf-8"), results), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {error.strerror or error}") from None
    print(f"{folder / 'RESULTS.md'}: {len(results)} lines")


if __name__ == "__main__":
    cli.run(main)
