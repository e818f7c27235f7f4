"""How a deployed model is called: compiled, a mapped axis as more examples, and on each device for its own.

Letters: B examples.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dynjax.core import views
from dynjax.core.arguments import Tree, is_array
from dynjax.core.decision import coming_out
from dynjax.core.devices import Spread, automatic, per_device, spread_of
from dynjax.core.modules import passed_on
from dynjax.core.wrapper import Wrapper


class Deployed(nnx.Module):
    """A model that skips for real: call it as the model is, alone or under `jax.jit`. `report` has what it came to.

    A call by itself is compiled, once for each shape of its arrays and each value of its other arguments. `jax.vmap` of
    it takes the mapped axis for more examples. A batch that is spread over devices is computed by each for its own
    examples, without any exchange. Other attributes are those of the model.
    """

    def __init__(self, model: nnx.Module, report: Any = None, *, method: str = "__call__", axis: str | None = None):
        self.model, self.report, self.method, self.axis = model, report, method, axis

    def __getattr__(self, name: str) -> Any:
        return passed_on(self, "model", name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        fixed, arrays = apart(args, kwargs)
        batch, spread = _batch(arrays, self.axis)
        graphdef, state = nnx.split(self.model)
        modules = nnx.iter_modules(self.model)
        skips = any(isinstance(each, Wrapper) and each.execution == "compact" for _, each in modules)
        key = graphdef, self.method, fixed, batch, spread, skips
        try:
            hash(key)
        except TypeError:  # nothing that is compiled could be found again
            return getattr(self.model, self.method)(*args, **kwargs)
        output, changed = _compiled(key, state, arrays)
        nnx.update(self.model, changed)
        return output


Fixed = tuple[Any, tuple]
"""What of a call is no array: its tree, and the other leaves with their types, since 1 equals True and 1.0."""


def apart(args: tuple, kwargs: Mapping[str, Any]) -> tuple[Fixed, list]:
    """What of a call is fixed, and its arrays, with None between them for the rest."""
    leaves, tree = jax.tree.flatten((args, dict(kwargs)))
    arrays = [leaf if is_array(leaf) else None for leaf in leaves]
    others = [None if array is not None else (type(leaf), leaf) for leaf, array in zip(leaves, arrays, strict=True)]
    return (tree, tuple(others)), arrays


def call_of(x: Any) -> tuple[Fixed, list]:
    """A call, apart: `x` is the one argument, or a whole call, a pair of a tuple and a dictionary."""
    whole = isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], tuple) and isinstance(x[1], dict)
    return apart(*x) if whole else apart((x,), {})


def together(fixed: Fixed, arrays: Sequence[Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of the call that `apart` was given."""
    tree, others = fixed
    return tree.unflatten([array if other is None else other[1] for array, other in zip(arrays, others, strict=True)])


def _batch(arrays: Sequence[Any], axis: str | None) -> tuple[tuple[bool, ...], Spread | None]:
    """Which arrays are spread over devices by their examples, and how."""
    found = [None if array is None else spread_of(array, axis) for array in arrays]
    if not any(found):
        return (), None
    pairs = list(zip(arrays, found, strict=True))
    examples, spread = next((array.shape[:1], each) for array, each in pairs if each is not None)
    # Where an axis was named, how arrays lie is not known: those are the batch's that have as many examples.
    return tuple(each is not None and array.shape[:1] == examples for array, each in pairs), spread


@functools.partial(jax.jit, static_argnums=0)
def _compiled(key: tuple, state: nnx.State, arrays: Sequence[Any]) -> tuple[Any, nnx.State]:
    """The output, and the variables that the call changed: decisions, while a trace is taken."""
    graphdef, method, fixed, batch, spread, skips = key

    def run(state, arrays):
        args, kwargs = together(fixed, arrays)
        return views.changed(nnx.merge(graphdef, state, copy=True), *args, method=method, **kwargs)

    run = _mapped(run) if skips else run
    if spread is None:
        return automatic(run)(state, arrays)
    examples = next(array.shape[0] for array, one in zip(arrays, batch, strict=True) if one)
    with coming_out():
        return per_device(run, spread, batch, examples)(state, arrays)


def _mapped(run: Callable[[nnx.State, Sequence[Any]], Tree]) -> Callable:
    """`run(state, arrays)`, for which `jax.vmap` makes a larger batch, or calls it once for each where it cannot.

    As JAX maps them, branches would all be computed, and loops run as long as the longest.
    """
    mapped = jax.custom_batching.custom_vmap(run)

    @mapped.def_vmap
    def rule(size, batched, state, arrays):
        of_state, of_arrays = batched

        def one(number):
            pick = lambda array, is_mapped: array[number] if is_mapped else array  # noqa: E731
            return jax.tree.map(pick, state, of_state), jax.tree.map(pick, arrays, of_arrays)

        shapes = jax.eval_shape(one, 0)
        of_each = [leaf.shape[:1] for leaf in jax.tree.leaves(shapes[1])]
        of_mapped = {n for n, is_mapped in zip(of_each, jax.tree.leaves(of_arrays), strict=True) if is_mapped}
        of_outputs = {out.shape[:1] for out in jax.tree.leaves(jax.eval_shape(run, *shapes))}
        if not any(jax.tree.leaves(of_state)) and len(of_mapped) == 1 and of_outputs == of_mapped != {()}:
            ((examples,),) = of_mapped

            def fold(array, is_mapped):
                if not is_mapped and array.shape[:1] != (examples,):  # the same for all examples
                    return array
                array = array if is_mapped else jnp.broadcast_to(array, (size, *array.shape))
                return array.reshape(size * examples, *array.shape[2:])

            out = mapped(state, jax.tree.map(fold, arrays, of_arrays))
            out = jax.tree.map(lambda array: array.reshape(size, examples, *array.shape[1:]), out)
        else:
            out = jax.lax.map(lambda number: mapped(*one(number)), jnp.arange(size))
        return out, jax.tree.map(lambda _: True, out)

    return mapped
