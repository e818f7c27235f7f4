"""Score, MACs and latency at several budgets: python -m experiments.evaluate --workdir W [--budgets 0.25 0.5 1.0]

Writes into W: curve.csv, curve.png, compute_histogram.png, table.txt, evaluation.json, and what the task draws: of
segmentation heatmaps.png, as examples/*.png the pictures that it shows, and where tiles are decided about borders.csv
(what was kept of tiles with a border of classes, and of the others) and kinds.png; of classification
compute_by_class.png and extremes.png, and where there are exits budgeted.csv, anytime.csv and exits.png; of a VAE
drawn.png and reconstructions.png; of a GAN drawn.png, distances.csv and what is dynamic in it (extremes.png, steps.png,
sizes.csv, discriminator.csv). Of segmentation table.txt ends in IoU, Dice and boundary F1 of each class, at the last
budget. Where users run the model itself its latency is measured, and latency.csv written; how long drawing takes is a
matter of samplers (experiments.sample, benchmarks.sampling).
"""

import dataclasses
import json
import math
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from dynjax import models
from dynjax.config import Config, UserError
from dynjax.core import views
from dynjax.core.deploy import Report
from dynjax.data import calibration_batches, make_loader, make_source
from dynjax.data.source import Source, read, shape_of, stack
from dynjax.run import checkpoint, files, log
from dynjax.run.build import build
from dynjax.run.checks import LARGEST_SIDE
from dynjax.run.evaluate import Evaluation, decides, evaluate, make_runner, score, shown
from dynjax.run.workdir import other_classes, read_config
from dynjax.show import report
from dynjax.show.curve import (
    Point,
    calibration_table,
    class_table,
    curve_table,
    latency_table,
    layer_table,
    plot_curve,
    read_curve,
)
from dynjax.tasks import Task, make_task
from experiments import cli

COMMAND = "experiments.evaluate"
BUSY = 0.8  # cores


@dataclasses.dataclass(frozen=True)
class Place:
    path: str = ""
    """Folder of the data set, where it is not the one of the training."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    workdir: str
    """Folder of a training run."""
    budgets: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """Shares of the static twin's MACs, each in (0, 1]; a static row has only 1."""
    split: Literal["train", "val", "test"] = "test"
    data: Place = Place()
    batch_size: int = 8
    calibration: int = 96
    """Pictures of val on which the thresholds are solved."""
    timing: int = 60
    """Pictures of the split that are timed at batch 1, alternating with the static twin."""
    timing_batches: tuple[int, ...] | None = None
    """Larger batches that are timed as well; 8 and 32 of classification when it is not given."""
    twin: str = ""
    """Workdir of the trained static twin, scored beside the row; otherwise that of --init-from; else only timed."""
    compare: tuple[str, ...] = ()
    """LABEL=WORKDIR of evaluated controls to draw into curve.png."""


@dataclasses.dataclass(frozen=True)
class Spent:
    """What a budget came to on the calibration pictures, in MACs per picture."""

    met: bool
    mean: float


@dataclasses.dataclass(frozen=True)
class Record:
    """What is read again of an evaluation.json; `thresholds` and `calibration` by budget."""

    row: str
    data: str
    split: str
    seed: int
    step: int
    hardware: str
    commit: str
    command: str
    size: tuple[int, ...]
    """Height and width of pictures; of texts and films what they have."""
    calibration: dict[str, Spent] = dataclasses.field(default_factory=dict)
    thresholds: dict[str, float] = dataclasses.field(default_factory=dict)
    score: str = "mIoU"


def read_record(workdir: str | Path) -> Record | None:
    """What this command left in a workdir; None where it was not run. Raises UserError where it makes no sense."""
    path = Path(workdir) / "evaluation.json"
    if not path.exists():
        return None
    try:
        record = files.typed(files.read_json(path), Record, more=True)
        budgets = [*record.calibration, *record.thresholds]
        if wrong := [name for name in budgets if not is_budget(name)]:
            raise ValueError(f"{wrong[0]!r} is no budget, a share of the MACs in (0, 1]")
        if not all(1 <= side <= LARGEST_SIDE for side in record.size):
            raise ValueError(
                f"size is {list(record.size)}: it must be height and width in pixels, or what else an example has"
            )
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; run {COMMAND} again") from None
    return record


