"""The model as it is used: thresholds solved for a budget, compact execution, no noise.

Letters: B examples.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dynjax.core import budget as budgets
from dynjax.core import views
from dynjax.core.trace import Trace, traced


@dataclasses.dataclass(frozen=True)
class Report:
    """What a budget came to on the calibration inputs; MACs per example."""

    budget: float
    """Share of the full MACs that was asked for."""
    threshold: float
    """Logit that all gates compare with."""
    met: bool
    """Whether `mean` is within the budget."""
    mean: float
    p95: float
    max: float
    full: float
    """MACs of an example with everything kept, a mean like `mean` where pictures differ in size."""

    def __str__(self) -> str:
        met = "met" if self.met else "NOT met"
        return (
            f"budget {self.budget:.0%} {met}: mean {self.mean / 1e6:.1f} MMAC ({self.mean / self.full:.1%} of "
            f"{self.full / 1e6:.1f}), p95 {self.p95 / 1e6:.1f}, max {self.max / 1e6:.1f}"
        )


class Deployed(nnx.Module):
    """A model that skips for real: call it, alone or under `jax.jit`. `report` says what its budget came to.

    A call by itself is compiled, once for each shape of its arrays and each value of its other arguments.
    """

    def __init__(self, model: nnx.Module, report: Report):
        self.model, self.report = model, report

    def __call__(self, *args, **kwargs):
        leaves, tree = jax.tree.flatten((args, kwargs))
        arrays = [leaf if hasattr(leaf, "shape") and hasattr(leaf, "dtype") else None for leaf in leaves]
        # With their types: 1 equals True and 1.0.
        others = [None if array is not None else (type(leaf), leaf) for leaf, array in zip(leaves, arrays, strict=True)]
        graphdef, state = nnx.split(self.model)
        fixed = graphdef, tree, tuple(others)
        try:
            hash(fixed)
        except TypeError:  # nothing that is compiled could be found again
            return self.model(*args, **kwargs)
        output, changed = _compiled(fixed, state, arrays)
        nnx.update(self.model, changed)
        return output


@functools.partial(jax.jit, static_argnums=0)
def _compiled(fixed, state, arrays):
    """The output, and the variables that the call changed: decisions, while a trace is taken."""
    graphdef, tree, others = fixed
    leaves = [array if other is None else other[1] for array, other in zip(arrays, others, strict=True)]
    args, kwargs = tree.unflatten(leaves)
    return views.changed(nnx.merge(graphdef, state, copy=True), *args, **kwargs)


def deploy(
    model: nnx.Module, budget: float | int, calibration: Iterable, *, run: Callable[[Any, Any], Any] | None = None
) -> Deployed:
    """A copy of `model` whose mean MACs over `calibration` meet `budget`: call it, it is compiled.

    Args:
        model: a model with wrappers in it; it is not changed.
        budget: share of the full MACs that may be spent on average, in (0, 1].
        calibration: batches of inputs like those to come, and not those to be tested on. They may differ in size: the
            budget is what all of them may spend together, of what all of them would with everything kept.
        run: `run(model, batch)` is what is done with a batch, then any tree of arrays whose first axis is the examples;
            left out, batches are the model's input, an array.

    Raises:
        ValueError: for a budget outside (0, 1], calibration that is no list of batches, or less than all of a model
            without a decision.
    """
    solver = Solver(model, calibration, run)
    deployed = solver.deploy(budget)
    if budget < 1 and not solver.decides:
        raise ValueError(
            f"{type(model).__name__} decides nothing, so no budget can move it: wrap parts of it (dynjax.dynamize)"
        )
    return deployed


class Solver:
    """Solves several budgets of one model on the same calibration inputs, compiling once; see `deploy`."""

    def __init__(self, model: nnx.Module, calibration: Iterable, run: Callable[[Any, Any], Any] | None = None):
        if hasattr(calibration, "shape"):
            raise ValueError(f"calibration is one array of shape {calibration.shape}: give a list of batches, [images]")
        self.batches = []
        for x in calibration:
            if run is None and not hasattr(x, "shape"):
                raise ValueError(
                    f"a calibration batch is a {type(x).__name__}: each must be the model's input, an array, or say "
                    "with run= what to do with it"
                )
            batch = jax.tree.map(jnp.asarray, x)
            empty = [leaf.shape for leaf in jax.tree.leaves(batch) if not leaf.size]
            if empty:
                raise ValueError(f"a calibration batch has shape {empty[0]}, so there is nothing in it: leave it out")
            self.batches.append(batch)
        if not self.batches:
            raise ValueError("calibration is empty: give at least one batch of inputs")
        self.model = nnx.clone(views.still(model))
        graphdef, self._state = nnx.split(self.model)

        @jax.jit
        def measure(state, threshold, x):
            model = nnx.merge(graphdef, state, copy=True)
            budgets.set_threshold(model, threshold)
            trace = (traced(model)(x) if run is None else traced(run)(model, x))[1]
            return trace.macs(), trace

        self._run = measure
        self._spent: dict[float, np.ndarray] = {}
        traces = self._measured(budgets.LOWEST)
        self.decides = any(trace.decisions for trace in traces)
        """Whether the model decides anything."""
        examples = sum(trace.examples for trace in traces)
        self.full = sum(trace.full_macs * trace.examples for trace in traces) / examples
        """MACs of an example with everything kept; of batches of pictures of several sizes, the mean over examples."""

    def spent(self, threshold: float) -> np.ndarray:
        """MACs of every calibration example under `threshold`."""
        if threshold not in self._spent:
            self._measured(threshold)
        return self._spent[threshold]

    def _measured(self, threshold: float) -> list[Trace]:
        """The traces of all batches, whose MACs are remembered."""
        found = [self._run(self._state, threshold, x) for x in self.batches]
        # In float64, where sums of MACs do not depend on the order of the batches.
        self._spent[threshold] = np.concatenate([np.asarray(macs, np.float64) for macs, _ in found])
        return [trace for _, trace in found]

    def deploy(self, budget: float | int) -> Deployed:
        """As the function `deploy`."""
        full = self.full
        threshold = budgets.solve_threshold(lambda t: float(self.spent(t).mean() / full), budget)
        spent = self.spent(threshold)
        mean = float(spent.mean())
        met = mean <= budget * full * (1 + 1e-6)
        p95, most = float(np.percentile(spent, 95)), float(spent.max())
        model = nnx.clone(views.compact(self.model))
        budgets.set_threshold(model, threshold)
        return Deployed(model, Report(budget, threshold, met, mean, p95, most, full))
