"""Run a convolutional block on windows cut from a map, layer by layer, with no more border than each layer needs.

A tile of `size` pixels after a block of receptive radius `r` needs a window of `size + 2r`. Running the block as it is
on that window computes the whole window in every layer. Here the block's jaxpr is walked instead: every convolution
eats its own part of the border, so later layers work on fewer rows, and pixels outside the map are set to zero before
each convolution, which is what its SAME padding does on the whole map.

The windows of several tiles lie side by side in one strip (1, rows, tiles * (size + 2r), C). One wide convolution uses
all cores of a CPU where many small ones use one. Columns near a seam mix two windows; they are the border columns that
no tile reads.

Letters: H W map, C channels, T tiles in a strip.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jex

from dynjax.core import convolve
from dynjax.core.devices import spread_over
from dynjax.core.views import fresh

# Primitives that treat every pixel alike, whose operands have one shape (or are scalars) and whose parameters hold no
# shape.
_POINTWISE = frozenset(
    """abs add add_any and cbrt ceil clamp convert_element_type copy copy_p cos div eq erf erf_inv erfc exp exp2 expm1
    floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg nextafter not optimization_barrier or
    pow reduce_precision rem round rsqrt select_n sign sin sqrt square stop_gradient sub tan tanh xor""".split()
)
_CALLS = frozenset(
    """pjit jit closed_call core_call custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr remat remat2
    checkpoint""".split()
)
# The block is traced on a map of these sides: primes that no parameter has, so that a spatial axis is known by its
# length.
_HEIGHT, _WIDTH = 509, 521
_OTHER = (3, 251, 257)
"""Examples and sides for a second look at the block, which must be the same: it may not use these numbers."""


class Unsupported(Exception):
    """The block uses an operation that cannot be run on a strip; the caller runs the block on whole windows instead."""


@dataclasses.dataclass(frozen=True)
class _Strip:
    """A value on the strip: right up to `margin` rows and columns around each tile; `clean` if zero outside the map."""

    value: jax.Array
    margin: tuple[int, int]
    clean: bool = False


@dataclasses.dataclass(frozen=True)
class _Uniform:
    """A value that is the same at every pixel: kept with axes 1 and 2 of length 1."""

    value: jax.Array


@dataclasses.dataclass(frozen=True)
class _PerTile:
    """A value of the tile's example, (T, ...), what it has for one example after that: the same at its every pixel."""

    value: jax.Array


def trace(
    block: Callable,
    shape: tuple[int, ...],
    dtype,
    others: Sequence = (),
    pixels: tuple[int, int, int] = (1, _HEIGHT, _WIDTH),
) -> jex.ClosedJaxpr:
    """The jaxpr of `block` on a map (1, H, W, C), `shape` (..., C) gives the channels, and others of one example."""
    more = [jax.ShapeDtypeStruct((pixels[0], *other.shape[1:]), other.dtype) for other in others]
    with convolve.plain():  # a strip's are chosen by the platform when it is run
        return jax.make_jaxpr(fresh(block))(jax.ShapeDtypeStruct((*pixels, shape[-1]), dtype), *more)


def run_strip(
    closed: jex.ClosedJaxpr,
    strip: jax.Array,
    inside: jax.Array,
    others: Sequence[jax.Array] = (),
    *,
    size: int,
    radius: int,
) -> jax.Array:
    """The block's output (1, size, T * (size + 2 radius), C') on a strip of T windows.

    Args:
        closed: what `trace` gave.
        strip: (1, size + 2 radius, T * (size + 2 radius), C), the windows side by side, zero outside the map: see
            `cut`.
        inside: same shape with one channel, True where the pixel lies in the map.
        others: what else the block takes, (T, ...), of each tile's example.
        size: side of a tile, in pixels.
        radius: receptive radius of the block, in pixels.

    Raises:
        Unsupported: for an operation that mixes pixels in a way that is not a stride-1 SAME convolution.
        ValueError: if the block reaches further than `radius`.
    """
    return _rows(_walked(closed, strip, inside, others, size, radius), 0, size).value


def _walked(
    closed: jex.ClosedJaxpr, strip: jax.Array, inside: jax.Array, others: Sequence, size: int, radius: int
) -> _Strip:
    args = [_Strip(strip, (radius, radius), clean=True), *(_PerTile(other[:, None]) for other in others)]
    (out,) = _Walk(inside, size, radius)(closed.jaxpr, closed.consts, args)
    if not isinstance(out, _Strip):
        raise Unsupported("the block's output does not depend on its input pixel by pixel")
    return out


