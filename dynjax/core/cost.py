"""Multiply-accumulates (MACs) of any function or module, read from its jaxpr: nothing runs, and no formulas."""

import dataclasses
import math
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from dynjax.core import convolve
from dynjax.core.arguments import is_array


@dataclasses.dataclass(frozen=True)
class Cost:
    """MACs of one whole call, all examples together, and what could not be counted for sure."""

    macs: float
    unknown: tuple[str, ...] = ()
    """One entry for each loop whose number of trips the jaxpr does not say; its body is in `macs` once."""


def macs(
    fn: Callable[..., Any], *args: Any, while_trips: int | None = None, padding: bool = False, **kwargs: Any
) -> float:
    """MACs of `fn(*args, **kwargs)`, all examples together; see `count`. Raises ValueError where they are unknown.

    `while_trips` answers for the loops of unknown length: so many trips each (1: the body once; a bound gives a bound).
    """
    cost = count(fn, *args, while_trips=while_trips, padding=padding, **kwargs)
    if cost.unknown:
        raise ValueError(
            f"the MACs depend on how often a loop runs, which is known only at run time: {'; '.join(cost.unknown)}. "
            "Give while_trips=, the trips to assume for each of them, or use cost.count"
        )
    return cost.macs


def count(
    fn: Callable[..., Any], *args: Any, while_trips: int | None = None, padding: bool = False, **kwargs: Any
) -> Cost:
    """MACs of `fn(*args, **kwargs)`, all examples together, with the loops of unknown length named.

    `fn` is a function, an `nnx.Module` or a method of one; arguments are arrays, `jax.ShapeDtypeStruct`s,
    `nnx.Module`s, trees of these, or anything else (passed on as it is). Modules are copied: BatchNorm statistics and
    random counts stay as they are. A module that `fn` closes over is not seen: pass it as an argument.

    Counted: convolutions (strided, dilated, transposed, grouped), `dot_general` (so matrix products, einsum, attention,
    and the resizing of `jax.image`, which is a product with a matrix), `ragged_dot`. `scan` counts times its length, a
    `while` times its trips where its bounds are constants (else see `while_trips`), `cond` and `switch` as their
    dearest branch, `shard_map` times its devices, a Pallas kernel times its grid; nested jit, remat and custom
    derivatives as what they hold. Not counted: elementwise work, reductions, pooling, normalisation, gathers and
    scatters, sorting, FFT, and the decompositions and solvers of `lax.linalg`. A result that nobody uses is counted.

    Kernel taps that fall on the padding or on the holes of a transposed convolution are not counted, as in XLA's
    `cost_analysis`, to which the tests hold these figures; `padding=True` counts the taps on the padding (still not the
    holes), as the tables of most papers do.
    """
    rule = _Rule(while_trips, padding)
    return rule.jaxpr(trace_abstractly(fn, *args, **kwargs), known={}, path="")


