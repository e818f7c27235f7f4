"""Score, MACs and latency at several budgets: python -m experiments.evaluate --workdir W [--budgets 0.25 0.5 1.0]

Writes into W: curve.csv, latency.csv, curve.png, compute_histogram.png, table.txt, evaluation.json; of segmentation
heatmaps.png, and as examples/*.png the pictures that it shows; of classification compute_by_class.png and extremes.png,
and where there are exits budgeted.csv, anytime.csv and exits.png. Of a row that draws pictures, or gives them back, it
writes scores (bits per dimension, PSNR) into table.txt and evaluation.json, and nothing else: how long drawing takes is
a matter of samplers (experiments.sample, benchmarks.sampling).
"""

import dataclasses
import json
import math
import shlex
import subprocess
from pathlib import Path
from typing import Any, Literal

from dynjax.config import Config, UserError
from dynjax.run import files, log
from dynjax.run.checks import LARGEST_SIDE
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
    """What is read again of an evaluation.json. By budget: `thresholds`, `calibration`, and `scores` as the task has
    them."""

    row: str
    data: str
    split: str
    seed: int
    step: int
    hardware: str
    commit: str
    command: str
    size: tuple[int, int]
    scores: dict[str, dict[str, Any]]
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
        budgets = [*record.scores, *record.calibration, *record.thresholds]
        if wrong := [name for name in budgets if not is_budget(name)]:
            raise ValueError(f"{wrong[0]!r} is no budget, a share of the MACs in (0, 1]")
        if not record.scores:
            raise ValueError("scores is empty")
        if not all(1 <= side <= LARGEST_SIDE for side in record.size):
            raise ValueError(f"size is {list(record.size)}: it must be height and width in pixels")
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
        if not 0 < budget <= 1:
            raise UserError(f"--budgets {budget:g}: a budget is a share of the static twin's MACs, in (0, 1]")
    if min(arguments.timing_batches or (2,)) < 2:
        raise UserError(f"--timing-batches {arguments.timing_batches}: each must be at least 2; 1 is always timed")
    for name in ("batch_size", "calibration", "timing"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)} must be at least 1")


def with_path(config: Config, path: str) -> Config:
    """The configuration with another folder of its data."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=path)) if path else config


def source_of(config: Config, split: str, classes: tuple[str, ...]) -> Any:
    """A split of the data, with the classes of the run: a split need not have all of them. Raises UserError where it
    has others."""
    from dynjax.data import make_source
    from dynjax.run.workdir import other_classes

    source = make_source(config.data, split, classes=classes)
    if classes and (different := other_classes(classes, tuple(source.classes))):
        raise UserError(f"the run was trained for other classes than {source.name} has: {different}")
    return source


def unmet(row: str, budget: float, spent: Any, whole: float) -> str:
    """What is to be said of a budget that `spent` (`met`, and `mean` MACs) did not meet; empty where it did. `whole`:
    the static twin's MACs."""
    if spent.met:
        return ""
    least = math.ceil(1000 * spent.mean / whole) / 1000  # rounded up, so that this budget can be met
    said = f"the least that row {row} can spend on val's pictures is {least:.1%} of the static twin's MACs"
    return f"budget {budget:g} is not met: {said}"


def find_twin(config: Config, classes: int, workdir: str) -> tuple[Any, bool]:
    """The static twin of a row's model, and whether it is trained: from `workdir`, from --init-from, or fresh."""
    from dynjax import models
    from dynjax.core import views
    from dynjax.run import checkpoint
    from dynjax.run.build import build

    if workdir or (config.init_from and (Path(config.init_from) / "config.json").exists()):
        found, twin, _ = checkpoint.load(workdir or config.init_from)
        if different := models.difference(found.model, config.model):
            raise UserError(f"--twin {workdir}: row {found.row} is another net than row {config.row}: {different}")
        if not models.is_static(found.model):
            raise UserError(f"--twin {workdir}: row {found.row} is {models.dynamics_of(found.model)}, not static")
        return twin, True
    static = dataclasses.replace(config, model=models.static_twin(config.model))
    return views.still(build(static, classes)), False


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


