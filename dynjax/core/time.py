"""Time: a cell that is run once for each step of a sequence, under one `lax.scan`, its decisions taken anew each time.

Letters: B examples, T times.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from dynjax.core.decision import Decision, Linear, record, seen, unseen
from dynjax.core.execute import Tree


@runtime_checkable
class Recurrent(Protocol):
    """A module of one step: what comes in and what it carries, to what goes out and what it carries on."""

    def initial(self, examples: int, /) -> Tree:
        """What is carried into the first step: a tree of arrays whose first axis is the examples."""
        ...

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
    tracing, plain = hasattr(cell, "__captures__"), unseen(cell)
    by_time = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), x)
    moving = _moving(plain, jax.tree.map(lambda a: a[0], by_time), carry)
    graphdef, moved, *others = nnx.split(plain, lambda path, _: path in moving, ...)
    (fixed,) = others

    def step(loop: tuple, x: Tree) -> tuple[tuple, tuple]:
        carry, moved = loop
        own = nnx.merge(graphdef, moved, fixed, copy=True)
        run = seen if tracing else _unseen_run
        (y, carry), decisions = run(lambda cell, x, carry: cell(x, carry), own, x, carry)
        return (carry, nnx.state(own, lambda path, _: path in moving)), (y, decisions)

    (carry, moved), (y, decisions) = lax.scan(step, (carry, moved), by_time)
    if moving:
        nnx.update(cell, moved)
    modules = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(cell)}
    for path, decision in decisions.items():
        record(modules[path.split("#")[0]], _of_times(decision, times))
    return jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), y), carry


def _unseen_run(run, module, *args) -> tuple[Any, dict[str, Decision]]:
    return run(module, *args), {}


def _moving(cell: nnx.Module, x: Tree, carry: Tree) -> Sequence[tuple]:
    """The paths of the variables that one step changes."""
    graphdef, state = nnx.split(cell)
    found: list[tuple] = []

    def once(state: nnx.State, x: Tree, carry: Tree) -> None:
        own = nnx.merge(graphdef, state, copy=True)
        before = {path: variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(own))}
        own(x, carry)
        after = nnx.to_flat_state(nnx.state(own))
        found.extend(path for path, variable in after if variable.get_value() is not before.get(path))

    jax.eval_shape(once, state, x, carry)
    return found


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