def _rows(strip: _Strip, margin: int, size: int) -> _Strip:
    """Drop rows until `margin` are left around the tile."""
    drop = strip.margin[0] - margin
    if not drop:
        return strip
    value = lax.slice_in_dim(strip.value, drop, drop + size + 2 * margin, axis=1)
    return _Strip(value, (margin, strip.margin[1]), strip.clean)


def window(closed: jex.ClosedJaxpr, size: int, radius: int) -> tuple:
    """Shapes of a strip of one window, of its `inside` and of the others of its example, for `run_strip`."""
    (spec, *others), side = closed.in_avals, size + 2 * radius
    strip = jax.ShapeDtypeStruct((1, side, side, spec.shape[-1]), spec.dtype)
    more = [jax.ShapeDtypeStruct(other.shape, other.dtype) for other in others]
    return strip, jax.ShapeDtypeStruct((1, side, side, 1), bool), more


def supported(closed: jex.ClosedJaxpr, *, size: int, radius: int) -> bool:
    """Whether `run_strip` can run this block; found by tracing it, nothing is computed."""
    try:
        jax.eval_shape(functools.partial(run_strip, closed, size=size, radius=radius), *window(closed, size, radius))
    except Unsupported:
        return False
    return True


def reach_of(block: Callable, channels: int, dtype, others: Sequence = (), limit: int = 64) -> int | None:
    """Receptive radius of `block` in pixels, at most `limit`, as its jaxpr tells it.

    None if `run_strip` cannot run the block, or it uses the map's size or the batch's.
    """
    closed, margins = trace(block, (channels,), dtype, others), list[int]()

    def walk(strip, inside, others):
        out = _walked(closed, strip, inside, others, 1, limit)
        margins.extend(out.margin)
        return out.value

    try:
        jax.eval_shape(walk, *window(closed, 1, limit))
    except (Unsupported, ValueError):
        return None
    other = trace(block, (channels,), dtype, others, _OTHER)
    pairs = list(zip(closed.consts, other.consts, strict=False))
    return limit - min(margins) if _alike(closed.jaxpr, other.jaxpr, pairs) else None


def _alike(a: jex.Jaxpr, b: jex.Jaxpr, consts: Sequence = ()) -> bool:
    """Whether two jaxprs do the same with the same numbers, on values that may have other shapes."""
    if [eqn.primitive for eqn in a.eqns] != [eqn.primitive for eqn in b.eqns]:
        return False
    pairs = list(consts)
    for one, other in zip(a.eqns, b.eqns, strict=True):
        atoms = zip(one.invars, other.invars, strict=True)
        pairs += [[atom.val if isinstance(atom, jex.Literal) else None for atom in pair] for pair in atoms]
        if one.primitive.name in _CALLS:
            (inner, first), (opposite, second) = _inner(one), _inner(other)
            if not _alike(inner, opposite, list(zip(first, second, strict=True))):
                return False
    # Only numbers: a table of the map's size is never run on a strip.
    return all(p is q or not _number(p) or (_number(q) and np.array_equal(p, q, equal_nan=True)) for p, q in pairs)


def _inner(eqn) -> tuple[jex.Jaxpr, Sequence]:
    """The jaxpr that a call runs, and its constants."""
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr", eqn.params.get("fun_jaxpr")))
    return (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())


def _number(value) -> bool:
    return value is not None and not np.ndim(value) and not isinstance(value, jax.core.Tracer)


