"""The one evaluation: what a task's `infer` gives, costs and takes, of a model or of a checkpoint at several budgets.

Letters: B examples, N pictures of a split.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from dynjax.core import cost
from dynjax.core.budget import LOWEST
from dynjax.core.decision import Decision
from dynjax.core.deploy import Deployed, Report, Solver
from dynjax.core.gates import Threshold
from dynjax.core.trace import traced
from dynjax.data.source import Source, read, size_of, stack
from dynjax.show.curve import Latency, Point
from dynjax.tasks.task import Batch, Evaluates, Output, Scores, Shown

Arrays: TypeAlias = Mapping[str, ArrayLike]
"""A batch as a loader gives it."""
WARM_UP = 3


def steers(model: nnx.Module) -> bool:
    """Whether there is something in `model` that a budget can move."""
    return any(isinstance(each, Threshold) for _, each in nnx.iter_graph(model))


def decides(model: nnx.Module, task: Evaluates, batch: Arrays) -> bool:
    """Whether what the task infers takes decisions that a budget can move: others may be for training alone."""
    if not steers(model):
        return False
    graphdef, state = nnx.split(model)

    def run(state: nnx.State, batch: Batch) -> Any:
        model = nnx.merge(graphdef, state)
        return traced(lambda model, batch: task.infer(model, batch))(model, task.prepare(model, batch))[1]

    return bool(jax.eval_shape(run, state, batch).decisions)


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
class Runner:
    """A model taken apart into its structure, compiled once, and its state, which differs from budget to budget."""

    prepare: Callable[[nnx.State, Arrays], Batch]
    """(state, batch) -> the task's prepared batch."""
    infer: Callable[[nnx.State, Arrays], Output]
    """(state, prepared batch) -> output."""
    examine: Callable[[nnx.State, Arrays], dict[str, Any]]
    """(state, batch) -> the sums `counts`, `examples` and `fraction`, and of each example `macs` and so on."""


def make_runner(model: nnx.Module, task: Evaluates, sharding: jax.sharding.Sharding | None = None) -> Runner:
    """The compiled functions of every model that is built like `model`; with a `sharding` sums alone are examined."""
    graphdef = nnx.graphdef(model)

    def examine(state: nnx.State, batch: Batch) -> dict[str, Any]:
        model = nnx.merge(graphdef, state)
        batch = task.prepare(model, batch)
        output, trace = traced(lambda model, batch: task.infer(model, batch))(model, batch)
        macs = trace.macs()
        sums = {
            # Blank examples, which fill the last batch up, have nothing to be predicted: -1 throughout.
            "counts": task.counts(model, output, batch),
            "fraction": jnp.where(batch["valid"], macs / trace.full_macs, 0.0).sum(),
            "examples": batch["valid"].sum(),
        }
        if sharding is not None:
            return sums
        return sums | {"macs": macs, "shares": trace.shares(), "output": output, "trace": trace}

    return Runner(
        jax.jit(lambda state, batch: task.prepare(nnx.merge(graphdef, state), batch)),
        jax.jit(lambda state, batch: task.infer(nnx.merge(graphdef, state), batch)),
        jax.jit(examine, out_shardings=sharding),
    )


@dataclasses.dataclass(frozen=True)
class Scored:
    """What one model did on one split."""

    scores: Scores
    """As the task defines them: `miou`, `pixel_accuracy`, ... or `accuracy`, ..."""
    fraction: float
    """Mean share of the model's own full MACs."""
    macs: np.ndarray
    """(N,), MACs of each picture; empty where sums alone are examined, and so are the shares."""
    shares: dict[str, dict[str, float]]
    """Per dynamic layer: share of its units that was `kept`, and its `macs` per image; means over the split."""


