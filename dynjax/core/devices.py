"""Several devices: which axis of a mesh a batch is spread over, and values that differ inside of `jax.shard_map`."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dynjax.core.arguments import shapes

Axes = str | tuple[str, ...]


class Spread(NamedTuple):
    """A mesh (None: that of the context), and the axes of it that the examples of a batch are spread over."""

    mesh: Mesh | AbstractMesh | None
    axes: Axes


def spread_of(array: Any, axis: str | None) -> Spread | None:
    """How the first axis of `array` lies on a mesh; None where it lies on one device, or this cannot be known.

    An array outside of `jit` says so, and inside of it one of a mesh whose axes are Explicit. Of Auto axes `axis` names
    that which is meant, if the mesh of the context has it.
    """
    outside = isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer)
    for sharding in (array.sharding if outside else None, jax.typeof(array).sharding):
        if isinstance(sharding, NamedSharding) and array.ndim and _size(sharding) > 1:
            return Spread(sharding.mesh, sharding.spec[0])
    context = jax.sharding.get_abstract_mesh()
    if axis is not None and array.ndim and not context.empty and axis in context.axis_names and context.shape[axis] > 1:
        return Spread(None, axis) if _type(context, axis) != AxisType.Manual else None
    return None


def _size(sharding: NamedSharding) -> int:
    """Over how many devices the first axis is spread."""
    axes = sharding.spec[0] if len(sharding.spec) else None
    names = (axes,) if isinstance(axes, str) else tuple(axes or ())
    size = 1
    for name in names:
        size *= sharding.mesh.shape[name]
    return size


def _type(mesh: Any, axis: str) -> AxisType:
    return dict(zip(mesh.axis_names, mesh.axis_types, strict=True))[axis]


def per_device(run: Callable, spread: Spread, batched: Sequence[bool], examples: int) -> Callable:
    """`run(state, arrays)`, on each device for its own examples of the arrays that are `batched`; the rest is whole.

    Raises:
        ValueError: if `run` gives what does not have the examples as its first axis.
    """

    def call(state: Any, arrays: Sequence[Any]) -> Any:
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):  # as on one device
            outputs = jax.eval_shape(run, *shapes((state, arrays)))
        specs = jax.tree.map(lambda out: _of_output(out, examples, spread.axes), outputs)
        inputs = [PartitionSpec(spread.axes) if one else PartitionSpec() for one in batched]
        names = {spread.axes} if isinstance(spread.axes, str) else set(spread.axes)
        ways: dict[str, Any] = dict(in_specs=(PartitionSpec(), inputs), out_specs=specs, axis_names=names)
        if _explicit((state, arrays)) is None:
            return jax.shard_map(run, mesh=spread.mesh, **ways)(state, arrays)
        # What is sharded otherwise, such as parameters, is gathered by the compiler, as on a mesh of Auto axes.
        mesh = spread.mesh
        placed = specs if mesh is None else jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        return jax.sharding.auto_axes(lambda *args: jax.shard_map(run, **ways)(*args), out_sharding=placed)(
            state, arrays
        )

    return call


def automatic(run: Callable) -> Callable:
    """`run`, for which the compiler finds how arrays lie, also where they come on a mesh of Explicit axes."""

    def call(*args: Any) -> Any:
        mesh = _explicit(args)
        if mesh is None:
            return run(*args)
        return jax.sharding.auto_axes(run, out_sharding=NamedSharding(mesh, PartitionSpec()))(*args)

    return call


def _explicit(tree: Any) -> Mesh | AbstractMesh | None:
    """The mesh of Explicit axes on which an array of `tree` lies."""
    for leaf in jax.tree.leaves(tree):
        mesh = jax.typeof(leaf).sharding.mesh
        if AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def _of_output(out: Any, examples: int, axes: Axes) -> PartitionSpec:
    if out.shape[:1] != (examples,):
        raise ValueError(
            f"a batch of {examples} examples is spread over devices, and an output has shape {out.shape}: all that the "
            "model gives must have the examples as its first axis; put what sums over them outside of it"
        )
    return PartitionSpec(axes)


# Inside of shard_map


def spread_over(values: Any, over: Any = ()) -> Any:
    """`values`, a tree, all of which may differ between devices where any of them, or of `over`, does.

    JAX knows which values do, and loops, and primitives that are bound by hand, want them alike.
    """
    axes = frozenset().union(*map(_differing, jax.tree.leaves((values, over))))
    return jax.tree.map(lambda value: _made(value, axes), values) if axes else values


def _differing(value: Any) -> frozenset:
    """Axes of the mesh along which `value` differs."""
    return jax.typeof(value).manual_axis_type.varying


def _made(value: Any, axes: frozenset) -> Any:
    missing = tuple(axes - _differing(value))
    return lax.pcast(value, missing, to="varying") if missing else value
