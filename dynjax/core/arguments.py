"""What a block is called with beside its first argument: what of it belongs to the examples, and what to all of them.

Letters: B examples, H W pixels, C D channels.
"""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import PyTreeDef
from jaxtyping import Array, Float

Tree = Any
"""An array, or a tree of arrays."""
Size = int | Any
"""A number of examples; no int, but JAX's symbol for it, where a program is exported for any batch."""
_TRAINING = {
    "training": True,
    "train": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
    "inference": False,
}
"""Flags of a call under which layers draw noise or update their statistics."""


class Examples(NamedTuple):
    """All that has the examples as its first axis: a block's first argument, and arrays among the others."""

    first: Tree
    others: tuple[Array, ...] = ()


def examples_of(x: Tree) -> Size:
    """The number of examples, of an array or a tree of arrays.

    Raises:
        ValueError: if there is no array, or one without axes.
    """
    leaves = jax.tree.leaves(x)
    if not leaves or not is_array(leaves[0]) or not leaves[0].ndim:
        raise ValueError(f"an input that has the examples as its first axis is needed, this is a {type(x).__name__}")
    return leaves[0].shape[0]


def first(x: Tree) -> Tree:
    """What the gate sees, and what passes on where a block is skipped."""
    return x.first if isinstance(x, Examples) else x


def others(x: Tree) -> tuple[Array, ...]:
    """What else belongs to the examples."""
    return x.others if isinstance(x, Examples) else ()


def following(given: Tree, x: Tree, others: tuple[Array, ...] | None = None) -> Tree:
    """`given`, as it is handed to the next block of a chain, to which `x` came, and maybe others for some examples."""
    if not isinstance(given, Examples):
        return x
    return Examples(x, given.others if others is None else others)


