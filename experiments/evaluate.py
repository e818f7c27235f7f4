"""Score, MACs and latency at several budgets: python -m experiments.evaluate --workdir W [--budgets 0.25 0.5 1.0]

Writes into W: curve.csv, curve.png, heatmaps.png, compute_histogram.png, table.txt, evaluation.json, and as
examples/*.png the pictures that heatmaps.png shows.
"""

import dataclasses
import json
import shlex
import subprocess
from pathlib import Path
from typing import Any, Literal

from dynjax.config import Config, UserError
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
    twin: str = ""
    """Workdir of the trained static twin, scored beside the row; otherwise that of --init-from; else only timed."""
    compare: tuple[str, ...] = ()
    """LABEL=WORKDIR of evaluated controls to draw into curve.png."""


def check(arguments: Arguments) -> None:
    """Raises UserError."""
    if not arguments.budgets:
        raise UserError("--budgets is empty: give shares of the static twin's MACs, each in (0, 1]")
    for budget in arguments.budgets:
        if not 0 < budget <= 1:
            raise UserError(f"--budgets {budget:g}: a budget is a share of the static twin's MACs, in (0, 1]")
    for name in ("batch_size", "calibration", "timing"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)} must be at least 1")


def with_path(config: Config, path: str) -> Config:
    """The configuration with another folder of its data."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=path)) if path else config


def find_twin(config: Config, classes: int, workdir: str) -> tuple[Any, bool]:
    """The static twin of a row's model, and whether it is trained: from `workdir`, from --init-from, or fresh."""
    from dynjax import checkpoint

    if workdir or (config.init_from and (Path(config.init_from) / "config.json").exists()):
        found, twin, _ = checkpoint.load(workdir or config.init_from)
        static = dataclasses.replace(config.model, dynamics="static")
        if (static.widths, static.blocks, static.stem_stride) != (
            found.model.widths,
            found.model.blocks,
            found.model.stem_stride,
        ):
            raise UserError(f"--twin {workdir}: row {found.row} is another net than row {config.row}")
        if found.model.dynamics != "static":
            raise UserError(f"--twin {workdir}: row {found.row} is {found.model.dynamics}, not static")
        return twin, True
    static = dataclasses.replace(config, model=dataclasses.replace(config.model, dynamics="static"))
    return checkpoint.evaluation_view(checkpoint.build(static, classes)), False


def split_labels(compare: tuple[str, ...]) -> dict[str, str]:
    """LABEL=WORKDIR by label. Raises UserError."""
    found = {}
    for each in compare:
        label, _, folder = each.partition("=")
        if not (label and folder):
            raise UserError(f"--compare {each}: give LABEL=WORKDIR")
        found[label] = folder
    return found


