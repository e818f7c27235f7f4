"""What every task does with a budget: draw the step's target, run the model under it, and weigh what it spent."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from dynjax.config import BudgetConfig, LossConfig
from dynjax.core import budget, trace
from dynjax.core.gates import Threshold
from dynjax.ops.experts import router_z_loss


def steers(model: nnx.Module) -> bool:
    """Whether there is something in `model` that a budget can move."""
    return any(isinstance(each, Threshold) for _, each in nnx.iter_graph(model))


def auxiliary(losses: LossConfig, model: nnx.Module, decisions: trace.Trace) -> dict[str, Array]:
    """The weighted losses that keep branches and experts in use."""
    terms = {
        "load_balance": (losses.load_balance, lambda: budget.load_balance(decisions)),
        "router_z": (losses.router_z, lambda: router_z_loss(model)),
    }
    return {name: weight * term() for name, (weight, term) in terms.items() if weight}


def within_budget(
    run: Callable,
    model: nnx.Module,
    image: Array,
    spends: BudgetConfig,
    key: PRNGKeyArray,
    progress: Float[Array, ""] | float,
) -> tuple[Any, trace.Trace, dict[str, Any], Float[Array, ""]]:
    """What `run(model, image)` gives, its trace, what it cost (`budget.statistics` and the step's target), and the
    weighted budget loss.

    With a budget that is sampled, the target of the step is drawn from `key`, in [target, 1] and more often near
    `target`, and the gates' threshold moves with it; the model is left at the threshold of the row's own target, ready
    to be evaluated or saved.
    """
    target: Array | float = spends.target
    if spends.sampled:
        # The square: low budgets are the hard ones, so they come more often.
        target = target + (1 - target) * jax.random.uniform(key) ** 2
        budget.set_threshold(model, budget.sampled_threshold(target))
    output, decisions = trace.traced(run)(model, image)
    if spends.sampled:
        budget.set_threshold(model, budget.sampled_threshold(spends.target))
    loss = spends.weight * budget.budget_loss(decisions, target, budget.release(progress))
    return output, decisions, {"target": target, **budget.statistics(decisions)}, loss
