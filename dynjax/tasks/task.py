"""What a task is: players that learn, and an evaluation. Letters: B examples, N pictures of a split."""

import abc
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeAlias, TypeVar, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Num, PRNGKeyArray

from dynjax.config import BudgetConfig, OptimizerConfig
from dynjax.core.decision import Decision
from dynjax.data.source import Source

M = TypeVar("M", contravariant=True)
"""The models that a task takes, such as nnx.Module."""
Batch: TypeAlias = Mapping[str, jax.Array]
"""Arrays by name, whose first axis is the examples."""
Output: TypeAlias = Any
"""Whatever the task's `infer` gives: a tree of arrays."""
Progress: TypeAlias = Float[Array, ""] | float
"""Share of the training that is over."""
Loss: TypeAlias = tuple[Float[Array, ""], dict[str, Array]]
"""A scalar, and metrics by name."""
Scores: TypeAlias = dict[str, Any]
"""Numbers, and lists of numbers, by name."""


@dataclasses.dataclass(frozen=True)
class Player(Generic[M]):
    """One that learns: a loss and the parameters that it changes. Adversarial training has two, most tasks one."""

    name: str
    loss: Callable[[M, Batch, PRNGKeyArray, Progress], Loss]
    """Of the model in its training view, a batch and a random key of this step."""
    parameters: nnx.filterlib.Filter = nnx.Param
    """Which of the model's `nnx.Param` are its own."""
    every: int = 1
    """It plays at every so many steps, the first among them."""
    optimizer: OptimizerConfig | None = None
    """The row's where it has none; `ema` and `accumulate` are always the row's."""
    teach: Callable[[M, Batch], Batch] | None = None
    """What the averaged model, as it is evaluated, adds to a batch before the loss sees it; of `ema` 0 the model as it
    is. No gradient goes through it."""


@runtime_checkable
class Learns(Protocol):
    """What training needs of a task."""

    @property
    def players(self) -> tuple[Player, ...]:
        """In the order in which they play in a step; each sees what those before it have learnt."""


@runtime_checkable
class Evaluates(Protocol[M]):
    """What is needed to run a model on a split and to say how well it did."""

    @property
    def score(self) -> str:
        """The one of the `scores` that counts."""

    @property
    def score_name(self) -> str:
        """Its name in tables."""

    @property
    def percent(self) -> bool:
        """Whether it is a share, which tables show in percent."""

    @property
    def timed(self) -> tuple[int, ...]:
        """Batch sizes at which `infer` is timed unless others are asked for; none where users do not run `infer`."""

    def prepare(self, model: M, batch: Batch, /) -> Batch:
        """The batch with what is derived from it; no work of the model's."""

    def infer(self, model: M, batch: Batch, /) -> Output:
        """What a user gets of a prepared batch: the only thing that is traced, costed and timed."""

    def counts(self, model: M, output: Output, batch: Batch, /) -> Num[Array, "..."]:
        """What `scores` takes the sum of over batches, without the blank examples that fill the last one up."""

    def scores(self, counts: np.ndarray, /) -> Scores: ...


@runtime_checkable
class Task(Learns, Evaluates[M], Protocol[M]):
    """What a row trains and `experiments.evaluate` evaluates."""

    @property
    def budget(self) -> BudgetConfig | None:
        """What the model may spend; None where no gates learn."""

    def show(self, folder: Path, shown: "Shown", /) -> str:
        """Draw into the folder what there is to see, and say it in a line: files and figures."""


class Troubled(Exception):
    """Training has gone wrong since the last evaluation; the message says how."""


@runtime_checkable
class Watches(Protocol):
    """A task whose training can go wrong in ways that its loss does not show."""

    def trouble(self, scores: Scores, before: Scores | None, /) -> str:
        """What has gone wrong since an evaluation before, in words; empty where nothing has."""

    def remarks(self, scores: Scores, spent: float, /) -> list[str]:
        """What to look at, where a share `spent` of the MACs was spent; empty where all is as it should be."""


@runtime_checkable
class Pictures(Protocol[M]):
    """A task whose model draws pictures by itself, to be looked at while it learns."""

    def pictures(self, model: M, count: int, /) -> np.ndarray:
        """So many pictures (N, H, W, 3), uint8, the same noise always."""


class OnePlayer(abc.ABC, Generic[M]):
    """What tasks share in which the model learns as a whole, from batches as they come."""

    @abc.abstractmethod
    def loss(self, model: M, batch: Batch, key: PRNGKeyArray, progress: Progress) -> Loss:
        """Loss and metrics of a batch."""

    @property
    def players(self) -> tuple[Player, ...]:
        return (Player("model", self.loss),)

    def prepare(self, model: M, batch: Batch) -> Batch:
        return batch


@dataclasses.dataclass(frozen=True)
class Shown:
    """An evaluated model, as `Task.show` draws it: at one of its budgets."""

    about: str
    """What was evaluated on what."""
    budget: float
    source: Source
    """The split that was evaluated."""
    calibration: Source
    """The split on which thresholds were solved."""
    model: nnx.Module
    macs: Float[np.ndarray, " N"]
    """MACs of each example of the source."""
    scores: Scores
    twin: tuple[float, float] | None
    """MACs and score of the static twin; None where it is not trained."""
    batches: Callable[[Source], Iterable[dict[str, np.ndarray]]]
    """A pass over a source in batches."""
    examine: Callable[[list[int]], tuple[dict[str, np.ndarray], Output, Float[np.ndarray, "..."]]]
    """Some examples of the source, what the model gives of them, and of pictures `Trace.heatmap`."""
    decided: Callable[[list[int]], tuple[dict[str, np.ndarray], dict[str, Decision]]]
    """Some examples of the source, and what was decided about each, by the decisions' paths."""

    @property
    def title(self) -> str:
        """What was evaluated on what, and the budget."""
        return f"{self.about}, budget {self.budget:g}"
