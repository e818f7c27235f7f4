"""Classifiers with exits as papers evaluate them: every budget, and every exit, from one pass over a split.

Where to stop depends on an exit's own logits alone, so nothing has to be run again for another budget.
Letters: B batch, E exits, N pictures, K classes.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float

from dynjax.core import views
from dynjax.core.budget import solve_threshold
from dynjax.core.trace import traced
from dynjax.core.training import Predicts
from dynjax.ops import Exits
from dynjax.show import gallery, report
from dynjax.tasks.task import Shown


@dataclasses.dataclass(frozen=True)
class ExitOutputs:
    """What every exit said about every picture of a split."""

    correct: Bool[np.ndarray, "E N"]
    doubt: Float[np.ndarray, "E N"]
    """`Exits.doubt` of each exit: a picture goes on where it is at least the threshold."""
    macs: Float[np.ndarray, " E"]
    """MACs of a picture that stops at this exit."""

    def stops(self, threshold: float) -> np.ndarray:
        """The exit at which each picture stops, (N,)."""
        sure = self.doubt < threshold
        sure[-1] = True
        return sure.argmax(0)


@dataclasses.dataclass(frozen=True)
class ExitPoint:
    """One row of budgeted.csv or anytime.csv. MACs are per image, means over the split."""

    budget: float
    """Share of the MACs of all exits together that was asked for; nan of a single exit."""
    exit: float
    """The exit that all pictures take, from 0; nan where each takes its own."""
    score: float
    """Accuracy."""
    macs: float
    threshold: float


def find_exits(model: nnx.Module) -> Exits | None:
    """The exits of a model that has a method `predictions` and stops at one of them; None for another model."""
    found = [module for _, module in nnx.iter_modules(model) if isinstance(module, Exits)]
    fits = len(found) == 1 and isinstance(model, Predicts)
    return found[0] if fits and found[0].confidence != "patience" and found[0].size is None else None


def read_exits(model: nnx.Module, batches: Iterable[dict]) -> ExitOutputs:
    """Run all exits of `model`, in its evaluation view, on batches of image, label and `valid`.

    Raises:
        ValueError: for a model of which `find_exits` finds none.
    """
    if find_exits(model) is None or not isinstance(model, Predicts):
        raise ValueError(f"{type(model).__name__} has no method `predictions`, or does not stop at one of its exits")
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state: nnx.State, image: jax.Array) -> tuple:
        model = nnx.merge(graphdef, state)
        outputs = model.predictions(image)
        exits = find_exits(model)
        assert exits is not None
        return jnp.stack([x.argmax(-1) for x in outputs]), jnp.stack([exits.doubt(x) for x in outputs])

    correct, doubt = [], []
    for batch in batches:
        predicted, unsure = jax.device_get(run(state, batch["image"]))
        correct.append((predicted == batch["label"])[:, batch["valid"]])
        doubt.append(unsure[:, batch["valid"]])
    image = jax.ShapeDtypeStruct((1, *batch["image"].shape[1:]), batch["image"].dtype)
    trace = jax.eval_shape(lambda image: traced(nnx.merge(graphdef, state))(image)[1], image)
    (decision,) = trace.decisions.values()
    macs = trace.static_macs + np.cumsum(decision.cost.unit)
    return ExitOutputs(np.concatenate(correct, 1), np.concatenate(doubt, 1), macs)


def _point(outputs: ExitOutputs, stops: np.ndarray, **what: float) -> ExitPoint:
    score = float(outputs.correct[stops, np.arange(len(stops))].mean())
    return ExitPoint(score=score, macs=float(outputs.macs[stops].mean()), **what)


def budgeted(calibration: ExitOutputs, outputs: ExitOutputs, count: int = 40) -> list[ExitPoint]:
    """Budgeted batch classification (Huang et al. 2018, section 3): `count` budgets from the first exit's cost up.

    The threshold of each is solved on the held-out split `calibration` and kept on `outputs`. Deviation: one threshold
    for all exits, as everywhere in dynjax, and not one for each from a geometric distribution over the exits.
    """
    full = outputs.macs[-1]
    points = []
    for budget in np.linspace(outputs.macs[0] / full, 1, count):

        def spent(threshold: float) -> float:
            return float(calibration.macs[calibration.stops(threshold)].mean() / full)

        # A little above the first exit's own cost, which no threshold undercuts.
        threshold = solve_threshold(spent, min(1.0, float(budget) * (1 + 1e-6)), tolerance=0.002, trials=40)
        stops = outputs.stops(threshold)
        points.append(_point(outputs, stops, budget=float(budget), exit=float("nan"), threshold=threshold))
    return points


def anytime(outputs: ExitOutputs) -> list[ExitPoint]:
    """Anytime prediction (Huang et al. 2018, section 3): accuracy where every picture stops at the same exit."""
    exits, examples = outputs.correct.shape
    nan = float("nan")
    return [
        _point(outputs, np.full(examples, number), budget=nan, exit=float(number), threshold=nan)
        for number in range(exits)
    ]


def show(folder: Path, shown: Shown) -> str:
    """budgeted.csv, anytime.csv and exits.png; says what it wrote."""
    model = views.masked(shown.model)
    outputs = read_exits(model, shown.batches(shown.source))
    curves = {
        "budgeted": budgeted(read_exits(model, shown.batches(shown.calibration)), outputs),
        "anytime": anytime(outputs),
    }
    for name, points in curves.items():
        report.write_points(folder / f"{name}.csv", points)
    labels = {"budgeted": "budgeted batch: each picture its exit", "anytime": "anytime: one exit for all"}
    gallery.plot_exits(
        folder / "exits.png",
        {labels[name]: [(point.macs, point.score) for point in each] for name, each in curves.items()},
        static=shown.twin,
        title=shown.about,
    )
    return "budgeted.csv anytime.csv exits.png"
