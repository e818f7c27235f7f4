"""The training objective of a model that decides: schedules, the step's budget, and what its modules add to the loss.

One for every task: what a kind of dynamics needs in training comes from its modules (`dynjax.core.training`).
Letters: B examples.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from dynjax.config import BudgetConfig, LossConfig
from dynjax.core import budget, views
from dynjax.core.trace import Trace, traced
from dynjax.core.training import Call, Contributes, Scheduled, Weighs
from dynjax.tasks.adapters import adapters
from dynjax.tasks.task import Batch, Loss, Output, Progress


@runtime_checkable
class Predicts(Protocol):
    """A model with several outputs, all of which are trained: exits, or the states of a block applied again."""

    def predictions(self, x: jax.Array, /) -> list[jax.Array]: ...


@runtime_checkable
class Supervised(Protocol):
    """What a task says of a model's outputs."""

    @property
    def losses(self) -> LossConfig: ...

    @property
    def budget(self) -> BudgetConfig | None: ...

    def average(self, outputs: Sequence[Output], batch: Batch, /) -> Float[Array, ""]:
        """The loss, a mean over what counts of the batch and over the outputs."""
        ...

    def each(self, outputs: Sequence[Output], batch: Batch, /) -> Float[Array, "B outputs"]:
        """The loss of every example by itself."""
        ...

    def valid(self, batch: Batch, /) -> Bool[Array, " B"]:
        """Which examples count."""
        ...

    def correct(self, output: Output, batch: Batch, /) -> Bool[Array, " B"]: ...

    def metrics(self, outputs: Sequence[Output], batch: Batch, /) -> dict[str, Array]: ...


def run(model: nnx.Module, batch: Batch) -> list[Output]:
    """All outputs that are trained of a model of pictures."""
    return model.predictions(batch["image"]) if isinstance(model, Predicts) else [model(batch["image"])]


def mean_of(each: Float[Array, " B"], valid: Bool[Array, " B"]) -> Float[Array, ""]:
    """The mean over the examples that count; 0 if none does."""
    return jnp.where(valid, each, 0).sum() / jnp.maximum(valid.sum(), 1)


def objective(task: Supervised, model: nnx.Module, batch: Batch, key: PRNGKeyArray, progress: Progress) -> Loss:
    """Loss and metrics of a batch; the model is in its training view, and its statistics and random counts move on.

    With a budget that is sampled, the target of the step is drawn from `key`, in [target, 1] and more often near
    `target`, and the gates' threshold moves with it; the model is left at the threshold of the row's own target, ready
    to be evaluated or saved.
    """
    ops: list[Any] = [module for _, module in nnx.iter_modules(model)]
    ops += adapters(model, ops)
    for op in ops:
        if isinstance(op, Scheduled):
            op.schedule(progress)
    weighing = [op for op in ops if isinstance(op, Weighs)] if isinstance(model, Predicts) else []
    # Who weighs the outputs answers for what they cost.
    spends = None if weighing else task.budget
    target: Array | float = 0.5 if task.budget is None else task.budget.target
    if spends is not None and spends.sampled:
        # The square: low budgets are the hard ones, so they come more often.
        target = target + (1 - target) * jax.random.uniform(key) ** 2
        budget.set_threshold(model, budget.sampled_threshold(target))
    if task.budget is None and not weighing:
        outputs, trace = run(model, batch), None
    else:
        outputs, trace = traced(run)(model, batch)
    more: dict[str, Array] = {}
    shares = None
    if trace is not None:
        call = _call(task, model, batch, outputs, trace, target)
        shares = next((op.weights(call) for op in weighing), None)
        more = _terms(ops, dataclasses.replace(call, shares=shares))
    if spends is not None and spends.sampled:
        budget.set_threshold(model, budget.sampled_threshold(spends.target))
    spent: dict[str, Any] = {"macs_fraction": 1.0}
    budget_loss: Array | float = 0.0
    if spends is not None and trace is not None and any(d.full_macs for d in trace.decisions.values()):
        spent = {"target": target, **budget.statistics(trace)}
        if spends.weight:
            budget_loss = spends.weight * budget.budget_loss(trace, target, budget.release(progress))
    if shares is None:
        task_loss = task.average(outputs, batch)
    else:
        task_loss = mean_of((shares * task.each(outputs, batch)).sum(-1), task.valid(batch))
    loss = task_loss + budget_loss + sum(more.values(), jnp.float32(0))
    metrics = {"loss": loss, "task_loss": task_loss, "budget_loss": budget_loss, **more, **spent}
    metrics |= task.metrics(outputs, batch)
    return loss, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}


def _call(
    task: Supervised, model: nnx.Module, batch: Batch, outputs: list[Output], trace: Trace, target: Array | float
) -> Call:
    options = dataclasses.asdict(task.losses)

    def again() -> tuple[Output, Trace]:
        found, trace = traced(run)(views.still(model), batch)
        return found[-1], trace

    return Call(
        trace=trace,
        outputs=outputs,
        valid=task.valid(batch),
        target=target,
        losses=lambda outputs: task.each(outputs, batch),
        correct=lambda output: task.correct(output, batch),
        again=again,
        weights={name: value for name, value in options.items() if isinstance(value, float)},
    )


def _terms(ops: list[Any], call: Call) -> dict[str, Array]:
    """What the modules add to the loss: the mean of each term over those that have it, times its option's weight."""
    found = {"load_balance": [budget.load_balance(call.trace)]} if call.weights["load_balance"] else {}
    for op in ops:
        if isinstance(op, Contributes):
            for name, term in op.terms(call).items():
                found.setdefault(name, []).append(term)
    means = {name: jnp.stack(each).mean() if len(each) > 1 else each[0] for name, each in found.items()}
    weighed = {name: call.weights.get(name, 1.0) for name in means}
    return {name: weighed[name] * each for name, each in means.items() if weighed[name]}
