"""Accuracy, MACs and latency of one checkpoint at several budgets, beside its static twin.

Letters: B batch, H W picture, N pictures of a split.
"""

import csv
import dataclasses
import os
import time
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from dynjax.config import UserError
from dynjax.core import cost
from dynjax.core.budget import LOWEST
from dynjax.core.deploy import Deployed, Solver
from dynjax.core.trace import traced
from dynjax.data.source import Source, read
from dynjax.ops.sampling import Autoregressive

WARM_UP = 3


@dataclasses.dataclass(frozen=True)
class Point:
    """One row of curve.csv: a checkpoint at one budget. MACs are per image, latency is in ms per image at batch 1."""

    budget: float
    """Share of the static twin's MACs that was asked for."""
    score: float
    """The task's score, in [0, 1]: mIoU, or accuracy."""
    pixel_accuracy: float
    """Of segmentation; nan, and an empty cell, elsewhere."""
    macs: float
    """Mean over the split; so are macs_p95 and macs_max its 95th percentile and its maximum."""
    macs_fraction: float
    """`macs` as a share of the static twin's."""
    latency_ms_p50: float
    latency_ms_p95: float
    static_latency_ms_p50: float
    """The static twin's, timed in the same run, alternating with this one picture by picture."""
    speedup: float
    """static_latency_ms_p50 / latency_ms_p50."""
    met: bool
    """Whether the mean MACs on the calibration pictures met the budget."""
    macs_p95: float
    macs_max: float
    static_macs: float
    images: int


def write_curve(path: str | os.PathLike, points: Sequence[Any]) -> None:
    """curve.csv, or another table of points of one kind: a header and one line per point."""
    with open(path, "w", newline="") as file:
        names = [field.name for field in dataclasses.fields(points[0])]
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for point in points:
            writer.writerow({name: _cell(value) for name, value in dataclasses.asdict(point).items()})


def _cell(value: Any) -> Any:
    """A number as a CSV cell; empty for nan, which nobody measured."""
    if not isinstance(value, float):
        return value
    return "" if np.isnan(value) else f"{value:.6g}"