def is_budget(name: str) -> bool:
    try:
        return 0 < float(name) <= 1
    except ValueError:
        return False


def check(arguments: Arguments) -> None:
    """Raises UserError."""
    if not arguments.budgets:
        raise UserError("--budgets is empty: give shares of the static twin's MACs, each in (0, 1]")
    for budget in arguments.budgets:
        check_budget("budgets", budget)
    if min(arguments.timing_batches or (2,)) < 2:
        raise UserError(f"--timing-batches {arguments.timing_batches}: each must be at least 2; 1 is always timed")
    cli.check_least(arguments, "batch_size", "calibration", "timing")


def check_budget(option: str, budget: float) -> None:
    """Raises UserError."""
    if not 0 < budget <= 1:
        raise UserError(f"--{option} {budget:g}: a budget is a share of the static twin's MACs, in (0, 1]")


def with_path(config: Config, path: str) -> Config:
    """The configuration with another folder of its data."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=path)) if path else config


def source_of(config: Config, split: str, classes: tuple[str, ...]) -> Source:
    """A split of the data, with the classes of the run: a split need not have all of them. Raises UserError where it
    has others."""
    source = make_source(config.data, split, classes=classes)
    if classes and (different := other_classes(classes, tuple(source.classes))):
        raise UserError(f"the run was trained for other classes than {source.name} has: {different}")
    return source


def unmet(row: str, budget: float, spent: Spent | Report, whole: float) -> str:
    """What is to be said of a budget that was not met; empty where it was. `whole`: the static twin's MACs."""
    if spent.met:
        return ""
    least = math.ceil(1000 * spent.mean / whole) / 1000  # rounded up, so that this budget can be met
    said = f"the least that row {row} can spend on val's pictures is {least:.1%} of the static twin's MACs"
    return f"budget {budget:g} is not met: {said}"


def told(budget: float, report: Report, whole: float) -> str:
    """What a budget came to, in a line. `whole`: the static twin's MACs."""
    return (
        f"budget {budget:.0%} {'met' if report.met else 'NOT met'}: mean {report.mean / 1e6:.2f} MMAC "
        f"({report.mean / whole:.1%} of the static twin's {whole / 1e6:.2f}), p95 {report.p95 / 1e6:.2f}, max "
        f"{report.max / 1e6:.2f}; threshold {report.threshold:.2f}"
    )


def fresh_twin(config: Config, classes: int) -> nnx.Module:
    """The static twin of a row's model, not trained."""
    return views.still(build(dataclasses.replace(config, model=models.static_twin(config.model)), classes))


def find_twin(config: Config, classes: int, workdir: str) -> tuple[nnx.Module, bool]:
    """The static twin of a row's model, and whether it is trained: from `workdir`, from --init-from, or fresh."""
    if not workdir and config.init_from and (Path(config.init_from) / "config.json").exists():
        other, _ = read_config(config.init_from)
        # A model of codes starts from the weights of its VQ-VAE, which is no twin.
        workdir = config.init_from if other.model.family == config.model.family else ""
    if not workdir:
        return fresh_twin(config, classes), False
    found, twin, _ = checkpoint.load(workdir)
    if different := models.difference(found.model, config.model):
        raise UserError(f"--twin {workdir}: row {found.row} is another net than row {config.row}: {different}")
    if not models.is_static(found.model):
        raise UserError(f"--twin {workdir}: row {found.row} is {models.dynamics_of(found.model)}, not static")
    return twin, True


