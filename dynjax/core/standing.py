"""Modules that stand in the places of others for a call, to see what these are given and what they make of it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from dynjax.core.decision import captured, tracing
from dynjax.core.deployed import Fixed, apart, together
from dynjax.core.modules import passed_on, replace

Call = Callable[..., Any]
"""`call(model, *args, **kwargs)`: what is done with a batch."""


class Inputs(nnx.Variable):
    """What a `_Listening` was called with."""


class _Listening(nnx.Module):
    """A module whose inputs are recorded: the arrays for the trace, and the rest in a dictionary."""

    def __init__(self, module: Callable, path: str, fixed: dict[str, Fixed]):
        self.module, self.path, self.fixed = module, path, nnx.static(fixed)

    def __getattr__(self, name: str) -> Any:
        return passed_on(self, "module", name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if tracing(self):
            self.fixed[self.path], arrays = apart(args, kwargs)
            self.sow(Inputs, "inputs", arrays)
        return self.module(*args, **kwargs)


def standing(model: nnx.Module, new: Mapping[int, Any]) -> Any:
    """`model`, with new[id(module)] in the place of each of these modules; that for itself if it is one of them."""
    if id(model) in new:
        return new[id(model)]
    replace(model, new)
    return model


def inputs(
    model: nnx.Module,
    modules: Mapping[str, Callable],
    call: Call,
    fixed: Fixed,
    arrays: Sequence[Any],
    run: Callable[..., Any] = jax.jit,
) -> dict[str, tuple[Fixed, list]]:
    """What each of these modules of `model`, by path, is called with the first time, if it is: a call, apart.

    `model` is taken apart by it. `run` makes a function of arrays one that is called: compiled, or for shapes alone.
    """
    heard: dict[str, Fixed] = {}
    own = standing(model, {id(module): _Listening(module, path, heard) for path, module in modules.items()})
    graphdef, state = nnx.split(own)

    def listen(state: nnx.State, arrays: Sequence[Any]) -> dict[str, Any]:
        args, kwargs = together(fixed, arrays)
        return captured(Inputs, call, nnx.merge(graphdef, state, copy=True), *args, **kwargs)[1]

    found = run(listen)(state, arrays)
    return {path: (heard[path], given) for path, given in found.items() if path in heard}
