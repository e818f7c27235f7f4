"""The model as it is used: thresholds solved for a budget, checked, measured; see `deployed` for how it is called.

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
from dynjax.core import check as checks
from dynjax.core import convolve, views
from dynjax.core.deployed import Deployed, apart, call_of, together
from dynjax.core.devices import automatic
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
    times: checks.Times | None = None
    """Milliseconds, if they were asked for."""

    def __str__(self) -> str:
        met = "met" if self.met else "NOT met"
        macs = (
            f"budget {self.budget:.0%} {met}: mean {self.mean / 1e6:.1f} MMAC ({self.mean / self.full:.1%} of "
            f"{self.full / 1e6:.1f}), p95 {self.p95 / 1e6:.1f}, max {self.max / 1e6:.1f}"
        )
        return macs if self.times is None else f"{macs}; {self.times}"


def deploy(
    model: nnx.Module,
    budget: float | int,
    calibration: Iterable,
    *,
    run: Callable[[Any, Any], Any] | None = None,
    method: str = "__call__",
    axis: str | None = None,
    check: bool = True,
    measure: bool = False,
) -> Deployed:
    """A copy of `model` whose mean MACs over `calibration` meet `budget`: call it as the model is, it is compiled.

    Args:
        model: a model with wrappers in it; it is not changed. The copy is set to evaluation, as `model.eval()` does.
        budget: share of the full MACs that may be spent on average, in (0, 1].
        calibration: batches of inputs like those to come, and not those to be tested on: each the model's one argument,
            an array or a tree of arrays, or a whole call, `(args, kwargs)`, a tuple and a dictionary. They may differ
            in size: the budget is what all of them may spend together, of what all of them would with everything kept.
        run: `run(model, batch)` is what is done with a batch, then any tree of arrays whose first axis is the examples;
            left out, the model is called.
        method: what of the model is called, in its place.
        axis: of a mesh, over which batches will be spread where the result is called inside of `jax.jit` on a mesh of
            Auto axes, which hide it. Elsewhere arrays say themselves how they lie.
        check: compare on the first batch masked and compact execution of every wrapper, and the model with everything
            kept with the same without wrappers.
        measure: time the first batch, static and compact, and every wrapper: see `Times`.

    Raises:
        ValueError: for a budget outside (0, 1], calibration that is no list of batches, less than all of a model that
            decides nothing, or a wrapper that gives something else when it skips.
    """
    solver = Solver(model, calibration, run, method=method)
    deployed = solver.deploy(budget, axis=axis)
    if budget < 1 and not solver.decides:
        raise ValueError(
            f"{type(model).__name__} decides nothing, so no budget can move it: wrap parts of it (dynjax.dynamize)"
        )
    if check and solver.decides:
        solver.check(deployed.report.threshold)
    if measure:
        times = solver.times(deployed)
        deployed.report = dataclasses.replace(deployed.report, times=times)
    return deployed


class Solver:
    """Solves several budgets of one model on the same calibration inputs, compiling once; see `deploy`."""

    def __init__(
        self,
        model: nnx.Module,
        calibration: Iterable,
        run: Callable[[Any, Any], Any] | None = None,
        *,
        method: str = "__call__",
    ):
        if hasattr(calibration, "shape"):
            raise ValueError(f"calibration is one array of shape {calibration.shape}: give a list of batches, [images]")
        self.batches = [_batch(x, whole=run is None) for x in calibration]
        if not self.batches:
            raise ValueError("calibration is empty: give at least one batch of inputs")
        self.model = convolve.by_platform(nnx.clone(views.still(model)))
        self._call = run or functools.partial(_called, method=method)
        self._method = method
        graphdef, self._state = nnx.split(self.model)

        @functools.partial(jax.jit, static_argnums=0)
        def measure(fixed, state, threshold, arrays):
            def run(state, threshold, arrays):
                args, kwargs = together(fixed, arrays)
                model = nnx.merge(graphdef, state, copy=True)
                budgets.set_threshold(model, threshold)
                trace = traced(self._call)(model, *args, **kwargs)[1]
                return trace.macs(), trace

            return automatic(run)(state, threshold, arrays)

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

    def share(self, threshold: float) -> float:
        """Mean of what is spent under `threshold`, as a share of the full MACs."""
        return float(self.spent(threshold).mean() / self.full)

    def _measured(self, threshold: float) -> list[Trace]:
        """The traces of all batches, whose MACs are remembered."""
        try:
            found = [self._run(fixed, self._state, threshold, arrays) for fixed, arrays in self.batches]
        except (TypeError, AttributeError) as error:
            raise ValueError(
                f"deploy: {type(self.model).__name__} cannot be called with a calibration batch: {error}. A batch is "
                "its one argument, or a whole call, such as ((images, mask), {'training': False}); or say with run= "
                "what to do with it"
            ) from error
        # In float64, where sums of MACs do not depend on the order of the batches.
        self._spent[threshold] = np.concatenate([np.asarray(macs, np.float64) for macs, _ in found])
        return [trace for _, trace in found]

    def deploy(self, budget: float | int, *, axis: str | None = None) -> Deployed:
        """As the function `deploy`, neither checked nor measured."""
        full = self.full
        threshold = budgets.solve_threshold(self.share, budget)
        spent = self.spent(threshold)
        mean = float(spent.mean())
        met = mean <= budget * full * (1 + 1e-6)
        p95, most = float(np.percentile(spent, 95)), float(spent.max())
        model = nnx.clone(views.compact(self.model))
        budgets.set_threshold(model, threshold)
        report = Report(float(budget), threshold, met, mean, p95, most, full)
        return Deployed(model, report, method=self._method, axis=axis)

    def check(self, threshold: float) -> None:
        """Compare masked and compact execution of every wrapper on the first batch, at `threshold` and half open; and
        with everything kept the model and the same without wrappers.

        Raises:
            ValueError: naming the wrapper whose answer changes when it skips, or saying that being wrapped does.
        """
        least = self.share(budgets.HIGHEST)
        # What skips nothing, or all, cannot be wrong: look where some of it is kept as well.
        half = budgets.solve_threshold(self.share, (1 + least) / 2) if least < 1 else threshold
        fixed, arrays = self.batches[0]
        checks.same_as_plain(self.model, self._call, fixed, arrays)
        checks.same(self.model, self._call, fixed, arrays, sorted({threshold, half}))

    def times(self, deployed: Deployed) -> checks.Times:
        """Milliseconds of the first batch, static and as `deployed`."""
        fixed, arrays = self.batches[0]
        return checks.times(self.model, deployed.model, self._call, fixed, arrays)


def _called(model: nnx.Module, *args: Any, method: str, **kwargs: Any) -> Any:
    return getattr(model, method)(*args, **kwargs)


def _batch(x: Any, *, whole: bool) -> tuple:
    """A calibration batch as a call, apart: one argument, or where `whole` is so a pair of a tuple and a dictionary."""
    fixed, arrays = call_of(x) if whole else apart((x,), {})
    arrays = [None if array is None else jnp.asarray(array) for array in arrays]
    empty = [array.shape for array in arrays if array is not None and not array.size]
    if empty:
        raise ValueError(f"a calibration batch has shape {empty[0]}, so there is nothing in it: leave it out")
    try:
        hash(fixed)
    except TypeError as error:
        raise ValueError(
            f"a calibration batch has what is neither an array nor a constant ({error}): give arrays, or say with run= "
            "what to do with it"
        ) from error
    return fixed, arrays
