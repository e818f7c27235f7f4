"""Whether a block treats each example of a batch on its own, as it must where only some of them are computed."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from dynjax.core import convolve
from dynjax.core.arguments import Size, name_of
from dynjax.core.cost import jaxprs_in, open_jaxpr
from dynjax.core.views import fresh

_EXAMPLES = 10007
"""A prime that nothing else has for its length, so that an axis with examples is known by being a multiple of it."""
_OVER = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod argmax argmin sort cumsum cumprod cummax cummin rev".split()
)
"""Operations along axes that their parameters name."""


def shape_apart(block: Callable[[Any], Any], x: Any) -> Any:
    """Shapes and types of `block(x)`, trees of arrays whose first axis is the examples.

    Raises:
        ValueError: if `block` sums, sorts or compares over the examples, so that one depends on the others.
    """

    def specs(examples: Size):
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct((examples, *a.shape[1:]), a.dtype), x)

    (examples,) = {a.shape[0] for a in jax.tree.leaves(x)}
    call = fresh(block)
    out = jax.eval_shape(call, specs(examples))
    if examples == 1:
        return out
    try:
        with convolve.plain():  # of a product with all pixels as one axis the examples are no axis
            closed = jax.make_jaxpr(call)(specs(_EXAMPLES))
    except (TypeError, ValueError):
        return out  # for one number of examples only, as over several devices
    mixing = _mixing(closed.jaxpr)
    if mixing:
        name = name_of(block)
        raise ValueError(
            f"{name} mixes the examples of a batch ({mixing} over them): where only some are computed the others "
            "would be missing in it; leave that outside of what is skipped, keep running statistics, or say batched= "
            "where an argument that all share was taken for one of the examples"
        )
    return out


def _mixing(jaxpr: jex.Jaxpr, follow: Sequence[bool] | None = None) -> str:
    """The first operation on real numbers that goes over the examples; `follow` says which inputs follow them."""
    pairs = zip(jaxpr.invars, follow or [True] * len(jaxpr.invars), strict=True)
    following = {id(var) for var, follows in pairs if follows}
    for eqn in _needed(jaxpr):
        own = [id(var) in following for var in eqn.invars]
        if any(own):
            following |= set(map(id, eqn.outvars))
        for inner in jaxprs_in(eqn.params):
            inner = open_jaxpr(inner)
            if found := _mixing(inner, own if len(inner.invars) == len(own) else None):
                return found
        shapes = [getattr(v.aval, "shape", ()) for v in eqn.invars]
        real = any(jnp.issubdtype(v.aval.dtype, jnp.floating) for v in eqn.invars if hasattr(v.aval, "dtype"))
        if real and any(n and n % _EXAMPLES == 0 for n in _lengths(eqn, shapes, own)):
            return eqn.primitive.name
    return ""


def _needed(jaxpr: jex.Jaxpr) -> list:
    """Operations that something comes of. A shape may have been asked for by looking at one example, and a padding of
    no pixels is made of slices all the same."""
    live, found = set(map(id, jaxpr.outvars)), []
    for eqn in reversed(jaxpr.eqns):
        if any(id(v) in live and getattr(v.aval, "size", 1) for v in eqn.outvars):
            found.append(eqn)
            live |= set(map(id, eqn.invars))
    return found[::-1]


def _lengths(eqn, shapes, follows) -> list[int]:
    """Lengths of the axes over which an operation puts numbers together."""
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (left, _), _ = params["dimension_numbers"]
        return [shapes[0][axis] for axis in left]
    if name in _OVER:
        (axes,) = (params[key] for key in ("axes", "axis", "dimensions", "dimension") if key in params)
        return [shapes[0][axis] for axis in (axes if isinstance(axes, tuple) else (axes,))]
    if name == "gather" and not follows[1]:  # places that are the same whatever the examples are
        return [shapes[0][axis] for axis in params["dimension_numbers"].start_index_map if not _by_example(shapes[1])]
    if name.startswith("scatter") and not follows[1] and not _by_example(shapes[1]):
        return [shapes[0][axis] for axis in params["dimension_numbers"].scatter_dims_to_operand_dims]
    if name == "slice":  # the first example, or a roll
        return [n for n, m in zip(shapes[0], eqn.outvars[0].aval.shape, strict=True) if n != m]
    return []


def _by_example(shape: tuple[int, ...]) -> bool:
    """Whether there is one for each example."""
    return any(n and n % _EXAMPLES == 0 for n in shape)
