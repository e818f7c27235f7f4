"""Where the taps of a convolution fall, and its gradients for one example.

Letters: B examples, H W pixels, h w pixels of the output, C D channels in and out.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

Padding = str | int | Sequence[int | tuple[int, int]]
Sides = int | Sequence[int]
"""One number, or one for height and one for width."""


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Strides, padding, dilation and groups of a convolution of maps, channels last."""

    strides: tuple[int, int]
    pads: tuple[tuple[int, int], ...]
    dilation: tuple[int, int]
    groups: int

    def convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            kernel,
            self.strides,
            self.pads,
            rhs_dilation=self.dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
        )

    def out_size(self, size: Sequence[int], sides: Sequence[int]) -> tuple[int, int]:
        """Height and width of the output."""
        axes = zip(size, sides, self.strides, self.pads, self.dilation, strict=True)
        height, width = ((n + sum(pad) - (side - 1) * gap - 1) // stride + 1 for n, side, stride, pad, gap in axes)
        return height, width

    def tap(self, padded: jax.Array, u: int, v: int, size: Sequence[int]) -> jax.Array:
        """What the tap (u, v) reads for every output pixel, from the padded map (..., H, W, C)."""
        start, stop, step = [0] * padded.ndim, list(padded.shape), [1] * padded.ndim
        for axis, place, n, stride, gap in zip((-3, -2), (u, v), size, self.strides, self.dilation, strict=True):
            start[axis], stop[axis], step[axis] = place * gap, place * gap + (n - 1) * stride + 1, stride
        return lax.slice(padded, start, stop, step)

    def side_by_side(self, x: jax.Array, sides: Sequence[int]) -> jax.Array:
        """(B, h, w, kh kw C): what the kernel sees for every output pixel."""
        padded, size = jnp.pad(x, ((0, 0), *self.pads, (0, 0))), self.out_size(x.shape[1:3], sides)
        return jnp.concatenate([self.tap(padded, u, v, size) for u, v in taps(sides)], axis=-1)

    def kernel_gradient(self, x: jax.Array, slope: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Of one example (H, W, C): for every tap a product of the shifted map with the slopes (h, w, D)."""
        padded = lax.pad(x, jnp.zeros((), x.dtype), [(*pad, 0) for pad in self.pads] + [(0, 0, 0)])
        flat = slope.reshape(-1, self.groups, shape[3] // self.groups)
        maps = [self.tap(padded, u, v, slope.shape[:2]).reshape(-1, self.groups, shape[2]) for u, v in taps(shape[:2])]
        if self.groups == 1:
            products = [a[:, 0].T @ flat[:, 0] for a in maps]
        else:
            products = [jnp.einsum("ngc,ngd->cgd", a, flat) for a in maps]
        return jnp.stack(products).reshape(shape)

    def shifted(self, padded: jax.Array, kernel: jax.Array, size: Sequence[int]) -> jax.Array:
        """Depthwise, of a padded map (B, H, W, C)."""
        y = jnp.zeros((len(padded), *size, padded.shape[3]), padded.dtype)
        for u, v in taps(kernel.shape[:2]):
            y = y + self.tap(padded, u, v, size) * kernel[None, None, u, v]
        return y

    def transposed(self, sides: Sequence[int], size: Sequence[int], out: Sequence[int]) -> list[tuple[int, int, int]]:
        """`lax.pad` of slopes of `out` pixels, for the gradient to a map of `size`: spread to stride 1, with borders.

        Rows that no output reads, at the end of a strided map, get zeros. Less than none is cut off.
        """
        axes = zip(sides, self.dilation, self.strides, self.pads, size, out, strict=True)
        return [
            ((side - 1) * gap - low, n + low - (m - 1) * stride - 1, stride - 1)
            for side, gap, stride, (low, _), n, m in axes
        ]

    def input_gradient(self, kernel: jax.Array, slope: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Of one example: the slopes, spread to stride 1, convolved with the turned kernel."""
        sides, (inputs, outputs) = kernel.shape[:2], kernel.shape[2:]
        # The kernel is really turned: dimension numbers that say so take XLA's slow path on CPUs.
        turned = kernel[::-1, ::-1].reshape(*sides, inputs, self.groups, outputs // self.groups)
        turned = jnp.transpose(turned, (0, 1, 4, 3, 2)).reshape(*sides, outputs // self.groups, self.groups * inputs)
        borders = self.transposed(sides, shape[:2], slope.shape[:2])
        # Less than no padding is cut off before: XLA's convolution on CPUs reads past the map then.
        pads = tuple((max(start, 0), max(end, 0)) for start, end, _ in borders)
        crops = [(min(start, 0), min(end, 0), between) for start, end, between in borders]
        spread = lax.pad(slope, jnp.zeros((), slope.dtype), [*crops, (0, 0, 0)])
        return dataclasses.replace(self, strides=(1, 1), pads=pads).convolve(spread[None], turned)[0]


def geometry_of(size, sides, strides, padding, dilation, groups) -> Geometry:
    strides, pads, dilation = pair(strides, "strides"), pads_of(padding), pair(dilation, "dilation")
    if isinstance(pads, str):
        reach = [(side - 1) * gap + 1 for side, gap in zip(sides, dilation, strict=True)]
        pads = tuple(lax.padtype_to_pads(size, reach, strides, pads))
    return Geometry(strides, pads, dilation, groups)


def pads_of(padding: Padding) -> str | tuple[tuple[int, int], ...]:
    """The padding as it is kept: SAME, VALID, or (low, high) for height and width. Raises ValueError."""
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(f"padding={padding!r} must be 'SAME', 'VALID', or numbers of pixels")
        return padding
    sides = (padding, padding) if isinstance(padding, int) else padding
    return tuple((side, side) if isinstance(side, int) else (int(side[0]), int(side[1])) for side in sides)


def pair(value: Sides, name: str) -> tuple[int, int]:
    """Numbers for height and width. Raises ValueError naming the option `name`."""
    numbers = (value, value) if isinstance(value, int) else tuple(value)
    if len(numbers) != 2 or min(numbers) < 1:
        raise ValueError(f"{name}={value} must be one number from 1, or two, for height and width")
    return numbers


def taps(sides: Sequence[int]) -> list[tuple[int, int]]:
    return [(u, v) for u in range(sides[0]) for v in range(sides[1])]