def trace_abstractly(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The closed jaxpr of `fn(*args, **kwargs)` from shapes alone, on copies of the modules among them."""
    if isinstance(fn, types.MethodType) and isinstance(fn.__self__, nnx.Module):  # its module has to be copied as well
        args = (fn.__self__, *args)
        fn = fn.__func__

    leaves, tree = jax.tree.flatten((fn, args, kwargs), is_leaf=lambda leaf: isinstance(leaf, nnx.Module))
    modules = [leaf for leaf in leaves if isinstance(leaf, nnx.Module)]
    graphdef, state = nnx.split(nnx.List(modules))  # together, so that what they share stays shared
    others = [None if isinstance(leaf, nnx.Module) else leaf for leaf in leaves]
    values, value_tree = jax.tree.flatten((state, others), is_leaf=lambda leaf: leaf is None)
    shapes = {i: _abstract(value) for i, value in enumerate(values) if is_array(value)}

    def call(arrays: dict[int, jax.Array]) -> list[jax.Array]:
        state, others = jax.tree.unflatten(value_tree, [arrays.get(i, value) for i, value in enumerate(values)])
        merged = nnx.merge(graphdef, state, copy=True)
        copies = iter(merged)
        filled = [
            next(copies) if isinstance(leaf, nnx.Module) else other for leaf, other in zip(leaves, others, strict=True)
        ]
        fn, args, kwargs = jax.tree.unflatten(tree, filled)
        return [leaf for leaf in jax.tree.leaves(fn(*args, **kwargs)) if is_array(leaf)]

    # The work is that of the convolution, however this machine carries it out.
    with convolve.plain():
        return jax.make_jaxpr(call)(shapes)


def _abstract(value: Any) -> jax.ShapeDtypeStruct:
    # Also where the value is a tracer of an enclosing jit or grad: its shape is all that this needs.
    return jax.ShapeDtypeStruct(value.shape, value.dtype, weak_type=getattr(value, "weak_type", False))


@dataclasses.dataclass(frozen=True)
class _Rule:
    """How to count; the jaxpr's equations are told apart by name and parameters, alike in all JAX versions."""

    while_trips: int | None
    padding: bool

    def jaxpr(self, jaxpr: Any, known: dict[Any, int], path: str) -> Cost:
        """Sum over the equations. `known` maps variables to whole numbers that are constants of the program."""
        consts = zip(open_jaxpr(jaxpr).constvars, getattr(jaxpr, "consts", ()), strict=False)
        known = known | {var: int(value) for var, value in consts if _is_whole_number(value)}
        costs = [self.equation(eqn, known, path) for eqn in open_jaxpr(jaxpr).eqns]
        return Cost(float(sum(cost.macs for cost in costs)), sum((cost.unknown for cost in costs), ()))

    def equation(self, eqn: Any, known: dict[Any, int], path: str) -> Cost:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            contracting, batch = params["dimension_numbers"]
            return Cost(_dot_macs(eqn, (*contracting[1], *batch[1])))
        if name == "ragged_dot_general":
            numbers = params["ragged_dot_dimension_numbers"]
            contracting, batch = numbers.dot_dimension_numbers
            # A row belongs to one group: the groups of the right side do not multiply the work.
            return Cost(_dot_macs(eqn, (*contracting[1], *batch[1], *numbers.rhs_group_dimensions)))
        if name == "conv_general_dilated":
            return Cost(_conv_macs(eqn, self.padding))

        within = f"{path}{params.get('name') or name}/"
        inner = [self.jaxpr(sub, _passed_on(sub, eqn, known), within) for sub in jaxprs_in(params)]
        if not inner:
            return Cost(0.0)
        body = Cost(float(sum(cost.macs for cost in inner)), sum((cost.unknown for cost in inner), ()))
        if name == "cond":
            return Cost(max(cost.macs for cost in inner), body.unknown)
        if name == "while":
            trips = _trips(eqn, known) if self.while_trips is None else _trips(eqn, known) or self.while_trips
            if trips is None and body.macs:
                return Cost(body.macs, (f"{path}while{_where(eqn)}", *body.unknown))
            return _times(body, trips)
        if name == "scan":
            return _times(body, params["length"])
        if name == "shard_map":
            axes = params.get("manual_axes", params.get("newly_manual_axes", ()))
            return _times(body, math.prod(params["mesh"].shape[axis] for axis in axes))
        if name == "pallas_call":
            grid = params["grid_mapping"].grid
            if not all(isinstance(side, int) for side in grid):
                return Cost(body.macs, (f"{path}pallas_call of dynamic grid{_where(eqn)}", *body.unknown))
            return _times(body, math.prod(grid))
        if name == "custom_linear_solve":  # it holds the product as well as the solver, and runs the solver
            return self.jaxpr(params["jaxprs"].solve, {}, path)
        return body


def _times(cost: Cost, trips: int | None) -> Cost:
    return Cost(cost.macs * (trips or 0), cost.unknown)


def open_jaxpr(jaxpr: Any) -> Any:
    """A jaxpr without the constants that it may come with."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def jaxprs_in(params: Mapping[str, Any]) -> Iterator[Any]:
    """Every jaxpr among an equation's parameters, open or closed, alone or in a tuple."""
    for value in params.values():
        items = value if isinstance(value, tuple | list) else (value,)
        yield from (item for item in items if hasattr(open_jaxpr(item), "eqns"))


def _dot_macs(eqn: Any, dims_not_free: tuple[int, ...]) -> float:
    left, right = (var.aval.shape for var in eqn.invars[:2])
    return float(math.prod(left)) * math.prod(side for dim, side in enumerate(right) if dim not in dims_not_free)


def _conv_macs(eqn: Any, padding: bool) -> float:
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    image, kernel = (var.aval.shape for var in eqn.invars)
    output = eqn.outvars[0].aval.shape
    taps = math.prod(
        _taps(image[i], kernel[k], output[o], stride, low, holes, dilation, padding)
        for i, k, o, stride, low, holes, dilation in zip(
            numbers.lhs_spec[2:],
            numbers.rhs_spec[2:],
            numbers.out_spec[2:],
            params["window_strides"],
            (low for low, _ in params["padding"]),
            params["lhs_dilation"],
            params["rhs_dilation"],
            strict=True,
        )
    )
    # The kernel's input side is already one group wide, and batch groups split the examples over the output channels.
    examples = image[numbers.lhs_spec[0]] // params["batch_group_count"]
    return float(examples) * taps * kernel[numbers.rhs_spec[0]] * kernel[numbers.rhs_spec[1]]


def _taps(image: int, kernel: int, output: int, stride: int, low: int, holes: int, dilation: int, padding: bool) -> int:
    """Pairs (output, tap) along one axis whose tap reads an element of the image, or of the padding if that counts."""
    end = (image - 1) * holes  # where the last element lies, the holes between elements included
    places = (o * stride - low + k * dilation for o in range(output) for k in range(kernel))
    return sum(place % holes == 0 and (padding or 0 <= place <= end) for place in places)


def _is_whole_number(value: Any) -> bool:
    return getattr(value, "shape", ()) == () and jax.numpy.issubdtype(jax.numpy.result_type(value), jax.numpy.integer)


def _value(atom: Any, known: Mapping[Any, int]) -> int | None:
    """The whole number that a variable or literal stands for, None where only the run can tell."""
    if hasattr(atom, "val"):
        return int(atom.val) if _is_whole_number(atom.val) else None
    return known.get(atom)


def _passed_on(jaxpr: Any, eqn: Any, known: Mapping[Any, int]) -> dict[Any, int]:
    """What is known inside a call whose operands are those of the equation, one by one."""
    if eqn.primitive.name in ("scan", "while", "cond", "pallas_call") or len(open_jaxpr(jaxpr).invars) != len(
        eqn.invars
    ):
        return {}
    values = ((var, _value(atom, known)) for var, atom in zip(open_jaxpr(jaxpr).invars, eqn.invars, strict=True))
    return {var: value for var, value in values if value is not None}


def _trips(eqn: Any, known: Mapping[Any, int]) -> int | None:
    """Trips of `while i < n: i += step` for constant start, n and step (a `fori_loop` of known bounds), else None."""
    condition, body = (open_jaxpr(eqn.params[key]) for key in ("cond_jaxpr", "body_jaxpr"))
    skip, body_skip = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    if [test.primitive.name for test in condition.eqns] != ["lt"] or condition.outvars != condition.eqns[0].outvars:
        return None
    counter, bound = condition.eqns[0].invars
    if counter not in condition.invars[skip:]:
        return None
    index = condition.invars.index(counter) - skip
    start = _value(eqn.invars[skip + body_skip + index], known)
    step = _step(body, body_skip + index, index)

    if bound in condition.invars[:skip]:
        end = _value(eqn.invars[condition.invars.index(bound)], known)
    elif bound in condition.invars:  # fori_loop carries its upper bound along, unchanged
        carried = condition.invars.index(bound) - skip
        unchanged = body.outvars[carried] is body.invars[body_skip + carried]
        end = _value(eqn.invars[skip + body_skip + carried], known) if unchanged else None
    else:
        end = _value(bound, {})
    if start is None or end is None or step is None:
        return None
    return max(0, -((start - end) // step))


def _step(body: Any, invar: int, outvar: int) -> int | None:
    """What the loop's body adds to its counter, if that is a positive constant."""
    for eqn in body.eqns:
        if body.outvars[outvar] in eqn.outvars and eqn.primitive.name == "add" and eqn.invars[0] is body.invars[invar]:
            step = _value(eqn.invars[1], {})
            return step if step and step > 0 else None
    return None


def _where(eqn: Any) -> str:
    """` at file:line` of the caller's own code, or nothing where this JAX does not keep it."""
    frames = getattr(getattr(eqn.source_info, "traceback", None), "frames", ())
    own = [frame for frame in frames if not {"jax", "flax"} & set(frame.file_name.split("/"))]
    return f" at {own[0].file_name}:{own[0].line_num}" if own else ""
