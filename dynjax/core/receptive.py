"""How far an output pixel of a block reaches, and whether tiles of the block can be computed on their own."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend import core as jex

from dynjax.core import cost, views, windows
from dynjax.core.arguments import Tree, as_map, name_of, shapes

_PROBES = (33, 73)
"""Sides of the maps on which a block is probed, smallest first. What crosses the first is not looked at further."""
_AROUND = 129
"""Side of the map that the probed ones are cut from."""
_INNER = 7
"""Pixels of a probed window between its borders; odd, and no multiple of 3, for strides inside a block to show."""
_CHANGES = (np.nan, 1e4, -1e4, 1.0)
"""What is added to one pixel: NaN spreads through sums and huge values through comparisons, which swallow NaN."""
_WIDE = (
    "it mixes the whole map{}, or reaches more than 31 pixels: tiles cannot be computed on their own; wrap the layers "
    "around it, or use Skip"
)
_ACROSS = (
    "a change in one corner is seen far away (padding='CIRCULAR', jnp.roll, jnp.pad(mode='wrap'), or a comparison with "
    "the whole map): tiles would be wrong; use padding='SAME' or 'REFLECT', or Skip"
)
_UNEVEN = (
    "it treats pixels differently by their place, or reaches further for some contents than for others (a stride "
    "inside, a pattern or noise over the map, offsets that follow the content, numbers taken from the map's size): "
    "tiles would be wrong; wrap smaller parts of it"
)
_MIXING = (
    "it mixes the examples of a batch (statistics, an order or noise over the batch): what is computed for some of "
    "them only would be wrong; leave it outside"
)
_MUCH = (
    "it makes {:.0f} MB of numbers of a map of {}x{} pixels{}: too many to look for its reach; wrap the layers "
    "around what makes them, or use Skip"
)
_LOOKED_AT = ((37, 41), (43, 47))
"""Sides of the maps on which a block is looked at before anything is run: primes, so that what has a number for every
pair of pixels is known by how many numbers it has. Two, since a parameter may have a multiple of one of them."""
_BYTES = 8e7
"""The largest array that probing may make."""
_REMEMBERED = 256
_answers: dict = {}


def receptive_radius(block: Callable, x: Tree) -> int:
    """Pixels that one output pixel of `block` reaches to each side, at least 0. `x` is a map, or `Examples` with one.

    Blocks of convolutions and pointwise layers are read from their jaxpr. Others are probed: single pixels of a random
    map are changed, in its centre and in its corners, to see which outputs depend on them, and the block on windows cut
    from the map must give what it gives on the whole map. Parameters' values do not matter, so this works while `jit`
    traces.

    Raises:
        ValueError: if the block has a stride, reaches over the whole map or across its border, compares pixels with the
            whole map, mixes examples, or treats pixels differently by their place.
    """
    block, x, others = as_map(views.still(block), shapes(x))
    more = tuple(jax.ShapeDtypeStruct((1, *other.shape[1:]), other.dtype) for other in others)
    try:
        return _remembered(block, x.shape[-1], jnp.dtype(x.dtype), more)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name_of(block)} cannot be run on tiles: {error}") from error


Others = tuple[jax.ShapeDtypeStruct, ...]
"""What else the block takes of one example."""


def _remembered(block: Callable, channels: int, dtype: np.dtype, others: Others) -> int:
    """`_found`, once for blocks that differ in nothing but their parameters' values.

    The blocks of a model are alike, and are asked for whenever it is traced.
    """
    definition, leaves, tree = _parts(block)
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in (*leaves, *others))
    key = definition, tree, shapes, channels, dtype
    try:
        hash(key)
    except TypeError:
        return _found(block, channels, dtype, others)
    if key not in _answers:
        answer = _found(block, channels, dtype, others)
        while len(_answers) >= _REMEMBERED:
            _answers.pop(next(iter(_answers)))
        _answers[key] = answer
    return _answers[key]


def _parts(block: Callable) -> tuple:
    """What makes the block, its arrays, and their tree; a function is its own definition."""
    definition, state = nnx.split(block) if isinstance(block, nnx.Module) else (block, None)
    return definition, *jax.tree.flatten(state)


def _found(block: Callable, channels: int, dtype: np.dtype, others: Others) -> int:
    out = jax.eval_shape(views.fresh(block), jax.ShapeDtypeStruct((1, 32, 32, channels), dtype), *others).shape
    if out[:3] != (1, 32, 32):
        raise ValueError(
            f"it turns a map of 32x32 pixels into {'x'.join(map(str, out[1:3])) or 'no map'}: tiles need stride 1 "
            "and SAME padding; wrap the layers around the stride instead"
        )
    pairs, tables = _looked_at(block, channels, dtype, others)
    if pairs:
        raise ValueError(_WIDE.format(_culprit(block, "attention, or a table of every pair of pixels")))
    # A table of the map is made anew for the large maps that are traced here, and may be of the map squared on its way.
    reach = None if tables else windows.reach_of(block, channels, dtype, others)
    return _probed(block, channels, dtype, others) if reach is None else reach


def _looked_at(block: Callable, channels: int, dtype: np.dtype, others: Others) -> tuple[bool, bool]:
    """Whether the block makes numbers for pairs of pixels (of a row at least), and whether it has tables of the map."""
    pairs = tables = True
    for height, width in _LOOKED_AT:
        arrays = list(_arrays(windows.trace(block, (channels,), dtype, others, (1, height, width)).jaxpr))
        map_, sides = height * width, (height, width)
        pairs &= any(array.size and not all(array.size % (map_ * side) for side in sides) for array, _ in arrays)
        tables &= any(array.size and not array.size % map_ for array, fixed in arrays if fixed)
        if not pairs and not tables:
            break
    return pairs, tables


def _arrays(jaxpr) -> Iterator[tuple[Any, bool]]:
    """Shape and type of every array that a jaxpr has or makes, and whether it is a constant."""
    yield from ((constant.aval, True) for constant in jaxpr.constvars)
    for eqn in jaxpr.eqns:
        for inner in cost.jaxprs_in(eqn.params):
            yield from _arrays(cost.open_jaxpr(inner))
        yield from ((atom.aval, True) for atom in eqn.invars if isinstance(atom, jex.Literal))
        yield from ((made.aval, False) for made in eqn.outvars if hasattr(made.aval, "dtype"))


def _bytes_of_one(block: Callable, shape: tuple[int, ...], dtype: np.dtype, others: Others) -> float:
    """Of the largest array that the block makes of a map, as one map more shows; nothing is computed."""

    def made(number: int) -> list[float]:
        arrays = _arrays(windows.trace(block, shape, dtype, others, (number, shape[0], shape[1])).jaxpr)
        return [float(array.size) * array.dtype.itemsize for array, fixed in arrays if not fixed]

    one, two = made(1), made(2)
    return max((b - a for a, b in zip(one, two, strict=True)), default=0) if len(one) == len(two) else max(one)


def _probed(block: Callable, channels: int, dtype: np.dtype, others: Others = ()) -> int:
    for side in _PROBES:
        maps = _maps(side, channels, dtype)
        each = _bytes_of_one(block, maps.values.shape[1:], dtype, others)
        if each > _BYTES:
            raise ValueError(_MUCH.format(each / 1e6, side, side + 1, _culprit(block)))
        at_once = max(1, int(_BYTES / max(each, 1)))
        run, y = _run_with_stand_ins(block, maps.values, others, at_once)
        reach, furthest = _spread(y, maps, _tolerance(dtype) / 100)
        wide = 2 * reach + _INNER + 2 > side
        if not wide and furthest <= reach:
            # What mixes examples may not be seen where not all of them were run at once.
            apart = at_once >= len(maps.values) or not _mixes_examples(run, maps, dtype)
            if apart and _windows_fit(run, y, maps, reach, _tolerance(dtype)):
                return reach
            problem = _UNEVEN
            break
        problem = _WIDE.format(_culprit(block)) if wide else _ACROSS
        if furthest >= _PROBES[0] - 1:
            break
    raise ValueError(_MIXING if _mixes_examples(run, maps, dtype) else problem)


class _Maps(NamedTuple):
    """Maps (N, side, side + 1, C): a random one, a loud one, and copies of the first with one pixel changed.

    Loud, so that offsets and gates that follow the content show what they do far out. The random one is cut from
    `around`, a larger map (1, H, W, C).
    """

    values: np.ndarray
    changed: tuple[tuple[int, int], ...]
    around: np.ndarray


def _maps(side: int, channels: int, dtype: np.dtype) -> _Maps:
    """One side is odd and the other even: the padding of strides inside a block depends on it."""
    random, most = np.random.default_rng(0), _AROUND
    around = random.normal(size=(1, most, most + 1, channels))
    start = (most - side) // 2
    base = around[0, start : start + side, start : start + side + 1]
    places, values = [], [base, 30 * random.normal(size=base.shape)]
    for place, changes in (
        ((side // 2, side // 2), _CHANGES),
        ((0, 0), _CHANGES[:2]),
        ((side - 1, side), _CHANGES[:2]),
    ):
        for change in changes:
            places.append(place)
            values.append(base.copy())
            values[-1][place] += change
    stacked = np.stack(values)
    stacked = stacked if jnp.issubdtype(dtype, jnp.floating) else np.nan_to_num(stacked)
    return _Maps(stacked.astype(dtype), tuple(places), around.astype(dtype))


def _spread(y: np.ndarray, maps: _Maps, tolerance: float) -> tuple[int, int]:
    """How far a change in the centre is seen, and the furthest that any change is."""
    distances = [_distance(place, _differ(y[0], y[2 + n], tolerance)) for n, place in enumerate(maps.changed)]
    pairs = zip(maps.changed, distances, strict=True)
    return max(distance for place, distance in pairs if place == maps.changed[0]), max(distances)


def _windows_fit(run: Callable, y: np.ndarray, maps: _Maps, reach: int, tolerance: float) -> bool:
    """Whether windows in the corners, at the borders and in the middle are as in the whole map, as tiles need them."""
    (side, width), size = y.shape[1:3], 2 * reach + _INNER
    middle = max(at for at in (1, 5, 7) if at < side - size)
    rows = [(0, size), (middle, middle + size), (side - size, side)]
    columns = [(0, size + 1), (middle, middle + size + 1), (width - size - 1, width)]
    places = [(number, row, column) for number in (0, 1) for row in rows for column in columns]
    got = run(np.stack([maps.values[n, r[0] : r[1], c[0] : c[1]] for n, r, c in places]))
    wrong = []
    for window, (number, row, column) in zip(got, places, strict=True):
        # A window is right up to the reach from its border, and up to the border itself where that is the map's.
        (up, down), (left, right) = (
            (first + reach * (first > 0), last - reach * (last < end))
            for (first, last), end in ((row, side), (column, width))
        )
        part = window[up - row[0] : down - row[0], left - column[0] : right - column[0]]
        wrong.append(_differ(part, y[number, up:down, left:right], tolerance).ravel())
    # A step may fall to the other side by rounding, at a few places in a million.
    if np.concatenate(wrong).mean() > 1e-4:
        return False
    # The map as a window of a larger one, for what reaches past it on all sides, as two taps far apart do.
    start, inner = (_AROUND - side) // 2, slice(reach, side - reach)
    whole = run(maps.around)[0, start : start + side, start : start + side]
    wrong.append(_differ(y[0, :, :side][inner, inner], whole[inner, inner], tolerance).ravel())
    return bool(np.concatenate(wrong).mean() <= 1e-4)


def _mixes_examples(run: Callable, maps: _Maps, dtype: np.dtype) -> bool:
    """Whether the result for an example depends on the others."""
    together = run(maps.values[:2], at_once=2)
    alone = np.concatenate([run(maps.values[:1]), run(maps.values[1:2])])
    return bool(_differ(alone, together, _tolerance(dtype)).any())


def _tolerance(dtype: np.dtype) -> float:
    """By which two computations of one value may differ by rounding, as a share of it."""
    return 1e-3 if dtype.itemsize > 2 else 0.1


def _differ(a: np.ndarray, b: np.ndarray, tolerance: float) -> np.ndarray:
    """Where two outputs differ by more than rounding."""
    sizes = np.abs(b[np.isfinite(b)])
    return ~np.isclose(a, b, rtol=tolerance, atol=tolerance * np.median(sizes) if sizes.size else 0, equal_nan=True)


def _distance(place: tuple[int, int], differs: np.ndarray) -> int:
    """The largest distance in rows or columns from `place` of what differs, (H, W, D)."""
    found = np.argwhere(differs.any(-1))
    return int(np.abs(found - place).max()) if len(found) else 0


def _run_with_stand_ins(
    block: Callable, maps: np.ndarray, others: Others, most: int
) -> tuple[Callable[..., np.ndarray], np.ndarray]:
    """`block`, compiled, with random numbers for its parameters and what else it takes, since the real ones may be
    tracers; and its output. At most so many maps are run at once."""
    definition, leaves, tree = _parts(block)

    @jax.jit
    def compiled(leaves, x, others):
        own = nnx.merge(definition, tree.unflatten(leaves)) if isinstance(block, nnx.Module) else block
        return own(x, *(jnp.repeat(other, x.shape[0], 0) for other in others))

    for positive in (False, True):

        def run(x: np.ndarray, positive: bool = positive, at_once: int = most) -> np.ndarray:
            with jax.ensure_compile_time_eval():
                stand_ins = [_stand_in(n, leaf.shape, leaf.dtype, positive) for n, leaf in enumerate(leaves)]
                more = [_stand_in(n, each.shape, each.dtype, positive) for n, each in enumerate(others, len(leaves))]
                parts = [x[start : start + at_once] for start in range(0, len(x), at_once)]
                y = np.concatenate([compiled(stand_ins, part, more).astype(jnp.float32) for part in parts])
            return y.reshape(*y.shape[:3], -1)

        y = run(maps)
        if np.isfinite(y[0]).mean() > 0.5:
            return run, y
    raise ValueError(
        "it gives NaN or infinity for a random map and random parameters, so that its reach cannot be seen; wrap the "
        "layers around what gives them"
    )


def _stand_in(number: int, shape: tuple[int, ...], dtype, positive: bool) -> np.ndarray | jax.Array:
    """A random array in the place of a parameter, of a size that keeps what passes through at its size.

    Vectors are positive always: among them are variances and scales.
    """
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), shape)
    if not jnp.issubdtype(dtype, jnp.floating):
        return np.zeros(shape, dtype)
    random = np.random.default_rng(number)
    if len(shape) < 2:
        return random.uniform(0.5, 1.5, shape).astype(dtype)
    values = random.normal(size=shape) * (2 / max(math.prod(shape[:-1]), 1)) ** 0.5
    return (np.abs(values) if positive else values).astype(dtype)


def _culprit(
    block: Callable, otherwise: str = "global pooling, attention, noise, or a normalisation over the map"
) -> str:
    """Names the layer that is known to mix a whole map, if there is one."""
    if isinstance(block, nnx.Module):
        for path, module in nnx.iter_modules(block):
            if isinstance(module, nnx.GroupNorm | nnx.InstanceNorm | nnx.MultiHeadAttention):
                return f" ({type(module).__name__} at {'/'.join(map(str, path))!r})"
    return f" ({otherwise})"


def window_macs(block: Callable, x: Tree, size: int, radius: int) -> float:
    """MACs that the compact execution spends on one tile of `size` pixels of `x`, its border included."""
    block, x, others = as_map(views.still(block), shapes(x))
    closed = windows.trace(block, x.shape, x.dtype, others)
    window, inside, more = windows.window(closed, size, radius)
    if not windows.supported(closed, size=size, radius=radius):
        return cost.macs(block, window, *more)
    run = functools.partial(windows.run_strip, closed, size=size, radius=radius)
    return cost.macs(run, window, inside, more)