def calibration_size(available: int, arguments: Arguments) -> tuple[int, int]:
    """Batch size and number of batches."""
    size = min(arguments.batch_size, available)
    return size, -(-min(arguments.calibration, available) // size)


def without_nan(value: Any) -> Any:
    """None in place of NaN (the IoU of a class that does not occur), which JSON has not."""
    if isinstance(value, dict):
        return {name: without_nan(each) for name, each in value.items()}
    if isinstance(value, list):
        return [without_nan(each) for each in value]
    return None if value != value else value


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


def summarise(title: str, found: Any, twin_score: float | None, static: bool) -> str:
    """The table that the command ends in."""
    import jax

    from dynjax.report import curve_table

    points = found.points
    lines = [title, curve_table(points)]
    if jax.default_backend() == "cpu" and found.cores < BUSY:
        lines.append(
            f"latencies are not to be trusted: others left this process {found.cores:.1f} cores while it was timed"
        )
    if twin_score is None:
        lines.append("static twin: timed with fresh weights; --twin WORKDIR scores a trained one")
    elif not static:
        lines.append(f"static twin: mIoU {100 * twin_score:.1f} %, {points[0].static_macs / 1e6:.1f} MMAC/image")
    for point in points:
        if not point.met:
            lines.append(
                f"budget {point.budget:g} is not met: the least this model can spend on val's pictures is more"
            )
    return "\n".join(lines)


def main(raw: list[str]) -> None:
    arguments = cli.parse(Arguments, raw, command=COMMAND)
    check(arguments)
    from flax import nnx

    from dynjax import checkpoint, report
    from dynjax.data import calibration_batches, make_loader, make_source
    from dynjax.evaluate import evaluate, examples, make_runner, read_curve, score, write_curve
    from dynjax.tasks.segmentation import SegmentationTask

    controls = {
        label: read_curve(Path(folder) / "curve.csv") for label, folder in split_labels(arguments.compare).items()
    }
    config, model, step = checkpoint.load(arguments.workdir)
    config = with_path(config, arguments.data.path)
    source, val = make_source(config.data, arguments.split), make_source(config.data, "val")
    print(source.describe())
    classes = tuple(source.classes)
    if classes != (trained_on := checkpoint.read_config(arguments.workdir)[1]):
        raise UserError(f"{arguments.workdir} was trained for the classes {trained_on}, {source.name} has {classes}")
    task = SegmentationTask(len(classes), classes, config.loss)
    static = config.model.dynamics == "static"
    twin, trained = (model, True) if static else find_twin(config, len(classes), arguments.twin)

    def batches():
        return make_loader(source, arguments.batch_size, seed=0, augment=None, shuffle=False, repeat=False)

    found = evaluate(
        model,
        twin,
        task,
        static=static,
        budgets=sorted(set(arguments.budgets)),
        calibration=calibration_batches(val, *calibration_size(len(val), arguments)),
        batches=batches,
        timing=[source[i * len(source) // arguments.timing]["image"][None] for i in range(arguments.timing)],
    )
    if static:
        twin_score = found.points[0].score
    else:
        twin_score = (
            score(make_runner(twin, task), nnx.state(twin), batches(), task).scores["miou"] if trained else None
        )

    workdir = Path(arguments.workdir)
    title = f"{config.row}, {source.name} {arguments.split}, {len(source)} pictures"
    middle = min(found.states, key=lambda budget: abs(budget - 0.5))
    record = {
        "row": config.row,
        "data": source.name,
        "split": arguments.split,
        "seed": config.seed,
        "step": step,
        "hardware": report.hardware(),
        "cores": round(found.cores, 2),
        "commit": commit(),
        "command": f"python -m {COMMAND} {shlex.join(raw)}",
        "size": list(source.size),
        "classes": list(classes),
        "static_score": twin_score,
        "thresholds": {f"{budget:g}": float(each.threshold) for budget, each in found.reports.items()},
        "calibration": {f"{budget:g}": dataclasses.asdict(each) for budget, each in found.reports.items()},
        "scores": {f"{budget:g}": without_nan(each.scores) for budget, each in found.scored.items()},
        "layers": {f"{budget:g}": each.shares for budget, each in found.scored.items()},
    }
    summary = summarise(f"{title}; step {step}; {report.hardware()}", found, twin_score, static)
    try:
        write_curve(workdir / "curve.csv", found.points)
        report.plot_curve(
            workdir / "curve.png", {config.row: found.points, **controls}, static_score=twin_score, title=title
        )
        macs = {budget: each.macs for budget, each in found.scored.items()}
        report.plot_histogram(workdir / "compute_histogram.png", macs, found.points[0].static_macs, title=title)
        shown = examples(found, middle, source, arguments.batch_size)
        report.plot_heatmaps(workdir / "heatmaps.png", shown, class_names=classes, title=f"{title}, budget {middle:g}")
        report.save_pictures(workdir / "examples", {example.name: example.image for example in shown})
        (workdir / "table.txt").write_text(f"{summary}\n")
        (workdir / "evaluation.json").write_text(json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write in workdir {workdir}: {error.strerror or error}") from None

    if not static:
        print(f"\n{report.layer_table({budget: each.shares for budget, each in found.scored.items()})}")
        print(f"\n{report.calibration_table(found.reports)}")
    print(f"\n{summary}")
    print(f"{workdir}: curve.csv curve.png heatmaps.png compute_histogram.png evaluation.json table.txt")


if __name__ == "__main__":
    cli.run(main)
