"""What a module brings to the training of a model that holds it, so that no task has to name it. B examples."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float

from dynjax.core.trace import Trace


@dataclasses.dataclass(frozen=True)
class Call:
    """What a training step knows of the model's call when the modules add to its loss."""

    trace: Trace
    outputs: list[Any]
    """One, or all `predictions` of a model that has several."""
    valid: Bool[Array, " B"]
    """Which examples count."""
    target: Float[Array, ""] | float
    """Share of the MACs that the step may spend."""
    losses: Callable[[list[Any]], Float[Array, "B outputs"]]
    correct: Callable[[Any], Bool[Array, " B"]]
    again: Callable[[], tuple[Any, Trace]]
    """The output and trace of another call without noise, under the same threshold."""
    weights: Mapping[str, float]
    """The options of LossConfig by name."""
    shares: Float[Array, "B outputs"] | None = None
    """How much each output counts, where a module weighs them."""


@runtime_checkable
class Scheduled(Protocol):
    """Changes with the progress of the training, from 0 to 1, before each step."""

    def schedule(self, progress: Float[Array, ""] | float, /) -> None: ...


@runtime_checkable
class Contributes(Protocol):
    """Has scalar losses of its own, by name. One whose name is an option of LossConfig is multiplied by that."""

    def terms(self, call: Call, /) -> dict[str, Float[Array, ""]]: ...


@runtime_checkable
class Weighs(Protocol):
    """Says how much each of several outputs counts; without it they count alike."""

    def weights(self, call: Call, /) -> Float[Array, "B outputs"] | None: ...