def split_labels(compare: tuple[str, ...]) -> dict[str, str]:
    """LABEL=WORKDIR by label. Raises UserError."""
    found = {}
    for each in compare:
        label, _, folder = each.partition("=")
        if not (label and folder):
            raise UserError(f"--compare {each}: give LABEL=WORKDIR")
        found[label] = folder
    return found


def commit() -> str:
    """The commit of the code that runs, with + when files differ from it; empty outside a repository."""
    here = Path(__file__).parent
    try:
        name = subprocess.run(
            ["git", "rev-parse", "--short=10", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "*.py"], cwd=here.parent, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return name.stdout.strip() + ("+" if changed.returncode else "")


def timing_inputs(source: Source, single: int, sizes: tuple[int, ...]) -> list[list[dict[str, np.ndarray]]]:
    """Batches of `source` to time, of each size: `single` examples at least, in 3 batches at least, from all over."""

    def batch(size: int, number: int, count: int) -> dict[str, np.ndarray]:
        places = ((number + np.arange(size) * count) * len(source) // (size * count)) % len(source)
        return stack([read(source, place) for place in places.tolist()])

    counts = {size: single if size == 1 else max(3, single // size) for size in sizes}
    return [[batch(size, number, count) for number in range(count)] for size, count in counts.items()]


def summarise(title: str, row: str, found: Evaluation, task: Task, twin_score: float | None, static: bool) -> list[str]:
    """The lines that the command ends in."""
    lines = [title, curve_table(found.points, task.score_name, task.percent)]
    if len({each.batch for each in found.latencies}) > 1:
        lines.append(latency_table(found.latencies))
    if jax.default_backend() == "cpu" and found.cores < BUSY:
        lines.append(
            f"latencies are not to be trusted: others left this process {found.cores:.1f} cores while it was timed"
        )
    whole = found.points[0].static_macs
    if twin_score is None:
        timed = "timed with" if found.latencies else "counted on"
        lines.append(f"static twin: {timed} fresh weights; --twin WORKDIR scores a trained one")
    elif not static:
        said = f"{100 * twin_score:.1f} %" if task.percent else f"{twin_score:.4f}"
        lines.append(f"static twin: {task.score_name} {said}, {whole / 1e6:.1f} MMAC/image")
    return lines + [said for budget, each in found.reports.items() if (said := unmet(row, budget, each, whole))]


def by_class(found: Evaluation, classes: Sequence[str]) -> list[str]:
    """The lines of table.txt on each class, of tasks that score it, at the last budget."""
    budget = max(found.scored)
    told = class_table(classes, found.scored[budget].scores)
    return ["", f"classes at budget {budget:g}", told] if told else []


def measured(found: Evaluation, twin_score: float | None) -> dict[str, Any]:
    """What evaluation.json says of what was found, beside curve.csv."""
    reports, scored = ({f"{budget:g}": each for budget, each in x.items()} for x in (found.reports, found.scored))
    return {
        "cores": found.cores,
        "static_score": twin_score,
        "thresholds": {budget: float(each.threshold) for budget, each in reports.items()},
        "calibration": {budget: dataclasses.asdict(each) for budget, each in reports.items()},
        "scores": {budget: each.scores for budget, each in scored.items()},
        "layers": {budget: each.shares for budget, each in scored.items()},
    }


def budgets_of(arguments: Arguments, row: str, static: bool, steers: bool) -> list[float]:
    """The budgets to evaluate at; says where there is one alone."""
    budgets = sorted(set(arguments.budgets))
    why = "is static" if static else "has nothing to skip"
    if static and (budgets == [1.0] or arguments.budgets == Arguments.budgets):
        return [1.0]
    if static or not steers:
        print(f"{row} {why}, it costs the same at every budget: evaluated once")
        return [1.0]
    return budgets


def draw(
    workdir: Path, curves: Mapping[str, Sequence[Point]], found: Evaluation, task: Task, twin: float | None, title: str
) -> list[str]:
    """The tables and pictures that every row has; their names. The first of the curves is what was found."""
    report.write_points(workdir / "curve.csv", found.points)
    if found.latencies:
        report.write_points(workdir / "latency.csv", found.latencies)
    name, percent = task.score_name, task.percent
    plot_curve(workdir / "curve.png", curves, twin=twin, score_name=name, percent=percent, title=title)
    macs = {budget: each.macs for budget, each in found.scored.items()}
    report.plot_histogram(workdir / "compute_histogram.png", macs, found.points[0].static_macs, title=title)
    return ["curve.csv", *(["latency.csv"] if found.latencies else []), "curve.png", "compute_histogram.png"]


def main(raw: list[str]) -> None:
    arguments = cli.parse(Arguments, raw, command=COMMAND)
    check(arguments)
    controls = {
        label: read_curve(Path(folder) / "curve.csv") for label, folder in split_labels(arguments.compare).items()
    }
    config, model, step = checkpoint.load(arguments.workdir)
    config = with_path(config, arguments.data.path)
    _, classes = read_config(arguments.workdir)
    source, val = (source_of(config, split, classes) for split in (arguments.split, "val"))
    print(source.describe())
    task = make_task(config, source, training=False)
    static = models.is_static(config.model)
    twin, trained = (model, True) if static else find_twin(config, len(classes), arguments.twin)

    def batches(source: Source) -> Iterable[dict[str, np.ndarray]]:
        return make_loader(source, arguments.batch_size, seed=0, augment=None, shuffle=False, repeat=False)

    given, size = arguments.timing_batches, min(arguments.batch_size, len(val))
    sizes = (1, *given) if task.timed and given is not None else task.timed
    found = evaluate(
        model,
        twin,
        task,
        static=static,
        budgets=budgets_of(arguments, config.row, static, decides(model, task, next(iter(batches(val))))),
        calibration=[] if static else calibration_batches(val, size, -(-min(arguments.calibration, len(val)) // size)),
        batches=lambda: batches(source),
        timing=timing_inputs(source, arguments.timing, sizes),
    )
    twin_score = found.points[0].score if static else None
    if trained and not static:
        twin_score = score(make_runner(twin, task), nnx.state(twin), batches(source), task).scores[task.score]

    what = "pictures" if config.data.crop is None else "windows"
    data = source.name + (" (pre-trained)" if models.pretrained(config.model) else "")
    title = f"{config.row}, {data} {arguments.split}, {len(source)} {what}"
    lines = summarise(f"{title}; step {step}; {report.hardware()}", config.row, found, task, twin_score, static)
    record = {
        "row": config.row,
        "data": data,
        "split": arguments.split,
        "seed": config.seed,
        "step": step,
        "hardware": report.hardware(),
        "commit": commit(),
        "command": f"python -m {COMMAND} {shlex.join(raw)}",
        "size": list(shape_of(source)),
        "score": task.score_name,
        "classes": list(classes),
    } | measured(found, twin_score)
    middle = min(found.states, key=lambda budget: abs(budget - 0.5))
    twin_point = None if twin_score is None else (found.points[0].static_macs, twin_score)
    seen = shown(found, middle, source, val, batches, title=title, twin=twin_point, batch_size=arguments.batch_size)
    workdir = Path(arguments.workdir)
    with files.writing(f"in workdir {workdir}"):
        written = draw(workdir, {config.row: found.points, **controls}, found, task, twin_score, title)
        said = task.show(workdir, seen)
        # The table of classes is for the file alone: 1,000 lines would hide the others on a terminal.
        (workdir / "table.txt").write_text("\n".join([*lines, *by_class(found, classes)]) + "\n")
        (workdir / "evaluation.json").write_text(json.dumps(log.finite(record), indent=1) + "\n")
    if not static:
        layers = {budget: each.shares for budget, each in found.scored.items()}
        print(f"\n{layer_table(layers)}\n\n{calibration_table(found.reports)}")
    print("", *lines, f"{workdir}: {' '.join(written)} evaluation.json table.txt", *filter(None, [said]), sep="\n")


if __name__ == "__main__":
    cli.run(main)