def read_curve(path: str | os.PathLike) -> list[Point]:
    """The points of a curve.csv. Raises UserError when it is missing or is not one."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        truth = {"True": True, "False": False}
        read: dict[type, Callable[[str], Any]] = {
            float: lambda text: float(text or "nan"),
            int: int,
            bool: truth.__getitem__,
        }
        kinds = typing.get_type_hints(Point)
        points = [Point(**{name: read[kind](row[name]) for name, kind in kinds.items()}) for row in rows]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; experiments.evaluate writes it") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no curve.csv of experiments.evaluate: {error!r}") from None
    if not points:
        raise UserError(f"{path} holds no line: evaluate its workdir again")
    return points


def alternate(
    functions: dict[Any, Callable[[Any], Any]], inputs: Sequence[Any], *, repeats: int = 1
) -> dict[Any, np.ndarray]:
    """Milliseconds of each function on each input, (repeats * N,): all functions on one input, then all on the next.

    Every function is called a few times first (compilation, caches), and each call is waited for. The order is reversed
    from input to input, so that none always follows the same other one.
    """
    for function in functions.values():
        for _ in range(WARM_UP):
            jax.block_until_ready(function(inputs[0]))
    taken: dict[Any, list[float]] = {name: [] for name in functions}
    order = list(functions)
    for _ in range(repeats):
        for value in inputs:
            for name in order:
                start = time.perf_counter()
                jax.block_until_ready(functions[name](value))
                taken[name].append(1e3 * (time.perf_counter() - start))
            order.reverse()
    return {name: np.array(milliseconds) for name, milliseconds in taken.items()}


@dataclasses.dataclass(frozen=True)
class Scored:
    """What one model did on one split."""

    scores: dict[str, Any]
    """As the task defines them: `miou`, `pixel_accuracy`, ... or `accuracy`, ..."""
    macs: np.ndarray
    """(N,), MACs of each picture."""
    shares: dict[str, dict[str, float]]
    """Per dynamic layer: share of its units that was `kept`, and its `macs` per image; means over the split."""


@dataclasses.dataclass(frozen=True)
class Runner:
    """A model taken apart into its structure, compiled once, and its state, which differs from budget to budget."""

    examine: Callable[[nnx.State, ArrayLike, ArrayLike], dict]
    """(state, image, target) -> confusion matrix, MACs per example, heat map, prediction, shares."""
    infer: Callable[[nnx.State, ArrayLike], jax.Array]
    """(state, image) -> logits."""


def make_runner(model: nnx.Module, task: Any) -> Runner:
    """The two compiled functions of every model that is built like `model`."""
    graphdef = nnx.graphdef(model)

    @jax.jit
    def examine(state: nnx.State, image: jax.Array, target: jax.Array) -> dict:
        logits, trace = traced(nnx.merge(graphdef, state))(image)
        return {
            "confusion": task.confusion(logits, target),
            "prediction": jnp.argmax(logits, -1),
            "macs": trace.macs(),
            "heat": trace.heatmap(image.shape[1:3]),
            "shares": trace.shares(),
        }

    @jax.jit
    def infer(state: nnx.State, image: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, state)(image)

    return Runner(examine, infer)


def score(runner: Runner, state: nnx.State, batches: Iterable[dict], task: Any) -> Scored:
    """Run a model over a split; `batches` hold image, what is to be predicted, and `valid`.

    What fills the last batch up is not valid, and -1 is to be predicted there.
    """
    confusion, macs, shares, weights = 0, [], [], []
    for batch in batches:
        valid = batch["valid"]
        found = jax.device_get(runner.examine(state, batch["image"], batch[task.target]))
        confusion = confusion + found["confusion"].astype(np.int64)
        macs.append(found["macs"][valid])
        # A share is a mean over its batch, blank examples included: full batches say more.
        shares.append(found["shares"])
        weights.append(valid.sum())
    mean = jax.tree.map(lambda *values: float(np.average(np.stack(values), axis=0, weights=weights)), *shares)
    return Scored(task.scores(confusion), np.concatenate(macs), mean)


def static_macs(twin: nnx.Module, size: tuple[int, int] | None = None) -> float:
    """MACs of a static twin on one picture of `size` (H, W); without, of a model that draws, on one of the integers
    that it draws (of a model of codes: on codes, without encoder and decoder)."""
    if size is None:
        assert isinstance(twin, Autoregressive)
        return cost.macs(twin, jax.ShapeDtypeStruct((1, *twin.shape), jnp.int32))
    return cost.macs(twin, jax.ShapeDtypeStruct((1, *size, 3), jnp.uint8))


def solve(
    model: nnx.Module, whole: float, budgets: Sequence[float], calibration: Sequence[np.ndarray]
) -> dict[float, Deployed]:
    """`dynjax.deploy` at several budgets, given as shares of `whole`, the static twin's MACs.

    A model's own full MACs are more: they hold its gates too.
    """
    solver = Solver(model, calibration)
    solver.spent(LOWEST)
    return {budget: solver.deploy(min(1.0, budget * whole / solver.full)) for budget in budgets}


@dataclasses.dataclass(frozen=True)
class Latency:
    """One row of latency.csv: a checkpoint at one budget, in ms per image, whole batches of one size timed."""

    budget: float
    batch: int
    latency_ms_p50: float
    static_latency_ms_p50: float
    """The static twin's, timed in the same run, alternating batch by batch."""
    speedup: float


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A checkpoint at several budgets."""

    points: list[Point]
    latencies: list[Latency]
    """At every batch size that was asked for, 1 among them."""
    scored: dict[float, Scored]
    reports: dict[float, Any]
    """What `dynjax.deploy` reports on the calibration pictures, per budget; empty for a static model."""
    runner: Runner
    model: nnx.Module
    """One of the deployed models; the others differ from it in their state alone."""
    states: dict[float, nnx.State]
    cores: float
    """Cores that this process kept busy while it was timed: on a CPU, well below 1 says that others took them."""


def evaluate(
    model: nnx.Module,
    twin: nnx.Module,
    task: Any,
    *,
    static: bool,
    budgets: Sequence[float],
    calibration: Sequence[np.ndarray],
    batches: Callable[[], Iterable[dict]],
    timing: Sequence[Sequence[np.ndarray]],
    repeats: int = 1,
) -> Evaluation:
    """Deploy `model` at each budget, score it and time it against `twin`, the same net without dynamics.

    The twin's weights do not matter here. `batches()` starts a pass over the split. `timing` has for each batch size
    that is timed some batches of it, (batch, H, W, 3), and the first size is 1. A `static` model has one budget, 1.
    """
    whole = static_macs(twin, timing[0][0].shape[1:3])
    deployed = {} if static else solve(model, whole, budgets, calibration)
    # The models inside: layers have the names there that they have in training.
    models = {budget: each.model for budget, each in deployed.items()} or {1.0: model}
    one = next(iter(models.values()))
    runner = make_runner(one, task)
    states = {budget: nnx.state(each) for budget, each in models.items()}
    scored = {budget: score(runner, state, batches(), task) for budget, state in states.items()}

    twin_runner, twin_state = make_runner(twin, task), nnx.state(twin)
    functions: dict[Any, Callable] = {"static": lambda image: twin_runner.infer(twin_state, image)}
    functions |= {b: (lambda image, s=s: runner.infer(s, image)) for b, s in states.items() if not static}
    wall, cpu = time.perf_counter(), time.process_time()
    times, *larger = (alternate(functions, [jax.device_put(x) for x in each], repeats=repeats) for each in timing)
    cores = (time.process_time() - cpu) / (time.perf_counter() - wall)
    latencies = []
    for milliseconds, pictures in zip((times, *larger), timing, strict=True):
        if static:
            milliseconds[1.0] = milliseconds["static"]
        batch = len(pictures[0])
        for budget in scored:
            own, twins = (float(np.median(milliseconds[name])) / batch for name in (budget, "static"))
            latencies.append(Latency(float(budget), batch, own, twins, twins / own))

    points = []
    twin_ms = float(np.median(times["static"]))
    for budget, found in scored.items():
        middle, late = np.percentile(times[budget], [50, 95])
        points.append(
            Point(
                budget=float(budget),
                score=float(found.scores[task.score]),
                pixel_accuracy=float(found.scores.get("pixel_accuracy", np.nan)),
                macs=float(found.macs.mean()),
                macs_fraction=float(found.macs.mean() / whole),
                latency_ms_p50=float(middle),
                latency_ms_p95=float(late),
                static_latency_ms_p50=twin_ms,
                speedup=float(twin_ms / middle),
                met=True if static else bool(deployed[budget].report.met),
                macs_p95=float(np.percentile(found.macs, 95)),
                macs_max=float(found.macs.max()),
                static_macs=float(whole),
                images=len(found.macs),
            )
        )
    reports = {budget: each.report for budget, each in deployed.items()}
    return Evaluation(points, latencies, scored, reports, runner, one, states, cores)


@dataclasses.dataclass(frozen=True)
class Example:
    """One picture of the split, as `report.plot_heatmaps` wants it."""

    name: str
    """easiest, median or hardest: the fewest, the median and the most MACs."""
    macs: float
    image: np.ndarray
    mask: np.ndarray
    prediction: np.ndarray
    heat: np.ndarray


def examples(found: Evaluation, budget: float, source: Source, batch_size: int) -> list[Example]:
    """The pictures of `source` that got the fewest, the median and the most MACs at `budget`.

    `batch_size` is that of the scores, so that nothing is compiled anew.
    """
    macs = found.scored[budget].macs
    order = np.argsort(macs, kind="stable")
    chosen = {"easiest": order[0], "median": order[len(order) // 2], "hardest": order[-1]}
    pictures = [read(source, int(index)) for index in chosen.values()]
    images, masks = (np.stack([picture[name] for picture in pictures]) for name in ("image", "mask"))
    # Repeated up to the batch size that is compiled already.
    shape = max(batch_size, len(chosen))
    ran = found.runner.examine(
        found.states[budget], *(np.resize(each, (shape, *each.shape[1:])) for each in (images, masks))
    )
    prediction, heat = np.asarray(ran["prediction"]), np.asarray(ran["heat"])
    return [
        Example(name, float(macs[index]), images[i], masks[i], prediction[i], heat[i])
        for i, (name, index) in enumerate(chosen.items())
    ]
