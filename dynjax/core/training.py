"""What modules contribute to training: schedules, terms of the loss, weights of outputs; so no task names an op.

A task calls `schedule` before the model, then `weights` and `terms` with what it knows of the step.

Letters: B examples, n outputs, K classes.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from dynjax.core.decision import Decision
from dynjax.core.trace import Trace


@dataclasses.dataclass(frozen=True)
class Call:
    """What a training step knows of its call of the model."""

    trace: Trace
    outputs: list[Any]
    """What the model gave, or its several predictions, the last being the one that counts."""
    valid: Bool[Array, " B"]
    """Which examples count."""
    target: float
    """The budget that the model is trained for, as a share of its full MACs."""
    losses: Callable[[list[Any]], Float[Array, "B n"]]
    """Each example's loss of each of several outputs."""
    correct: Callable[[Any], Array]
    """How right an output is for each example, (B,): true and false, or a share."""
    again: Callable[[], tuple[Any, Trace]]
    """Runs the model once more, without noise and under the same threshold."""
    weights: Mapping[str, float]
    """The options of the loss by name."""
    present: Callable[[], Bool[Array, "B K"] | None] = lambda: None
    """Which classes each example has; None where the task has none."""
    shares: Float[Array, "B n"] | None = None
    """What a module said of the outputs' weights, which it need not work out again for its terms."""
    path: str = ""
    """Where the module that is asked stands in the model."""

    def own(self, trace: Trace | None = None) -> list[Decision]:
        """The decisions of the module that is asked, one for each time that it was called, in this trace or another."""
        found = (self.trace if trace is None else trace).decisions
        return [decision for path, decision in found.items() if path.split("#")[0] == self.path]

    def mean(self, each: Float[Array, " B"]) -> Float[Array, ""]:
        """Mean over the examples that count."""
        return jnp.where(self.valid, each, 0).sum() / jnp.maximum(self.valid.sum(), 1)


@runtime_checkable
class Predicts(Protocol):
    """A model that has several predictions of one thing, and is trained on all of them: exits, steps, networks."""

    def predictions(self, *inputs: Array) -> list[Array]:
        """The first first; the last is that of the whole model."""
        ...


@runtime_checkable
class Scheduled(Protocol):
    """A module that trains differently in the course of the training."""

    def schedule(self, progress: Float[Array, ""] | float, /) -> None:
        """Make ready for a step at `progress`, 0 to 1."""


@runtime_checkable
class Contributes(Protocol):
    """A module with losses of its own."""

    def terms(self, call: Call, /) -> dict[str, Array]:
        """Scalars by name, not weighted yet."""


@runtime_checkable
class Weighs(Protocol):
    """A module that says how much each of several outputs counts."""

    def weights(self, call: Call, /) -> Float[Array, "B n"] | None:
        """Weights of the outputs' losses; None: they count alike."""


@runtime_checkable
class Rewarded(Protocol):
    """A module whose terms may say what compute is worth."""

    def rewarded(self) -> bool:
        """Whether they do, so that a loss on the budget must not."""


def _modules(model: nnx.Module, kind: type) -> Iterator[tuple[str, Any]]:
    for path, module in nnx.iter_modules(model):
        if issubclass(type(module), kind):  # of its class: an instance may have an array of such a name
            yield "/".join(map(str, path)), module


def schedule(model: nnx.Module, progress: Float[Array, ""] | float) -> None:
    """Make all that is `Scheduled` in `model` ready for a step."""
    for _, module in _modules(model, Scheduled):
        module.schedule(progress)


def rewarded(model: nnx.Module) -> bool:
    """Whether something in `model` says itself what compute is worth."""
    return any(module.rewarded() for _, module in _modules(model, Rewarded))


def weights(model: nnx.Module, call: Call) -> Float[Array, "B n"] | None:
    """How much each of the outputs counts; None: alike."""
    found = (module.weights(dataclasses.replace(call, path=path)) for path, module in _modules(model, Weighs))
    return next((each for each in found if each is not None), None)


def terms(model: nnx.Module, call: Call) -> dict[str, Array]:
    """The scalars that all of `model` contributes, by name; where several contribute one, their mean.

    A term whose name is in `call.weights` is multiplied by that, and left out where it is 0.
    """
    found: dict[str, list[Array]] = {}
    for path, module in _modules(model, Contributes):
        for name, term in module.terms(dataclasses.replace(call, path=path)).items():
            found.setdefault(name, []).append(term)
    means = {name: jnp.stack(each).mean() for name, each in found.items() if call.weights.get(name, 1)}
    return {name: call.weights[name] * term if name in call.weights else term for name, term in means.items()}
