"""The training objective of a model that decides: schedules, the step's budget, and what its modules add to the loss.

One for every task: what a kind of dynamics needs in training comes from its modules (`dynjax.core.training`).
Letters: B examples, K classes.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from dynjax.config import BudgetConfig, LossConfig
from dynjax.core import budget, training, views
from dynjax.core.trace import Trace, traced
from dynjax.core.training import Call, Predicts, Weighs
from dynjax.tasks.task import Batch, Loss, OnePlayer, Output, Progress


class Supervised(OnePlayer[nnx.Module]):
    """What tasks share whose model decides, and is told what its outputs should have been."""

    input: str
    """The key of what the model looks at."""
    losses: LossConfig
    budget: BudgetConfig | None
    """What the model may spend; None for a static model, which is not traced."""
    percent: ClassVar[bool] = True

    @abc.abstractmethod
    def average(self, outputs: Sequence[Output], batch: Batch) -> Float[Array, ""]:
        """The loss, a mean over what counts of the batch and over the outputs."""

    @abc.abstractmethod
    def each(self, outputs: Sequence[Output], batch: Batch) -> Float[Array, "B outputs"]:
        """The loss of every example by itself."""

    @abc.abstractmethod
    def valid(self, batch: Batch) -> Bool[Array, " B"]:
        """Which examples count."""

    @abc.abstractmethod
    def correct(self, output: Output, batch: Batch) -> Array:
        """How right the output is for each example, (B,): true and false, or a share."""

    def present(self, batch: Batch) -> Bool[Array, "B K"] | None:
        """Which classes each example has; None where there are no classes."""
        return None

    @abc.abstractmethod
    def metrics(self, outputs: Sequence[Output], batch: Batch) -> dict[str, Array]: ...

    def beside(self, model: nnx.Module, batch: Batch, key: PRNGKeyArray) -> tuple[dict[str, Array], dict[str, Array]]:
        """Further terms of the loss, weighted, for which the task runs the model once more, and metrics of them. It
        runs at the step's threshold, and what it spends is not charged."""
        return {}, {}

    def loss(self, model: nnx.Module, batch: Batch, key: PRNGKeyArray, progress: Progress) -> Loss:
        return objective(self, model, batch, key, progress)

    def infer(self, model: nnx.Module, batch: Batch) -> Output:
        """The logits of a batch."""
        return model(batch[self.input])


def run(model: nnx.Module, x: Array) -> list[Output]:
    """All outputs of a model that are trained."""
    return model.predictions(x) if isinstance(model, Predicts) else [model(x)]


def objective(task: Supervised, model: nnx.Module, batch: Batch, key: PRNGKeyArray, progress: Progress) -> Loss:
    """Loss and metrics of a batch; the model is in its training view, and its statistics and random counts move on.

    With a budget that is sampled, the target of the step is drawn from `key`, in [target, 1] and more often near
    `target`, and the gates' threshold moves with it; the model is left at the threshold of the row's own target, ready
    to be evaluated or saved.
    """
    training.schedule(model, progress)
    # Who weighs the outputs answers for what they cost.
    weighs = isinstance(model, Predicts) and any(isinstance(op, Weighs) for _, op in nnx.iter_modules(model))
    spends = None if weighs else task.budget
    target = aim(model, spends, key)
    more: dict[str, Array] = {}
    if task.budget is None and not weighs:
        outputs, trace = run(model, batch[task.input]), None
        task_loss = task.average(outputs, batch)
    else:
        outputs, trace = traced(run)(model, batch[task.input])
        task_loss, more = _contributed(task, model, batch, outputs, trace)
    terms, seen = task.beside(model, batch, key)
    more |= terms
    budget_loss, spent = charge(model, spends, trace, target, progress)
    loss = task_loss + budget_loss + sum(more.values(), jnp.float32(0))
    metrics = {"loss": loss, "task_loss": task_loss, "budget_loss": budget_loss, **more, **spent}
    metrics |= task.metrics(outputs, batch) | seen
    return loss, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}


def aim(model: nnx.Module, spends: BudgetConfig | None, key: PRNGKeyArray) -> Array | float:
    """The share of the MACs that this step may spend; where it is drawn, the gates' threshold moves to it."""
    target: Array | float = 1.0 if spends is None else spends.target
    if spends is not None and spends.sampled:
        # The square: low budgets are the hard ones, so they come more often.
        target = target + (1 - target) * jax.random.uniform(key) ** 2
        budget.set_threshold(model, budget.sampled_threshold(target))
    return target


def charge(
    model: nnx.Module, spends: BudgetConfig | None, trace: Trace | None, target: Array | float, progress: Progress
) -> tuple[Array | float, dict[str, Any]]:
    """The weighted loss on what a step spent that `aim`ed at `target`, and metrics; the threshold goes back to that of
    the row's own target."""
    if spends is not None and spends.sampled:
        budget.set_threshold(model, budget.sampled_threshold(spends.target))
    if spends is None or trace is None or not any(d.full_macs for d in trace.decisions.values()):
        return 0.0, {"macs_fraction": 1.0}
    spent = {"target": target, **budget.statistics(trace)}
    if training.rewarded(model):
        return 0.0, spent
    return spends.weight * budget.budget_loss(trace, target, budget.release(progress)), spent


def _contributed(
    task: Supervised, model: nnx.Module, batch: Batch, outputs: list[Output], trace: Trace
) -> tuple[Array, dict[str, Array]]:
    """The task's loss, its outputs weighed as the model's modules say, and the weighted terms that they add."""

    def again() -> tuple[Output, Trace]:
        found, trace = traced(run)(views.still(model), batch[task.input])
        return found[-1], trace

    options = dataclasses.asdict(task.losses)
    call = Call(
        trace=trace,
        outputs=outputs,
        valid=task.valid(batch),
        target=0.5 if task.budget is None else task.budget.target,
        losses=lambda outputs: task.each(outputs, batch),
        correct=lambda output: task.correct(output, batch),
        again=again,
        present=lambda: task.present(batch),
        weights={name: value for name, value in options.items() if isinstance(value, float)},
    )
    shares = training.weights(model, call) if isinstance(model, Predicts) else None
    if shares is None:
        loss = task.average(outputs, batch)
    else:
        loss = call.mean((shares * call.losses(outputs)).sum(-1))
    weight = call.weights["load_balance"]
    balance = {"load_balance": weight * budget.load_balance(trace)} if weight else {}
    return loss, balance | training.terms(model, dataclasses.replace(call, shares=shares))
