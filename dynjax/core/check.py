"""Whether a model gives the same when it skips, and how long it takes: one wrapper at a time, on inputs of its own.

Letters: B examples.
"""

import dataclasses
import operator
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from dynjax.core import budget as budgets
from dynjax.core import views
from dynjax.core.arguments import name_of
from dynjax.core.decision import Decision, captured, seen, tracing
from dynjax.core.deployed import Fixed, together
from dynjax.core.devices import automatic
from dynjax.core.modules import outermost, passed_on, view
from dynjax.core.standing import Call, inputs, standing
from dynjax.core.wrapper import Wrapper

TOLERANCE = 1e-3
"""By which two executions may differ by rounding, as a share of the largest value; of 16-bit numbers see `_error`."""
TIED = 1e-3
"""Difference of a probability under which a decision may fall to the other side by rounding."""
ROUNDS = 9
"""Times that static and compact are timed, in turn."""


class Comparison(nnx.Variable):
    """What a `_Both` found, for the trace that captures it."""


class _Both(nnx.Module):
    """A wrapper, run in both executions on the same input; it gives the masked answer and records the difference."""

    def __init__(self, wrapper: Wrapper):
        self.wrapper = wrapper

    def __getattr__(self, name: str) -> Any:
        return passed_on(self, "wrapper", name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        (y, first), (z, second) = (
            seen(operator.call, view(self.wrapper, execution=execution), *args, **kwargs)
            for execution in ("masked", "compact")
        )
        if tracing(self):
            error = _error(y, z)
            tied, wrong = _flipped(first, second, error.shape[0])
            # Behind a decision that fell to the other side by rounding, outputs differ by right.
            self.sow(Comparison, "comparison", jnp.where(wrong, jnp.inf, jnp.where(tied, 0, error)))
        return y


def _error(y: Any, z: Any) -> Float[Array, " B"]:
    """The largest difference for each example, in rounding errors of 32-bit numbers that are allowed."""
    worst = jnp.zeros(jax.tree.leaves(y)[0].shape[0])
    for a, b in zip(jax.tree.leaves(y), jax.tree.leaves(z), strict=True):
        half = jnp.issubdtype(a.dtype, jnp.floating) and jnp.finfo(a.dtype).bits <= 16
        tolerance = 0.05 if half else TOLERANCE
        a, b = (each.astype(jnp.float32).reshape(each.shape[0], -1) for each in (a, b))
        size = jnp.max(jnp.abs(a), where=jnp.isfinite(a), initial=1e-30)
        difference = jnp.where((a == b) | (jnp.isnan(a) & jnp.isnan(b)), 0, jnp.abs(a - b) / size)
        worst = jnp.maximum(worst, jnp.nan_to_num(difference, nan=jnp.inf).max(1, initial=0) / tolerance)
    return worst


def _flipped(
    first: dict[str, Decision], second: dict[str, Decision], examples: int
) -> tuple[Bool[Array, " B"], Bool[Array, " B"]]:
    """For each example, whether a decision is another one because it was a tie, and because its input was another."""
    tied = wrong = jnp.zeros((examples,), bool)
    for path, decision in first.items():
        other = second[path]
        differs = (decision.keep != other.keep).reshape(examples, -1)
        far = (jnp.abs(decision.probability - other.probability) > TIED).reshape(examples, -1)
        tied, wrong = tied | (differs & ~far).any(1), wrong | (differs & far).any(1)
    return tied, wrong


def same(model: nnx.Module, call: Call, fixed: Fixed, arrays: Sequence[Any], thresholds: Sequence[float]) -> None:
    """Compare masked and compact execution of every outermost wrapper of `model`, which evaluates, on one batch.

    Raises:
        ValueError: naming the first wrapper that gives something else when it skips.
    """
    own = nnx.clone(model)
    wrappers = outermost(own, Wrapper)
    probed = standing(own, {id(wrapper): _Both(wrapper) for wrapper in wrappers.values()})
    graphdef, state = nnx.split(probed)

    @jax.jit
    def run(state: nnx.State, threshold: Array, arrays: Sequence[Any]) -> dict[str, Array]:
        def compare(state, threshold, arrays):
            own = nnx.merge(graphdef, state, copy=True)
            budgets.set_threshold(own, threshold)
            args, kwargs = together(fixed, arrays)
            return captured(Comparison, call, own, *args, **kwargs)[1]

        return automatic(compare)(state, threshold, arrays)

    for threshold in thresholds:
        for path, errors in run(state, threshold, arrays).items():
            errors = np.asarray(errors)
            if errors.max(initial=0) <= 1:
                continue
            wrapper = wrappers[path.split("#")[0]]
            by = f"by {errors.max() * TOLERANCE:.2g} of its size" if np.isfinite(errors.max()) else "beyond all bounds"
            block = name_of(wrapper.whole() or wrapper)
            raise ValueError(
                f"deploy: {type(wrapper).__name__} at {path.split('#')[0] or 'the top'!r} gives something else when it "
                f"skips: on calibration example {errors.argmax()} its compact output differs from the masked one {by}, "
                f"at threshold {threshold:.3g}. {block} must treat each example, and for tiles each pixel, on "
                "its own: statistics of the batch, circular borders or noise in it are wrong where only a part is "
                "computed. Wrap the layers around it, or say batched= where an argument was taken for one of the "
                "examples; check=False deploys it all the same"
            )


def same_as_plain(model: nnx.Module, call: Call, fixed: Fixed, arrays: Sequence[Any]) -> None:
    """Compare `model` with everything kept and the same without its wrappers, where these are all around one block.

    Raises:
        ValueError: if they differ, since the model treats a wrapped block otherwise than the block itself.
    """
    kept = nnx.clone(model)
    budgets.set_threshold(kept, budgets.LOWEST)
    plain = _without_gates(nnx.clone(kept))
    if not isinstance(plain, nnx.Module) or outermost(plain, Wrapper):
        return
    graphdefs, states = zip(*map(nnx.split, (kept, plain)), strict=True)

    @jax.jit
    def run(states: Any, arrays: Sequence[Any]) -> Array:
        def compare(states, arrays):
            args, kwargs = together(fixed, arrays)
            whole, alone = (nnx.merge(each, state, copy=True) for each, state in zip(graphdefs, states, strict=True))
            y, decisions = seen(call, whole, *args, **kwargs)
            z = call(alone, *args, **kwargs)
            pairs = zip(jax.tree.leaves(y), jax.tree.leaves(z), strict=True)
            error = jnp.stack([_error(a.reshape(1, -1), b.reshape(1, -1)).max() for a, b in pairs]).max()
            # A gate of the user's may keep less, whatever its threshold is.
            least = [each.keep.min() for each in decisions.values()]
            return jnp.where(jnp.stack([jnp.ones(()), *least]).min() == 1, error, 0)

        return automatic(compare)(states, arrays)

    if float(run(states, arrays)) > 1:
        paths = ", ".join(list(outermost(kept, Wrapper))[:3])
        raise ValueError(
            f"deploy: with everything kept {type(model).__name__} gives something else than without its wrappers "
            f"({paths or 'the top'}): it treats a wrapped block otherwise than the block itself, for "
            "instance where it asks isinstance(layer, Block) to know what to call it with; wrap inside of what it asks "
            "about, or let it ask for wrapper.block; check=False deploys it all the same"
        )


# Time


@dataclasses.dataclass(frozen=True)
class Times:
    """Median milliseconds of one batch, timed in turn in one process."""

    examples: int
    """Of the batch."""
    static: float
    """Without gates: the blocks of `Skip` and `Tiles` alone, and all of what has no such block."""
    compact: float
    wrappers: tuple[tuple[str, float, float], ...]
    """Path, static and compact, of each `Skip` and `Tiles`, on what it is given in the model."""

    @property
    def slower(self) -> tuple[tuple[str, float, float], ...]:
        """The wrappers where skipping costs time."""
        return tuple(each for each in self.wrappers if each[2] > each[1])

    def __str__(self) -> str:
        text = (
            f"static {self.static:.2f} ms, compact {self.compact:.2f} ms for {self.examples} examples "
            f"({self.static / self.compact:.2f}x)"
        )
        slower = ", ".join(
            f"{path or 'the top'} ({plain:.2f} ms whole, {fast:.2f})" for path, plain, fast in self.slower
        )
        return f"{text}; skipping costs time, so leave whole: {slower}" if slower else text


def times(model: nnx.Module, compact: nnx.Module, call: Call, fixed: Fixed, arrays: Sequence[Any]) -> Times:
    """How long `model`, which is masked, takes without its gates, and `compact`, the same as it is deployed."""
    whole = nnx.clone(views.masked(model))
    budgets.set_threshold(whole, budgets.LOWEST)
    whole = _without_gates(whole)
    static, fast = _in_turn(_run(whole, call, fixed, arrays), _run(compact, call, fixed, arrays))
    wrappers, found = outermost(compact, Wrapper), []
    listening = nnx.clone(compact)
    for path, (own, given) in inputs(listening, outermost(listening, Wrapper), call, fixed, arrays).items():
        plain = wrappers[path].whole()
        if plain is not None:
            alone, skipping = (_run(each, operator.call, own, given) for each in (plain, wrappers[path]))
            of_block, of_wrapper = _in_turn(alone, skipping)
            found.append((path, of_block, of_wrapper))
    (examples,) = {array.shape[0] for array in arrays if array is not None and array.ndim} or {1}
    return Times(examples, static, fast, tuple(found))


def _without_gates(model: Any) -> Any:
    """`model` with the blocks of its wrappers in their places, where one block is all that there is to run."""
    while isinstance(model, nnx.Module):
        blocks = {id(each): each.whole() for each in outermost(model, Wrapper).values()}
        new = {each: block for each, block in blocks.items() if block is not None}
        if not new:
            break
        model = standing(model, new)
    return model


def _run(model: Any, call: Call, fixed: Fixed, arrays: Sequence[Any]) -> Callable[[], Any]:
    """One call, compiled."""
    parts = nnx.split(model) if isinstance(model, nnx.Module) else None

    @jax.jit
    def run(state: Any, arrays: Sequence[Any]) -> Any:
        args, kwargs = together(fixed, arrays)
        return call(model if parts is None else nnx.merge(parts[0], state, copy=True), *args, **kwargs)

    return lambda: jax.block_until_ready(run(None if parts is None else parts[1], arrays))


def _in_turn(*runs: Callable[[], Any]) -> list[float]:
    """Median milliseconds of each, once warm."""
    for run in runs:
        run()
    taken: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for run, own in zip(runs, taken, strict=True):
            start = time.perf_counter()
            run()
            own.append(1e3 * (time.perf_counter() - start))
    return [float(np.median(own)) for own in taken]
