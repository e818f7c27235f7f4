"""Executors carry a decision out. One signature, two executions with the same answer.

`masked` computes everything and blends: differentiable, for training. `compact` computes only what was kept, under `jit`, with static shapes.
How compact skips is a `strategy`: "loop" has a trip count known at run time (a CPU pays for exactly what is kept), "buckets" picks one of a
few capacities and makes one large launch (what a GPU or TPU wants; an overflow takes the next capacity, nothing is dropped), "auto" chooses by
platform. Where nearly everything is kept, both run the block on the whole input, past a break-even that `benchmarks/executors.py` measures.

Blocks are called as they are and must not change state (BatchNorm on running averages) when compact.
Letters: B examples, H W pixels, C channels, h w tiles, K branches.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dynjax import windows

Execution = Literal["masked", "compact"]
Strategy = Literal["auto", "loop", "buckets"]

CAPACITIES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
"""Shares of all units that the buckets hold; more takes the whole input."""
BREAK_EVEN_SAMPLES = 0.9
"""Share of examples from which the whole batch is faster than the kept examples one by one."""
BREAK_EVEN_TILES = 0.8
"""Pixels computed for the kept tiles, as a share of the map, from which the whole map is faster."""


def blend(keep: Float[Array, "..."], kept: Array, other: Array) -> Array:
    """`kept` where `keep` is 1 and `other` where it is 0; the gradient to `keep` is their difference.

    `keep` has the leading axes of the others. Exact: a hard 0 or 1 leaves no rounding behind.
    """
    keep = keep.reshape(keep.shape + (1,) * (kept.ndim - keep.ndim)).astype(kept.dtype)
    return keep * kept + (1 - keep) * other


def samples(
    block: Callable[[Array], Array],
    x: Float[Array, "B ..."],
    keep: Float[Array, "B"],
    *,
    otherwise: Callable[[Array], Array] | None = None,
    execution: Execution = "masked",
    strategy: Strategy = "auto",
) -> Array:
    """`block(x)` for the kept examples and `otherwise(x)` (default: `x` itself) for the others.

    Raises:
        ValueError: if `block` and `otherwise` give different shapes.
    """
    other = x if otherwise is None else otherwise(x)
    if execution == "masked":
        return blend(keep, _like(block(x), other), other)
    _like(shape_of(block, x), other)
    return _samples_compact(block, x, keep, other, strategy)


def tiles(
    block: Callable[[Array], Array],
    x: Float[Array, "B H W C"],
    keep: Float[Array, "B h w"],
    *,
    size: int,
    radius: int,
    otherwise: Callable[[Array], Array] | None = None,
    execution: Execution = "masked",
    strategy: Strategy = "auto",
) -> Array:
    """`block(x)` on the kept tiles of `size` pixels and `otherwise(x)` (default: `x` itself) on the others.

    `block` must have stride 1, SAME padding and a receptive radius of at most `radius` pixels. The last row and column of tiles are cut by
    the border where H or W is no multiple of `size`.

    Raises:
        ValueError: if `keep` has another number of tiles, or `block` and `otherwise` give different shapes.
    """
    grid = tuple(-(-n // size) for n in x.shape[1:3])
    if keep.shape != (x.shape[0], *grid):
        raise ValueError(f"keep has shape {keep.shape}; {x.shape[1]}x{x.shape[2]} pixels in tiles of {size} need {(x.shape[0], *grid)}")
    other = x if otherwise is None else otherwise(x)
    if execution == "masked":
        return blend(tile_pixels(keep, size, x.shape[1:3]), _like(block(x), other), other)
    _like(shape_of(block, x), other)
    return _tiles_compact(block, x, keep, other, size, radius, strategy)


def branches(
    blocks: Sequence[Callable[[Array], Array]],
    x: Float[Array, "B ..."],
    choice: Float[Array, "B *tiles K"],
    *,
    size: int | None = None,
    radius: int | Sequence[int] = 0,
    execution: Execution = "masked",
    strategy: Strategy = "auto",
) -> Array:
    """The block that `choice` (one-hot over K) picks, per example, or per tile of `size` pixels.

    `radius`: receptive radius of each block in pixels, or one for all; per tile only.
    """
    if choice.shape[-1] != len(blocks):
        raise ValueError(f"choice has {choice.shape[-1]} branches and there are {len(blocks)} blocks")
    radii = (radius,) * len(blocks) if isinstance(radius, int) else tuple(radius)
    if execution == "masked":
        outs = [block(x) for block in blocks]
        weights = [choice[..., k] for k in range(len(blocks))]
        weights = weights if size is None else [tile_pixels(w, size, x.shape[1:3]) for w in weights]
        zero = jnp.zeros_like(outs[0])
        return sum((blend(w, _like(y, zero), zero) for w, y in zip(weights, outs, strict=True)), zero)
    spec = shape_of(blocks[0], x)
    y = jnp.zeros(spec.shape, spec.dtype)
    for k, block in enumerate(blocks):
        _like(shape_of(block, x), y)
        if size is None:
            y = _samples_compact(block, x, choice[..., k], y, strategy)
        else:
            y = _tiles_compact(block, x, choice[..., k], y, size, radii[k], strategy)
    return y


def tile_pixels(keep: Float[Array, "B h w"], size: int, pixels: Sequence[int]) -> Float[Array, "B H W"]:
    """Every pixel's tile's value; `pixels` (H, W) cuts what the last tiles have too much."""
    fine = jnp.repeat(jnp.repeat(keep, size, axis=1), size, axis=2)
    return fine[:, : pixels[0], : pixels[1]]


# Examples


def _samples_compact(block, x, keep, other, strategy):
    kept = keep > 0.5
    order = jnp.argsort(~kept, stable=True)
    number = kept.sum(dtype=jnp.int32)
    examples = x.shape[0]

    def whole():
        return blend(kept.astype(other.dtype), block(x), other)

    def loop():
        def body(i, out):
            one = lax.dynamic_index_in_dim(x, order[i], keepdims=True)
            return lax.dynamic_update_index_in_dim(out, block(one), order[i], 0)

        def some():
            return lax.fori_loop(0, number, body, other)

        return lax.cond(number > BREAK_EVEN_SAMPLES * examples, whole, some) if examples > 1 else some()

    def buckets():
        def run(capacity):
            index = order[:capacity]
            # The places beyond the kept ones point past the end: their result is written nowhere.
            index = jnp.where(jnp.arange(capacity) < number, index, examples)
            return other.at[index].set(block(x.at[index].get(mode="clip")), mode="drop")

        return _buckets(number, examples, run, whole, other)

    return _by_platform(strategy, loop, buckets)


# Tiles


def _tiles_compact(block, x, keep, other, size, radius, strategy):
    examples, height, width, _ = x.shape
    rows, columns = keep.shape[1:]
    kept = (keep > 0.5).reshape(-1)
    total, number = kept.size, kept.sum(dtype=jnp.int32)
    order = jnp.argsort(~kept, stable=True)
    window = size + 2 * radius
    # A map smaller than one window grows to it; `inside` keeps what was added from counting.
    grow = tuple(max(0, window - n) for n in (height, width))
    source = jnp.pad(x, ((0, 0), (0, grow[0]), (0, grow[1]), (0, 0))) if any(grow) else x
    closed = windows.trace(block, x.shape, x.dtype)
    stripped = windows.supported(closed, size=size, radius=radius)
    if not stripped and any(grow):
        # Whole windows rely on the block's own padding at the border of the map, so they cannot be larger than the map.
        return blend(tile_pixels(keep, size, (height, width)), block(x), other)

    def place(tile):
        """Example, first row and column of a tile; one that the border cuts starts earlier, so that it is whole."""
        example, rest = jnp.divmod(tile, rows * columns)
        row, column = jnp.divmod(rest, columns)
        return example, jnp.minimum(row * size, source.shape[1] - size), jnp.minimum(column * size, source.shape[2] - size)

    def run(tiles_):
        """The output (1, size, size, C') of each of these tiles."""
        places = [place(t) for t in tiles_]
        cut = functools.partial(windows.cut, source, size=size, radius=radius)
        if stripped:
            strip = jnp.concatenate([cut(*p) for p in places], axis=2)
            inside = jnp.concatenate([windows.inside(p[1], p[2], (height, width), size=size, radius=radius) for p in places], 2)
            y = windows.run_strip(closed, strip, inside, size=size, radius=radius)
            return [lax.slice_in_dim(y, k * window + radius, k * window + radius + size, axis=2) for k in range(len(places))]
        starts = [tuple(jnp.clip(p[i] - radius, 0, source.shape[i] - window) for i in (1, 2)) for p in places]
        cuts = [
            lax.dynamic_slice(source, (p[0], *s, 0), (1, window, window, x.shape[-1])) for p, s in zip(places, starts, strict=True)
        ]
        y = block(jnp.concatenate(cuts))
        return [
            lax.dynamic_slice(y, (k, p[1] - s[0], p[2] - s[1], 0), (1, size, size, y.shape[-1]))
            for k, (p, s) in enumerate(zip(places, starts, strict=True))
        ]

    def write(out, tile, y):
        example, top, left = place(tile)
        if height % size or width % size:
            row, column = jnp.divmod(tile % (rows * columns), columns)
            own = (jnp.arange(size) + top >= row * size)[:, None] & (jnp.arange(size) + left >= column * size)
            y = jnp.where(own[None, :, :, None], y, lax.dynamic_slice(out, (example, top, left, 0), y.shape))
        return lax.dynamic_update_slice(out, y, (example, top, left, 0))

    def whole():
        mask = tile_pixels(kept.reshape(keep.shape).astype(other.dtype), size, (height, width))
        return blend(mask, block(x), other)

    def grown():
        return jnp.pad(other, ((0, 0), (0, grow[0]), (0, grow[1]), (0, 0))) if any(grow) else other

    def loop():
        group = windows.strip_tiles(size, radius, total)
        last = order[jnp.maximum(number - 1, 0)]

        def body(i, out):
            places = i * group + jnp.arange(group)
            # The last strip may have places to spare; they repeat the last tile, and write the same pixels again.
            chosen = jnp.where(places < number, order[jnp.minimum(places, total - 1)], last)
            for tile, y in zip(chosen, run(list(chosen)), strict=True):
                out = write(out, tile, y)
            return out

        def some():
            return lax.fori_loop(0, -(-number // group), body, grown())[:, :height, :width]

        if total == 1:
            return lax.cond(number > 0, whole, lambda: other)
        return lax.cond(number > break_even(size, radius) * total, whole, some)

    def buckets():
        def some(capacity):
            chosen = order[:capacity]
            y = lax.map(lambda tile: run([tile])[0][0], chosen, batch_size=capacity)
            example, top, left = place(chosen)
            row, column = jnp.divmod(chosen % (rows * columns), columns)
            r, c = top[:, None] + jnp.arange(size)[None], left[:, None] + jnp.arange(size)[None]
            used = (jnp.arange(capacity) < number)[:, None, None]
            own = used & (r >= (row * size)[:, None])[:, :, None] & (c >= (column * size)[:, None])[:, None, :]
            at = jnp.where(own, example[:, None, None], examples)
            out = grown().at[at, r[:, :, None], c[:, None, :]].set(y, mode="drop")
            return out[:, :height, :width]

        return _buckets(number, total, some, whole, other)

    return _by_platform(strategy, loop, buckets)


def break_even(size: int, radius: int) -> float:
    """Share of kept tiles from which the block is faster on the whole map."""
    return BREAK_EVEN_TILES / ((size + 2 * radius) * (size + radius) / size**2)


# Shared


def _buckets(number, total, run, whole, other):
    """The smallest capacity that holds `number` units; none at all for 0, the whole input past the largest."""
    capacities = sorted({math.ceil(share * total) for share in CAPACITIES if math.ceil(share * total) < total})
    index = jnp.where(number == 0, 0, 1 + jnp.searchsorted(jnp.asarray([*capacities, total]), number))
    return lax.switch(index, [lambda: other, *(functools.partial(run, c) for c in capacities), whole])


def _by_platform(strategy, loop, buckets):
    if strategy == "auto":
        return lax.platform_dependent(cpu=loop, default=buckets)
    if strategy not in ("loop", "buckets"):
        raise ValueError(f"strategy={strategy!r} must be 'auto', 'loop' or 'buckets'")
    return loop() if strategy == "loop" else buckets()


def shape_of(block: Callable, x: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Shape and type of `block(x)`."""
    # A module handed to JAX itself is named by its repr, which prints every parameter: seconds for one block.
    return jax.eval_shape(lambda x: block(x), jax.ShapeDtypeStruct(x.shape, x.dtype))


def _like(y, other):
    """`y`, once its shape is known to be that of what it is put together with."""
    if y.shape != other.shape:
        raise ValueError(
            f"the block gives shape {y.shape} and what it is put together with has {other.shape}; give an `otherwise` (or branches) of one shape"
        )
    return y