class _Walk:
    """One evaluation of a jaxpr over values that are plain, uniform or on the strip."""

    def __init__(self, inside: jax.Array, size: int, radius: int):
        self.inside, self.size, self.radius = inside, size, radius

    def __call__(self, jaxpr, consts, args):
        env = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, args, strict=True))

        def read(atom):
            return atom.val if isinstance(atom, jex.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            outs = self.equation(eqn, [read(a) for a in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(a) for a in jaxpr.outvars]

    def equation(self, eqn, args):
        name, params = eqn.primitive.name, eqn.params
        if name in _CALLS:
            inner, consts = _inner(eqn)
            return self(inner, consts, args)
        if not any(isinstance(a, _Strip | _Uniform) for a in args):
            if any(isinstance(a, _PerTile) for a in args):
                return self.per_tile(eqn, args)
            if name == "broadcast_in_dim" and _is_map(params["shape"]) and not {1, 2} & _filled(eqn, args[0]):
                shape = (params["shape"][0], 1, 1, *params["shape"][3:])
                return [_Uniform(lax.broadcast_in_dim(args[0], shape, params["broadcast_dimensions"]))]
            return _bind(eqn, args)
        rule = {
            "conv_general_dilated": self.convolution,
            "dot_general": self.matrix_product,
            "broadcast_in_dim": self.broadcast,
            "reshape": self.reshape,
            "squeeze": self.reshape,
            "reduce_sum": self.reduction,
            "reduce_max": self.reduction,
            "reduce_min": self.reduction,
            "concatenate": self.concatenate,
            "slice": self.channels,
            "split": self.channels,
        }.get(name, self.pointwise if name in _POINTWISE else None)
        if rule is None:
            raise Unsupported(name)
        return rule(eqn, args)

    def per_tile(self, eqn, args):
        """What has no pixels, once for each tile; spread over the map it stays one value a tile."""
        values = [a.value if isinstance(a, _PerTile) else a for a in args]
        axes = [0 if isinstance(a, _PerTile) else None for a in args]
        changed, shape = {}, eqn.outvars[0].aval.shape
        if eqn.primitive.name == "broadcast_in_dim" and _is_map(shape):
            dims = eqn.params["broadcast_dimensions"]
            if any(d in (1, 2) and n != 1 for d, n in zip(dims, values[0].shape[1:], strict=True)):
                raise Unsupported("broadcast_in_dim")
            changed = dict(shape=(1, 1, 1, *shape[3:]))
        elif any(_is_map(out.aval.shape) for out in eqn.outvars):
            raise Unsupported(eqn.primitive.name)
        return [_PerTile(out) for out in jax.vmap(lambda *values: _bind(eqn, values, **changed), axes)(*values)]

    def columns(self, value):
        """A value of each tile, as it lies on a strip: (1, 1, columns, ...)."""
        tiles, side = value.shape[0], self.inside.shape[1]
        if value.ndim < 4 or value.shape[1:4] != (1, 1, 1):
            raise Unsupported("a value of an example that is no map")
        return jnp.repeat(value.reshape(tiles, *value.shape[4:]), side, 0)[None, None]

    def pointwise(self, eqn, args):
        args = [_Uniform(self.columns(a.value)) if isinstance(a, _PerTile) else a for a in args]
        strips = [a for a in args if isinstance(a, _Strip)]
        if not all(isinstance(a, _Strip | _Uniform) or jnp.shape(a)[1:3] in ((), (1, 1)) for a in args):
            raise Unsupported(eqn.primitive.name)
        if not strips:
            values = [a.value if isinstance(a, _Uniform) else a for a in args]
            return [_Uniform(v) for v in _bind(eqn, _broadcast(values))]
        margin = min(s.margin[0] for s in strips), min(s.margin[1] for s in strips)
        values = [
            _rows(a, margin[0], self.size).value if isinstance(a, _Strip) else getattr(a, "value", a) for a in args
        ]
        return [_Strip(v, margin) for v in _bind(eqn, _broadcast(values))]

    def convolution(self, eqn, args):
        p = eqn.params
        numbers = p["dimension_numbers"]
        x, kernel = args
        channels_last = numbers.lhs_spec == (0, 3, 1, 2) and numbers.out_spec == (0, 3, 1, 2)
        plain = p["window_strides"] == (1, 1) and p["lhs_dilation"] == (1, 1) and p["batch_group_count"] == 1
        if not (isinstance(x, _Strip) and not isinstance(kernel, _Strip | _Uniform) and channels_last and plain):
            raise Unsupported("conv_general_dilated")
        reach = [(kernel.shape[numbers.rhs_spec[2 + i]] - 1) * p["rhs_dilation"][i] for i in (0, 1)]
        if any(r % 2 or tuple(pad) != (r // 2, r // 2) for r, pad in zip(reach, p["padding"], strict=True)):
            raise Unsupported("conv_general_dilated")
        reach = [r // 2 for r in reach]
        margin = (x.margin[0] - reach[0], x.margin[1] - reach[1])
        if min(margin) < 0:
            raise ValueError(
                f"radius={self.radius} is too small: the block reaches further than {self.radius} pixels; "
                "leave radius out to have it found"
            )
        value = x.value
        if kernel.shape[numbers.rhs_spec[2]] == kernel.shape[numbers.rhs_spec[3]] == p["feature_group_count"] == 1:
            # As a matrix product it uses all cores of a CPU, which a convolution of one pixel does not.
            axes = numbers.rhs_spec
            kernel = kernel.transpose(axes[1], axes[0], axes[2], axes[3])[:, :, 0, 0]
            dims = (((3,), (0,)), ((), ()))
            kind = p["preferred_element_type"]
            return [_Strip(lax.dot_general(value, kernel, dims, p["precision"], kind), margin)]
        if max(reach) and not x.clean:
            drop = self.radius - x.margin[0]
            inside = lax.slice_in_dim(self.inside, drop, drop + value.shape[1], axis=1)
            value = jnp.where(inside, value, jnp.zeros((), value.dtype))
        ways = {name: p[name] for name in ("dimension_numbers", "feature_group_count", "precision")}
        ways |= dict(preferred_element_type=p["preferred_element_type"], rhs_dilation=p["rhs_dilation"])
        value, kernel = spread_over([value, kernel])
        out = convolve.convolution(value, kernel, (1, 1), ((0, 0), (reach[1], reach[1])), **ways)
        return [_Strip(out, margin)]

    def matrix_product(self, eqn, args):
        (left, _), (left_batch, _) = eqn.params["dimension_numbers"]
        x, weights = args
        last = isinstance(x, _Strip) and tuple(left) == (x.value.ndim - 1,) and x.value.ndim == 4
        if not last or left_batch or isinstance(weights, _Strip | _Uniform):
            raise Unsupported("dot_general")
        return [_Strip(out, x.margin) for out in _bind(eqn, [x.value, weights])]

    def broadcast(self, eqn, args):
        (x,), shape, dims = args, eqn.params["shape"], eqn.params["broadcast_dimensions"]
        if not _is_map(shape) or tuple(dims[:3]) != (0, 1, 2):
            raise Unsupported("broadcast_in_dim")
        shape = (*x.value.shape[:3], *shape[3:])
        return [dataclasses.replace(x, value=lax.broadcast_in_dim(x.value, shape, dims))]

    def reshape(self, eqn, args):
        (x,), shape = args, eqn.outvars[0].aval.shape
        if not _is_map(shape) or (eqn.primitive.name == "reshape" and eqn.params.get("dimensions")):
            raise Unsupported(eqn.primitive.name)
        return [dataclasses.replace(x, value=x.value.reshape(*x.value.shape[:3], *shape[3:]))]

    def reduction(self, eqn, args):
        (x,) = args
        if min(eqn.params["axes"]) < 3:
            raise Unsupported(eqn.primitive.name)
        return [dataclasses.replace(x, value=v) for v in _bind(eqn, [x.value])]

    def concatenate(self, eqn, args):
        if eqn.params["dimension"] < 3 or not all(isinstance(a, _Strip) for a in args):
            raise Unsupported("concatenate")
        margin = tuple(min(a.margin[i] for a in args) for i in (0, 1))
        values = [_rows(a, margin[0], self.size).value for a in args]
        return [_Strip(lax.concatenate(values, eqn.params["dimension"]), margin, all(a.clean for a in args))]

    def channels(self, eqn, args):
        """`slice` and `split` along the channels; the map's axes keep their length, so they are whole."""
        (x,), outs, p = args, eqn.outvars, eqn.params
        if not all(_is_map(o.aval.shape) for o in outs):
            raise Unsupported(eqn.primitive.name)
        if eqn.primitive.name == "slice":
            starts = (0, 0, 0, *p["start_indices"][3:])
            stops = (*x.value.shape[:3], *p["limit_indices"][3:])
            return [dataclasses.replace(x, value=lax.slice(x.value, starts, stops, p["strides"]))]
        return [dataclasses.replace(x, value=part) for part in lax.split(x.value, p["sizes"], p["axis"])]


def _bind(eqn, values, **changed):
    out = eqn.primitive.bind(*spread_over(values), **(eqn.params | changed))
    return out if eqn.primitive.multiple_results else [out]


def _broadcast(values):
    """Give all values that are no scalars one shape, as pointwise primitives want it."""
    shape = jnp.broadcast_shapes(*(jnp.shape(v) for v in values if jnp.ndim(v)))
    return [jnp.broadcast_to(v, shape) if jnp.ndim(v) else v for v in values]


def _is_map(shape) -> bool:
    return len(shape) >= 3 and shape[0] == 1 and tuple(shape[1:3]) == (_HEIGHT, _WIDTH)


def _filled(eqn, operand) -> set[int]:
    """The axes of a broadcast's output that its operand really varies along."""
    return {d for d, n in zip(eqn.params["broadcast_dimensions"], jnp.shape(operand), strict=True) if n != 1}