def score(runner: Runner, state: nnx.State, batches: Iterable[Arrays], task: Evaluates) -> Scored:
    """Run a model over a split; `batches` hold what the task wants, and `valid`."""
    sums: dict[str, Any] = {}
    macs, shares, weights = [np.zeros(0, np.float32)], [], []
    for batch in batches:
        found = runner.examine(state, batch)
        found = jax.device_get({name: value for name, value in found.items() if name not in ("output", "trace")})
        for name in ("counts", "fraction", "examples"):
            sums[name] = sums.get(name, 0) + np.asarray(found[name], np.float64)
        if "macs" in found:
            macs.append(found["macs"][np.asarray(batch["valid"])])
            # A share is a mean over its batch, blank examples included: full batches say more.
            shares.append(found["shares"])
            weights.append(found["examples"])
    mean = jax.tree.map(lambda *values: float(np.average(np.stack(values), axis=0, weights=weights)), *shares or [{}])
    return Scored(task.scores(sums["counts"]), float(sums["fraction"] / sums["examples"]), np.concatenate(macs), mean)


def static_macs(twin: nnx.Module, x: Any, run: Callable | None = None) -> float:
    """MACs of `run(twin, x)`, by default of `twin(x)`, on one example of `x`, arrays or their shapes."""
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), x)
    return cost.macs(run or (lambda model, x: model(x)), twin, one)


def solve(
    model: nnx.Module, whole: float, budgets: Sequence[float], calibration: Iterable, run: Callable | None = None
) -> dict[float, Deployed]:
    """`dynjax.deploy` of `run(model, batch)` at several budgets, given as shares of `whole`, the static twin's MACs.

    A model's own full MACs are more: they hold its gates too.
    """
    solver = Solver(model, calibration, run)
    solver.spent(LOWEST)
    return {budget: solver.deploy(min(1.0, budget * whole / solver.full)) for budget in budgets}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A checkpoint at several budgets."""

    points: list[Point]
    latencies: list[Latency]
    """At every batch size that was asked for."""
    scored: dict[float, Scored]
    reports: dict[float, Report]
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
    task: Evaluates,
    *,
    static: bool,
    budgets: Sequence[float],
    calibration: Sequence[Arrays],
    batches: Callable[[], Iterable[Arrays]],
    timing: Sequence[Sequence[Arrays]],
    repeats: int = 1,
) -> Evaluation:
    """Deploy `model` at each budget, score it and time it against `twin`, the same net without dynamics.

    The twin's weights do not matter here. `batches()` starts a pass over the split. `timing` has for each batch size
    that is timed some batches of it, and the first size is 1; nothing is timed without. A `static` model has one
    budget, 1.
    """
    plain, state = make_runner(model, task), nnx.state(model)
    shapes = jax.eval_shape(plain.prepare, state, next(iter(batches())))
    whole = static_macs(twin, shapes, task.infer)
    prepared = [plain.prepare(state, batch) for batch in calibration]
    deployed = {} if static else solve(model, whole, budgets, prepared, task.infer)
    # The models inside: layers have the names there that they have in training.
    models = {budget: each.model for budget, each in deployed.items()} or {1.0: model}
    one = next(iter(models.values()))
    runner = make_runner(one, task)
    states = {budget: nnx.state(each) for budget, each in models.items()}
    scored = {budget: score(runner, state, batches(), task) for budget, state in states.items()}
    reports = {budget: each.report for budget, each in deployed.items()}

    twin_runner, twin_state = make_runner(twin, task), nnx.state(twin)
    functions: dict[Any, Callable] = {"static": lambda batch: twin_runner.infer(twin_state, batch)}
    functions |= {b: (lambda batch, s=s: runner.infer(s, batch)) for b, s in states.items() if not static}
    ready = [[plain.prepare(state, batch) for batch in each] for each in timing]
    wall, cpu = time.perf_counter(), time.process_time()
    times = [alternate(functions, each, repeats=repeats) for each in ready]
    cores = (time.process_time() - cpu) / (time.perf_counter() - wall) if times else float("nan")
    sizes = [jax.tree.leaves(each[0])[0].shape[0] for each in ready]
    latencies = [
        Latency(float(budget), size, *_medians(milliseconds, budget, size))
        for milliseconds, size in zip(times, sizes, strict=True)
        for budget in scored
    ]
    single = times[0] if times else None
    points = [_point(float(b), found, task, whole, single, reports.get(b)) for b, found in scored.items()]
    return Evaluation(points, latencies, scored, reports, runner, one, states, cores)


def _medians(milliseconds: dict[Any, np.ndarray], budget: float, batch: int) -> tuple[float, float, float]:
    """Milliseconds per example, the static twin's, and the speed-up. A static model is its own twin."""
    own, twin = (
        float(np.median(milliseconds.get(name, milliseconds["static"]))) / batch for name in (budget, "static")
    )
    return own, twin, twin / own