def shapes(x: Tree) -> Tree:
    """The shapes and types of the arrays of a tree."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), x)


class Bound(nnx.Module):
    """A block with the arguments after its first: a module of one argument, the `Examples`."""

    def __init__(self, block: Callable, tree: PyTreeDef, values: Sequence[Any], batched: Sequence[bool]):
        self.block, self.tree, self.batched = block, tree, tuple(batched)
        # Arrays, modules such as nnx.Rngs, and anything that is no array.
        self.same = nnx.Dict({str(number): value for number, value in enumerate(values) if not batched[number]})

    def __call__(self, x: Examples) -> Tree:
        args, kwargs = self.arguments(x.others)
        return self.block(x.first, *args, **kwargs)

    def arguments(self, others: Sequence[Array]) -> tuple[tuple, dict]:
        """The arguments after the first, with these arrays for those that belong to the examples."""
        rest = iter(others)
        return self.tree.unflatten(
            next(rest) if batched else self.same[str(number)] for number, batched in enumerate(self.batched)
        )


def called(block: Callable, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Tree, tuple, dict[str, Any]]:
    """The first argument of a call of `block`, which may be given by its name, and the others."""
    if args:
        return args[0], args[1:], dict(kwargs)
    names = [each.name for each in _parameters(block)]
    if names and names[0] in kwargs:
        return kwargs[names[0]], (), {name: value for name, value in kwargs.items() if name != names[0]}
    raise ValueError(f"{name_of(block)} was called without its input: give it as the first argument")


def _parameters(block: Callable) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(block).parameters.values())
    except (TypeError, ValueError):  # some builtins have none
        return []


def bind(
    block: Callable, x: Tree, args: tuple, kwargs: Mapping[str, Any], batched: Collection[int | str] | None = None
) -> tuple[Callable, Tree]:
    """`block` as a function of one argument, and that argument: all that has the examples as its first axis.

    Args:
        block: what is called as `block(x, *args, **kwargs)`.
        batched: places (1 is that after x) and names of the arguments that have the examples as their first axis; the
            others are the same for all. Left out, every array is one that has as many of them as `x` has examples.

    Raises:
        ValueError: if `batched` names what is not there, or has another number of examples.
    """
    if not args and not kwargs:
        return block, x
    examples = examples_of(x)
    paths, tree = jax.tree_util.tree_flatten_with_path((args, dict(kwargs)), is_leaf=_opaque)
    named = {number: path[1].idx + 1 if path[0].idx == 0 else path[1].key for number, (path, _) in enumerate(paths)}
    missing = set(batched or ()) - set(named.values())
    if missing:
        raise ValueError(
            f"{name_of(block)}: batched= names {', '.join(sorted(map(str, missing)))}, which this call does not have "
            f"after its first argument; it has {', '.join(sorted(map(str, {*named.values()}))) or 'none'}"
        )
    values = [value for _, value in paths]
    if batched is None:
        which = [_has(value, examples) for value in values]
    else:
        which = [named[number] in batched and is_array(value) for number, value in enumerate(values)]
    for number, value in enumerate(values):
        if which[number] and not _has(value, examples):
            raise ValueError(
                f"{name_of(block)}: batched= says that argument {named[number]!r} has the examples as its first axis, "
                f"but its shape is {value.shape} and there are {examples} examples"
            )
    others = tuple(value for value, one in zip(values, which, strict=True) if one)
    return Bound(block, tree, values, which), Examples(x, others)


def _opaque(value: Any) -> bool:
    """Modules and their like, nnx.Rngs among them, are passed on as they are."""
    return isinstance(value, nnx.Pytree | nnx.Variable)


def is_array(value: Any) -> TypeGuard[Array]:
    """Whether it has a shape and a type: an array, NumPy's too, or what stands for one."""
    return isinstance(value, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _has(value: Any, examples: Size) -> bool:
    return is_array(value) and len(value.shape) > 0 and value.shape[0] == examples


def trains(block: Callable) -> str:
    """The flag of the call under which `block` would train, as "name=value"; nothing if there is none."""
    if not isinstance(block, Bound):
        return ""
    kwargs = block.tree.unflatten(range(len(block.batched)))[1]
    for name, number in kwargs.items():
        value = block.same.get(str(number))
        if isinstance(value, bool) and _TRAINING.get(name) is value:
            return f"{name}={value}"
    return ""


def name_of(block: Any) -> str:
    """What a person would call `block`."""
    while isinstance(block, Bound | _OfMap):
        block = block.block
    return getattr(block, "__name__", type(block).__name__)


# Maps


Kind = Literal["map", "plane", "example"]
"""Of what else belongs to the examples: (B, H, W, C), (B, H, W), or anything."""


class _OfMap(nnx.Module):
    """A block of several maps as one of a single map that has them all as channels, and of what else examples have."""

    def __init__(self, block: Callable, widths: Sequence[int], types: Sequence[Any], kinds: Sequence[Kind]):
        self.block, self.widths, self.types, self.kinds = block, tuple(widths), tuple(types), tuple(kinds)

    def __call__(self, x: Float[Array, "B H W D"], *others: Array) -> Array:
        starts = [sum(self.widths[:number]) for number in range(len(self.widths))]
        maps = iter(
            x[..., start : start + width].astype(kind)
            for start, width, kind in zip(starts, self.widths, self.types, strict=True)
        )
        own, rest = next(maps), iter(others)
        found = []
        for kind in self.kinds:
            value = next(rest) if kind == "example" else next(maps)
            found.append(value[..., 0] if kind == "plane" else value)
        return self.block(Examples(own, tuple(found)))


def as_map(block: Callable, x: Tree) -> tuple[Callable, Any, tuple]:
    """`block` as a function of one map (B, H, W, D) and of arrays of the examples; the map, and these.

    Other maps of `x`, which may be arrays or their shapes, are channels of that map.
    """
    if not isinstance(x, Examples):
        return block, x, ()
    own = x.first
    kinds: list[Kind] = []
    for value in x.others:
        here = value.shape[1:3] == own.shape[1:3]
        kinds.append("map" if here and value.ndim == 4 else "plane" if here and value.ndim == 3 else "example")
    pairs = list(zip(x.others, kinds, strict=True))
    maps = [_with_channel(value) if kind == "plane" else value for value, kind in pairs if kind != "example"]
    others = tuple(value for value, kind in pairs if kind == "example")
    # Whole numbers are more than bfloat16 can tell apart.
    wide = [jnp.float32 for each in maps if not jnp.issubdtype(each.dtype, jnp.floating)]
    dtype = jnp.result_type(own.dtype, *(each.dtype for each in maps), *wide) if maps else own.dtype
    widths, types = [each.shape[-1] for each in (own, *maps)], [jnp.dtype(each.dtype) for each in (own, *maps)]
    whole = _joined([own, *maps], dtype)
    return _OfMap(block, widths, types, kinds), whole, others


def _with_channel(plane: Any) -> Any:
    """A plane, or its shape, as a map of one channel."""
    if isinstance(plane, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((*plane.shape, 1), plane.dtype)
    return plane[..., None]


def _joined(maps: Sequence[Any], dtype: Any) -> Any:
    """Maps side by side as channels, or the shape of that."""
    if len(maps) == 1:
        return maps[0]
    if any(isinstance(each, jax.ShapeDtypeStruct) for each in maps):
        return jax.ShapeDtypeStruct((*maps[0].shape[:-1], sum(each.shape[-1] for each in maps)), dtype)
    return jnp.concatenate([each.astype(dtype) for each in maps], -1)
