"""Tiles of a map computed on their own, in windows with the border that the block's receptive field needs.

Where `windows` can run the block, the windows of several tiles lie in one strip; other blocks run as they are on whole
windows, which the border of the map pushes inwards.

Letters: B examples, H W pixels, C channels, h w tiles.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import export, lax
from jax.extend import core as jex
from jaxtyping import Array, Bool, Float, Int

from dynjax.core import windows
from dynjax.core.arguments import Tree, as_map

_Pixel = tuple[jax.Array, jax.Array]
"""Rows and columns, one a tile."""


def tile_pixels(keep: Float[Array, "B h w"], size: int, pixels: Sequence[int]) -> Float[Array, "B H W"]:
    """Every pixel's tile's value; `pixels` (H, W) cuts what the last tiles have too much."""
    fine = jnp.repeat(jnp.repeat(keep, size, axis=1), size, axis=2)
    return fine[:, : pixels[0], : pixels[1]]


@dataclasses.dataclass(frozen=True)
class KeptTiles:
    """What `block` makes of the kept tiles of a map; the others have what `base` has. Made by `kept_tiles`."""

    block: Callable[..., Array]
    closed: jex.ClosedJaxpr | None  # for strips; None runs the block on whole windows
    source: Float[Array, "B h_ w_ C"]  # the map, at least as large as a window
    base: Callable[[], Float[Array, "B h_ w_ D"]]
    others: tuple[Array, ...]  # what else the block takes, each with the examples as its first axis
    pixels: tuple[int, int]  # height and width of the map
    grid: tuple[int, int]
    order: Int[Array, " tiles"]  # all tiles, the kept ones first
    number: Int[Array, ""]  # of kept tiles
    size: int
    radius: int

    def few_at_a_time(self) -> Array:
        """A loop over the kept tiles, as many side by side as make a strip."""
        total = self.order.size
        # Where the batch is free it may be one example.
        least = math.prod(self.grid) if export.is_symbolic_dim(total) else total
        group = strip_tiles(self.size, self.radius, least)
        last = self.order[jnp.maximum(self.number - 1, 0)]

        def body(i, out):
            places = i * group + jnp.arange(group, dtype=jnp.int32)
            # The last strip may have places to spare; they repeat the last tile, and write the same pixels again.
            tiles = jnp.where(places < self.number, self.order[jnp.minimum(places, total - 1)], last)
            at = self._place(tiles)
            for k, y in enumerate(self._outputs(tiles)):
                out = self._written(out, y, *jax.tree.map(lambda n, k=k: n[k], at))
            return out

        return self._cut(lax.fori_loop(0, -(-self.number // group), body, self.base()))

    def at_once(self, capacity: int) -> Array:
        """The first `capacity` tiles side by side, of which the kept ones count."""
        tiles, base = self.order[:capacity], self.base()
        y = jax.vmap(lambda tile: self._outputs(tile[None])[0][0])(tiles)
        example, (row, column), (top, left) = self._place(tiles)
        pixels = jnp.arange(self.size, dtype=jnp.int32)
        rows, columns = top[:, None] + pixels[None, :], left[:, None] + pixels[None, :]
        own = (rows >= row[:, None])[:, :, None] & (columns >= column[:, None])[:, None, :]
        # The places beyond the kept ones point past the last example: their result is written nowhere.
        used = own & (jnp.arange(capacity) < self.number)[:, None, None]
        example = jnp.where(used, example[:, None, None], base.shape[0])
        return self._cut(base.at[example, rows[:, :, None], columns[:, None, :]].set(y, mode="drop"))

    def _place(self, tiles: jax.Array) -> tuple[jax.Array, _Pixel, _Pixel]:
        """Example, first pixel that a tile owns, and that where it is computed, which the border may push inwards."""
        rows, columns = self.grid
        row, column = tiles // columns % rows * self.size, tiles % columns * self.size
        bottom, right = (jnp.int32(n - self.size) for n in self.source.shape[1:3])
        return tiles // (rows * columns), (row, column), (jnp.minimum(row, bottom), jnp.minimum(column, right))

    def _outputs(self, tiles: jax.Array) -> list[jax.Array]:
        """Outputs (1, size, size, C') of a few tiles, computed side by side."""
        example, _, (top, left) = self._place(tiles)
        ways, window = dict(size=self.size, radius=self.radius), self.size + 2 * self.radius
        cuts = [
            cut(self.source, example[k], top[k], left[k], shift=self.closed is not None, **ways)
            for k in range(tiles.size)
        ]
        others = [other.at[example].get(mode="promise_in_bounds") for other in self.others]
        if self.closed is not None:
            inside = inside_map(top, left, self.pixels, **ways)
            y = windows.run_strip(self.closed, lax.concatenate(cuts, 2), inside, others, **ways)
            starts = [k * window + self.radius for k in range(tiles.size)]
            return [lax.slice_in_dim(y, start, start + self.size, axis=2) for start in starts]
        y = self.block(lax.concatenate(cuts, 0), *others)
        skip = [
            first - jnp.clip(first - self.radius, 0, n - window)
            for first, n in zip((top, left), self.source.shape[1:3], strict=True)
        ]
        shape = (1, self.size, self.size, y.shape[3])
        return [lax.dynamic_slice(y, (k, skip[0][k], skip[1][k], 0), shape) for k in range(tiles.size)]

    def _written(self, out: jax.Array, y: jax.Array, example: jax.Array, own: _Pixel, at: _Pixel) -> jax.Array:
        """`out` with the tile `y` in its place."""
        (row, column), (top, left) = own, at
        start = (example, top, left, jnp.int32(0))
        if any(n % self.size for n in self.pixels):
            pixels = jnp.arange(self.size, dtype=jnp.int32)
            mine = (pixels + top >= row)[:, None] & (pixels + left >= column)[None, :]
            y = jnp.where(mine[None, :, :, None], y, lax.dynamic_slice(out, start, y.shape))
        return lax.dynamic_update_slice(out, y, start)

    def _cut(self, out: jax.Array) -> jax.Array:
        return out[:, : self.pixels[0], : self.pixels[1]]


def kept_first(kept: Bool[Array, " N"]) -> tuple[Int[Array, " N"], Int[Array, ""]]:
    """All units, the kept ones first and in their order, and how many these are.

    Where their number is free, as when a program is exported for any batch, the first is in the places of the others.
    """
    units, number = kept.shape[0], kept.sum(dtype=jnp.int32)
    if not export.is_symbolic_dim(kept.shape[0]):
        return jnp.argsort(~kept, stable=True).astype(jnp.int32), number
    # ONNX sorts a known length only. Counting and scattering would be slower on a CPU where there are few.
    place = jnp.where(kept, jnp.cumsum(kept, dtype=jnp.int32) - 1, units)
    return jnp.zeros(units, jnp.int32).at[place].set(jnp.arange(units, dtype=jnp.int32), mode="drop"), number


def kept_tiles(
    block: Callable[[Tree], Array],
    x: Tree,
    keep: Float[Array, "B h w"],
    other: Callable[[], Float[Array, "B H W D"]],
    size: int,
    radius: int,
) -> KeptTiles | None:
    """The tiles of `x` to compute, `other` elsewhere; None where the map has no room for a window of this block."""
    block, x, others = as_map(block, x)
    (height, width), (rows, columns), window = x.shape[1:3], keep.shape[1:], size + 2 * radius
    kept = (keep > 0.5).reshape(-1)
    order, number = kept_first(kept)
    closed = windows.trace(block, x.shape[1:], x.dtype, others)
    stripped = windows.supported(closed, size=size, radius=radius)
    # A map smaller than one window grows to it; the strip's `inside` keeps what was added from counting. Whole windows
    # rely on the block's own padding at the border of the map, so they cannot be larger than the map.
    grow = [(0, 0), (0, max(0, window - height)), (0, max(0, window - width)), (0, 0)]
    grows = any(end for _, end in grow)
    if grows and not stripped:
        return None
    source, base = (jnp.pad(x, grow), lambda: jnp.pad(other(), grow)) if grows else (x, other)
    strips, pixels, grid = closed if stripped else None, (height, width), (rows, columns)
    return KeptTiles(block, strips, source, base, others, pixels, grid, order, number, size, radius)


# Windows


def cut(
    x: jax.Array, example: jax.Array, top: jax.Array, left: jax.Array, *, size: int, radius: int, shift: bool = True
) -> jax.Array:
    """The window (1, size + 2 radius, size + 2 radius, C) around the tile at (top, left), zero outside the map.

    Without `shift` a window that would leave the map is the nearest one that does not.
    """
    side, zero = size + 2 * radius, jnp.int32(0)
    row = lax.clamp(zero, top - radius, jnp.int32(x.shape[1] - side))
    column = lax.clamp(zero, left - radius, jnp.int32(x.shape[2] - side))
    part = lax.dynamic_slice(x, (example, row, column, zero), (1, side, side, x.shape[3]))
    if not shift:
        return part
    # At the border the slice was pushed inwards: shift it back, which is a copy of one window and not of the map.
    part = lax.pad(part, jnp.zeros((), x.dtype), ((0, 0, 0), (radius, radius, 0), (radius, radius, 0), (0, 0, 0)))
    return lax.dynamic_slice(part, (zero, top - row, left - column, zero), (1, side, side, x.shape[3]))


def inside_map(top: jax.Array, left: jax.Array, pixels: tuple[int, int], *, size: int, radius: int) -> jax.Array:
    """Which pixels (1, rows, T * columns, 1) of the windows around T tiles lie in a map of `pixels` (H, W)."""
    offsets = jnp.arange(size + 2 * radius, dtype=jnp.int32)[None, :] - radius
    rows, columns = top[:, None] + offsets, left[:, None] + offsets
    rows, columns = (rows >= 0) & (rows < pixels[0]), (columns >= 0) & (columns < pixels[1])
    both = rows.T[:, :, None] & columns[None, :, :]
    return both.reshape(1, both.shape[0], -1, 1)


def strip_tiles(size: int, radius: int, total: int, columns: int = 108) -> int:
    """Tiles in one strip: about `columns` wide, at most a quarter of all tiles, so that little is computed in vain."""
    return max(1, min(total // 4, math.ceil(columns / (size + 2 * radius))))