def _point(
    budget: float,
    found: Scored,
    task: Evaluates,
    whole: float,
    times: dict[Any, np.ndarray] | None,
    report: Report | None,
) -> Point:
    nan = float("nan")
    middle, twin, speedup = (nan, nan, nan) if times is None else _medians(times, budget, 1)
    return Point(
        budget=budget,
        score=float(found.scores[task.score]),
        pixel_accuracy=float(found.scores.get("pixel_accuracy", nan)),
        macs=float(found.macs.mean()),
        macs_fraction=float(found.macs.mean() / whole),
        latency_ms_p50=middle,
        latency_ms_p95=nan if times is None else float(np.percentile(times.get(budget, times["static"]), 95)),
        static_latency_ms_p50=twin,
        speedup=speedup,
        met=report is None or bool(report.met),
        macs_p95=float(np.percentile(found.macs, 95)),
        macs_max=float(found.macs.max()),
        static_macs=float(whole),
        images=len(found.macs),
    )


def shown(
    found: Evaluation,
    budget: float,
    source: Source,
    calibration: Source,
    batches: Callable[[Source], Iterable[dict[str, np.ndarray]]],
    *,
    title: str,
    twin: tuple[float, float] | None,
    batch_size: int,
) -> Shown:
    """What a task may draw of an evaluation at one of its budgets; `batches(source)` is a pass over a source.

    `batch_size` is that of the scores, so that nothing is compiled anew.
    """

    def ran(indices: list[int]) -> tuple[dict[str, np.ndarray], int, dict[str, Any]]:
        batch = stack([read(source, index) for index in indices])
        batch["valid"] = np.ones(len(indices), bool)
        # Repeated up to the batch size that is compiled already.
        size = max(batch_size, len(indices))
        filled = jax.tree.map(lambda each: np.resize(each, (size, *each.shape[1:])), batch)
        return batch, size, found.runner.examine(found.states[budget], filled)

    def examine(indices: list[int]) -> tuple[dict[str, np.ndarray], Output, np.ndarray]:
        batch, size, outcome = ran(indices)
        pictured = any(field.pixels for field in source.spec.values())
        heat = outcome["trace"].heatmap(size_of(source)) if pictured else np.zeros((size, 0))
        first = jax.tree.map(lambda each: np.asarray(each)[: len(indices)], (outcome["output"], heat))
        return batch, *first

    def decided(indices: list[int]) -> tuple[dict[str, np.ndarray], dict[str, Decision]]:
        parts = []
        for start in range(0, len(indices), batch_size):
            batch, size, outcome = ran(indices[start : start + batch_size])
            decisions = outcome["trace"].decisions.items()
            whole = {path: decision for path, decision in decisions if decision.keep.shape[0] == size}
            own = slice(len(batch["valid"]))
            parts.append((batch, jax.tree.map(lambda each, own=own: np.asarray(each)[own], whole)))
        return jax.tree.map(lambda *each: np.concatenate(each), *parts)

    model = nnx.merge(nnx.graphdef(found.model), found.states[budget])
    scored = found.scored[budget]
    return Shown(title, budget, source, calibration, model, scored.macs, scored.scores, twin, batches, examine, decided)