def timing_inputs(source: Any, single: int, sizes: tuple[int, ...]) -> list[list[Any]]:
    """Pictures of `source` to time: `single` at batch 1, then batches of each further size, all over the source."""
    import numpy as np

    def batch(size: int, number: int, count: int) -> Any:
        places = ((number + np.arange(size) * count) * len(source) // (size * count)) % len(source)
        return np.stack([source[int(place)]["image"] for place in places])

    counts = {1: single, **{size: max(3, single // size) for size in sizes}}
    return [[batch(size, number, count) for number in range(count)] for size, count in counts.items()]


def summarise(title: str, row: str, found: Any, task: Any, twin_score: float | None, static: bool) -> str:
    """The table that the command ends in."""
    import jax

    from dynjax.show.report import curve_table, latency_table

    points = found.points
    lines = [title, curve_table(points, task.score_name)]
    if len({each.batch for each in found.latencies}) > 1:
        lines.append(latency_table(found.latencies))
    if jax.default_backend() == "cpu" and found.cores < BUSY:
        lines.append(
            f"latencies are not to be trusted: others left this process {found.cores:.1f} cores while it was timed"
        )
    if twin_score is None:
        lines.append("static twin: timed with fresh weights; --twin WORKDIR scores a trained one")
    elif not static:
        whole = f"{points[0].static_macs / 1e6:.1f} MMAC/image"
        lines.append(f"static twin: {task.score_name} {100 * twin_score:.1f} %, {whole}")
    whole = points[0].static_macs
    lines += filter(None, (unmet(row, budget, each, whole) for budget, each in found.reports.items()))
    return "\n".join(lines)


def draw_segmentation(workdir: Path, found: Any, middle: float, source: Any, batch_size: int, title: str) -> str:
    """heatmaps.png and examples/; says what it wrote."""
    from dynjax.run.evaluate import examples
    from dynjax.show import report

    shown = examples(found, middle, source, batch_size)
    report.plot_heatmaps(
        workdir / "heatmaps.png", shown, class_names=source.classes, title=f"{title}, budget {middle:g}"
    )
    report.save_pictures(workdir / "examples", {example.name: example.image for example in shown})
    return "heatmaps.png"


def draw_classification(workdir: Path, found: Any, middle: float, source: Any, title: str) -> str:
    """compute_by_class.png and extremes.png; says what it wrote."""
    import numpy as np

    from dynjax.show import gallery

    title = f"{title}, budget {middle:g}"
    macs = found.scored[middle].macs
    labels = np.array([int(source[index]["label"]) for index in range(len(source))])
    gallery.plot_classes(workdir / "compute_by_class.png", macs, labels, source.classes, title=title)
    shown = min(12, len(macs))
    low, high = np.sort(macs)[[shown - 1, -shown]]
    # Pictures that stop at one exit spend the same: from among equals, those spread over the split.
    chosen = {
        name: each[np.linspace(0, len(each) - 1, shown).astype(int)]
        for name, each in (("easiest", np.flatnonzero(macs <= low)), ("hardest", np.flatnonzero(macs >= high)))
    }
    gallery.plot_extremes(
        workdir / "extremes.png",
        {name: [source[int(index)]["image"] for index in each] for name, each in chosen.items()},
        {
            name: [f"{source.classes[labels[index]]}\n{macs[index] / 1e6:.1f} MMAC" for index in each]
            for name, each in chosen.items()
        },
        title=title,
    )
    return "compute_by_class.png extremes.png"


def draw_exits(workdir: Path, model: Any, val: Any, batches: Any, static: tuple | None, size: int, title: str) -> str:
    """budgeted.csv, anytime.csv and exits.png of a model with exits; says what it wrote, nothing of another model."""
    from dynjax.data import make_loader
    from dynjax.run import anytime
    from dynjax.run.evaluate import write_curve
    from dynjax.show import gallery

    if anytime.find_exits(model) is None:
        return ""
    held_out = make_loader(val, size, seed=0, augment=None, shuffle=False, repeat=False)
    outputs = anytime.read_exits(model, batches)
    curves = {
        "budgeted": anytime.budgeted(anytime.read_exits(model, held_out), outputs),
        "anytime": anytime.anytime(outputs),
    }
    for name, points in curves.items():
        write_curve(workdir / f"{name}.csv", points)
    labels = {"budgeted": "budgeted batch: each picture its exit", "anytime": "anytime: one exit for all"}
    gallery.plot_exits(
        workdir / "exits.png", {labels[name]: each for name, each in curves.items()}, static=static, title=title
    )
    return "budgeted.csv anytime.csv exits.png"


def about(config: Config, source: Any, task: Any, split: str, step: int, raw: list[str]) -> dict[str, Any]:
    """What evaluation.json says of every evaluation, whatever was found."""
    from dynjax.data.source import size_of
    from dynjax.show import report

    return {
        "row": config.row,
        "data": source.name,
        "split": split,
        "seed": config.seed,
        "step": step,
        "hardware": report.hardware(),
        "commit": commit(),
        "command": f"python -m {COMMAND} {shlex.join(raw)}",
        "size": list(size_of(source)),
        "score": task.score_name,
    }


def of_pictures(arguments: Arguments, raw: list[str]) -> None:
    """Scores of a row that draws pictures or gives them back, at every budget if gates steer it. Raises UserError."""
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from dynjax import models
    from dynjax.core import views
    from dynjax.core.trace import traced
    from dynjax.data import calibration_batches
    from dynjax.run import checkpoint, train
    from dynjax.run.build import build
    from dynjax.run.evaluate import solve, static_macs
    from dynjax.run.workdir import read_config
    from dynjax.show import report
    from dynjax.tasks import make_task
    from dynjax.tasks.autoregressive import integers
    from dynjax.tasks.spending import steers

    config, model, step = checkpoint.load(arguments.workdir)
    config = dataclasses.replace(with_path(config, arguments.data.path), batch_size=arguments.batch_size)
    _, classes = read_config(arguments.workdir)
    source = source_of(config, arguments.split, classes)
    print(source.describe())
    task = make_task(config, source, training=False)
    validate = train.validator(task, source, config)
    one = {"image": jnp.asarray(source[0]["image"][None]), "label": jnp.zeros(1, jnp.int32)}
    infer = traced(lambda model, batch: task.infer(model, batch))
    full = twin = nnx.eval_shape(lambda model, one: infer(model, task.prepare(model, one))[1], model, one).full_macs
    found, reports = {}, {}
    if steers(model):
        static = dataclasses.replace(config, model=models.static_twin(config.model))
        twin = static_macs(build(static, len(source.classes)))
        val = source_of(config, "val", classes)
        held_out = [batch["image"] for batch in calibration_batches(val, *calibration_size(len(val), arguments))]
        encode = nnx.jit(integers)
        pictures = [np.asarray(encode(model, jnp.asarray(images))) for images in held_out]
        for budget, deployed in solve(model, twin, sorted(set(arguments.budgets)), pictures).items():
            reports[budget] = deployed.report
            found[budget] = validate(views.masked(deployed.model))
    else:
        found[1.0] = validate(model)
    title = f"{config.row}, {source.name} {arguments.split}, {len(source)} pictures; step {step}; {report.hardware()}"
    lines, scores = [title], {}
    for budget, each in found.items():
        macs = each.pop("macs_fraction") * full  # a share of the model's own, which holds its gates and heads
        scores[f"{budget:g}"] = each | {"score": each[task.score], "macs": macs, "macs_fraction": macs / twin}
        line = f"{each[task.score]:.4f} {task.score_name}"
        if task.score == "bits_per_dim":
            nats = each[task.score] * math.prod(model.shape) * math.log(2)
            line += f" of {model.likelihood.values} values, {nats:.2f} nats"
        at = f"budget {budget:g}: " if reports else ""
        at = at if not reports or reports[budget].met else f"budget {budget:g}, not met: "
        share = f" ({macs / twin:.1%} of the static twin's)" if reports else ""
        lines.append(f"{at}{line}; {macs / 1e6:.2f} MMAC{share} for all pixels at once")
    summary = "\n".join(lines)
    record = about(config, source, task, arguments.split, step, raw) | {
        "calibration": {f"{budget:g}": dataclasses.asdict(each) for budget, each in reports.items()},
        "scores": log.finite(scores),
    }
    workdir = Path(arguments.workdir)
    try:
        (workdir / "table.txt").write_text(f"{summary}\n")
        (workdir / "evaluation.json").write_text(json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write in workdir {workdir}: {error.strerror or error}") from None
    print(f"\n{summary}\n{workdir}: evaluation.json table.txt")


def main(raw: list[str]) -> None:
    arguments = cli.parse(Arguments, raw, command=COMMAND)
    check(arguments)
    from flax import nnx

    from dynjax import models
    from dynjax.data import calibration_batches, make_loader
    from dynjax.run import checkpoint
    from dynjax.run.evaluate import evaluate, make_runner, read_curve, score, write_curve
    from dynjax.run.workdir import read_config
    from dynjax.show import report
    from dynjax.tasks import make_task
    from dynjax.tasks.spending import steers

    family = read_config(arguments.workdir)[0].model
    if models.task_of(family) in ("autoregressive", "reconstruction"):
        of_pictures(arguments, raw)
        return
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

    def batches():
        return make_loader(source, arguments.batch_size, seed=0, augment=None, shuffle=False, repeat=False)

    budgets = sorted(set(arguments.budgets))
    if static and budgets != [1.0] and arguments.budgets != Arguments.budgets:
        print(f"{config.row} is static, it costs the same at every budget: evaluated once")
    if not static and not steers(model):
        print(f"{config.row} has nothing to skip, it costs the same at every budget: evaluated once")
        budgets = [1.0]
    sizes = arguments.timing_batches
    sizes = ((8, 32) if task.target == "label" else ()) if sizes is None else sizes
    found = evaluate(
        model,
        twin,
        task,
        static=static,
        budgets=budgets,
        calibration=[batch["image"] for batch in calibration_batches(val, *calibration_size(len(val), arguments))],
        batches=batches,
        timing=timing_inputs(source, arguments.timing, sizes),
    )
    if static:
        twin_score = found.points[0].score
    else:
        twin_score = (
            score(make_runner(twin, task), nnx.state(twin), batches(), task).scores[task.score] if trained else None
        )

    workdir = Path(arguments.workdir)
    title = f"{config.row}, {source.name} {arguments.split}, {len(source)} pictures"
    middle = min(found.states, key=lambda budget: abs(budget - 0.5))
    record = about(config, source, task, arguments.split, step, raw) | {
        "cores": round(found.cores, 2),
        "classes": list(classes),
        "static_score": twin_score,
        "thresholds": {f"{budget:g}": float(each.threshold) for budget, each in found.reports.items()},
        "calibration": {f"{budget:g}": dataclasses.asdict(each) for budget, each in found.reports.items()},
        "scores": {f"{budget:g}": log.finite(each.scores) for budget, each in found.scored.items()},
        "layers": {f"{budget:g}": each.shares for budget, each in found.scored.items()},
    }
    summary = summarise(f"{title}; step {step}; {report.hardware()}", config.row, found, task, twin_score, static)
    static_macs = found.points[0].static_macs
    try:
        write_curve(workdir / "curve.csv", found.points)
        write_curve(workdir / "latency.csv", found.latencies)
        report.plot_curve(
            workdir / "curve.png",
            {config.row: found.points, **controls},
            static_score=twin_score,
            score_name=task.score_name,
            title=title,
        )
        macs = {budget: each.macs for budget, each in found.scored.items()}
        report.plot_histogram(workdir / "compute_histogram.png", macs, static_macs, title=title)
        if task.target == "mask":
            drawn = draw_segmentation(workdir, found, middle, source, arguments.batch_size, title)
        else:
            star = None if twin_score is None else (static_macs, twin_score)
            drawn = draw_classification(workdir, found, middle, source, title)
            drawn += " " + draw_exits(workdir, model, val, batches(), star, arguments.batch_size, title)
        (workdir / "table.txt").write_text(f"{summary}\n")
        (workdir / "evaluation.json").write_text(json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write in workdir {workdir}: {error.strerror or error}") from None

    if not static:
        print(f"\n{report.layer_table({budget: each.shares for budget, each in found.scored.items()})}")
        print(f"\n{report.calibration_table(found.reports)}")
    print(f"\n{summary}")
    written = f"curve.csv latency.csv curve.png compute_histogram.png {drawn.strip()} evaluation.json table.txt"
    print(f"{workdir}: {written}")


if __name__ == "__main__":
    cli.run(main)
