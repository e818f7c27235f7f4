"""Time: a cell that is run once for each step of a sequence, under one `lax.scan`, its decisions taken anew each time.

Letters: B examples, T times.
"""

import dataclasses
import operator
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from dynjax.core import views
from dynjax.core.arguments import Tree
from dynjax.core.decision import Decision, Linear, record_inside, seen, tracing, unseen


@runtime_checkable
class Recurrent(Protocol):
    """A module of one step: what comes in and what it carries, to what goes out and what it carries on."""

    def initial(self, examples: int, /) -> Tree:
        """What is carried into the first step: a tree of arrays whose first axis is the examples."""

    def __call__(self, x: Tree, carry: Tree, /) -> tuple[Tree, Tree]: ...


def scan(cell: Recurrent, x: Tree, carry: Tree | None = None) -> tuple[Tree, Tree]:
    """`cell` along the second axis of `x`, arrays (B, T, ...): what it gave each time, (B, T, ...), and the last carry.

    `carry` is what a part before left; `cell.initial(B)` if left out. Decisions per example come out of the loop with
    their times: place "time", (B, T) or (B, T, K), whose units cost what they cost once. Noise of gates and statistics
    move on from time to time.

    Raises:
        ValueError: if the arrays of `x` do not agree in B and T, or the cell is no module or decides about anything but
            whole examples.
    """
    if not isinstance(cell, nnx.Module):
        raise ValueError(f"scan: {type(cell).__name__} is no nnx.Module, so its decisions would have no name")
    sizes = {a.shape[:2] for a in jax.tree.leaves(x)}
    if len(sizes) != 1 or len(min(sizes)) != 2:
        raise ValueError(f"scan: all arrays must have the same first axes (B, T), these have {sorted(sizes)}")
    examples, times = jax.tree.leaves(x)[0].shape[:2]
    carry = cell.initial(examples) if carry is None else carry
    traces, by_time = tracing(cell), jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), x)
    graphdef, state = nnx.split(unseen(cell))

    def changes(state: nnx.State, x: Tree, carry: Tree) -> nnx.State:
        return views.changed(nnx.merge(graphdef, state, copy=True), x, carry)[1]

    first = jax.tree.map(lambda a: a[0], by_time)
    moving = {path for path, _ in nnx.to_flat_state(jax.eval_shape(changes, state, first, carry))}
    moved, fixed = nnx.split_state(state, lambda path, _: path in moving, ...)

    def step(loop: tuple, x: Tree) -> tuple[tuple, tuple]:
        carry, moved = loop
        own = nnx.merge(graphdef, moved, fixed, copy=True)
        (y, carry), decisions = seen(operator.call, own, x, carry) if traces else (own(x, carry), {})
        return (carry, nnx.state(own, lambda path, _: path in moving)), (y, decisions)

    (carry, moved), (y, decisions) = lax.scan(step, (carry, moved), by_time)
    nnx.update(cell, moved)
    record_inside(cell, {path: _of_times(decision, times) for path, decision in decisions.items()})
    return jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), y), carry


def _of_times(decision: Decision, times: int) -> Decision:
    """A decision of every time, (T, B, ...), as one about all of them."""
    if decision.place != "example" or not isinstance(decision.cost, Linear):
        raise ValueError(
            f"scan: a cell decides about whole examples, at a linear cost; this one decides per {decision.place}, at "
            f"{type(decision.cost).__name__}: put that outside of the cell"
        )
    keep, probability = (jnp.swapaxes(a, 0, 1) for a in (decision.keep, decision.probability))
    cost = dataclasses.replace(decision.cost, whole=tuple(times * macs for macs in decision.cost.whole))
    return dataclasses.replace(
        decision, keep=keep, probability=probability, place="time", cost=cost, excluded=times * decision.excluded
    )
