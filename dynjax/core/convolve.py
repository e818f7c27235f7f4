"""Convolutions as the platform wants them, and with kernels of the input: one for each example, or for each pixel.

XLA's grouped convolutions take many times as long on CPUs as a sum of shifted products, and a convolution of single
pixels is a matrix product, with a faster gradient; `convolution` is `jax.lax.conv_general_dilated` that chooses, and
`by_platform` puts it into the layers of a model.

`vmap` of a convolution over kernels becomes one with as many groups as there are examples, which a CPU runs many times
slower than the static convolution; mixing the outputs of K convolutions costs K convolutions. So here the "loop"
strategy convolves one example after the other, and makes each kernel only when its turn comes, and "grouped" is one
convolution with a group for each example, the single large launch that a GPU or TPU wants. `benchmarks/kernels.py`
measures all of them.

Letters: B examples, H W pixels, h w pixels of the output, C D channels in and out, I channels of a group (C / groups),
G groups of channels that share a kernel, K kernels that are mixed.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

Strategy = Literal["auto", "loop", "grouped"]
DepthwiseStrategy = Literal["auto", "shifted", "grouped"]
Padding = str | int | Sequence[int | tuple[int, int]]
Sides = int | Sequence[int]
"""One number, or one for height and one for width."""


def generated(
    x: Float[Array, "B H W C"],
    codes: Any,
    shared: Any,
    kernel_of: Callable[[Any, Any], Array],
    *,
    strides: Sides = 1,
    padding: Padding = "SAME",
    dilation: Sides = 1,
    groups: int = 1,
    strategy: Strategy = "auto",
) -> Float[Array, "B h w D"]:
    """Example b convolved with the kernel `kernel_of(codes[b], shared)` of shape (kh, kw, C / groups, D).

    The loop makes one kernel at a time, also for the gradient, so that no more than one is ever in memory; its
    gradients are of reverse mode only (no `jax.jvp`). MACs: the static convolution's, and `kernel_of`'s per example.

    Args:
        codes: tree of arrays whose first axis is the example.
        shared: tree of arrays that all examples share, such as the kernels to mix.
        kernel_of: a function that closes over no arrays, for example `mixture`.
        padding: "SAME", "VALID", pixels on every side, or (low, high) for height and width.
        strategy: "loop" or "grouped"; "auto" takes the loop on CPUs. The loop gathers a batch split over devices.

    Raises:
        ValueError: if shapes do not agree, or for another padding or strategy.
    """
    kernel = jax.eval_shape(kernel_of, jax.tree.map(lambda leaf: leaf[0], codes), shared)
    if kernel.ndim != 4 or kernel.shape[2] * groups != x.shape[3] or kernel.shape[3] % groups:
        raise ValueError(
            f"kernels of shape {kernel.shape} do not fit {x.shape[3]} channels in groups={groups}: "
            f"they must be (kh, kw, {x.shape[3]} / groups, a multiple of groups)"
        )
    examples = {leaf.shape[0] for leaf in jax.tree.leaves(codes)}
    if examples != {x.shape[0]}:
        raise ValueError(f"there are {x.shape[0]} examples and kernels for {sorted(examples)}")
    geometry = _geometry(x.shape[1:3], kernel.shape[:2], strides, padding, dilation, groups)
    if strategy == "auto":
        # Not lax.platform_dependent, as in execute.py: it traces both ways.
        strategy = "loop" if jax.default_backend() == "cpu" else "grouped"
    if strategy not in ("loop", "grouped"):
        raise ValueError(f"strategy={strategy!r} must be 'auto', 'loop' or 'grouped'")
    dtype = jnp.promote_types(x.dtype, kernel.dtype)
    if strategy == "loop":
        return _loop(kernel_of, geometry, x.astype(dtype), codes, shared)
    kernels = jax.vmap(kernel_of, (0, None))(codes, shared).astype(dtype)
    return _grouped(geometry, x.astype(dtype), kernels)


def mixture(weights: Float[Array, " K"], kernels: Float[Array, "K kh kw I D"]) -> Float[Array, "kh kw I D"]:
    """Sum of the kernels under their weights, for `generated`."""
    # A product of matrices: of more axes XLA makes a slower loop.
    return (weights @ kernels.reshape(kernels.shape[0], -1)).reshape(kernels.shape[1:])


def per_pixel(
    x: Float[Array, "B H W C"],
    kernels: Float[Array, "B h w kh kw G"],
    *,
    channel_kernels: Float[Array, "B kh kw C"] | None = None,
    strides: Sides = 1,
    dilation: Sides = 1,
) -> Float[Array, "B h w C"]:
    """Every output pixel from its neighbourhood under a kernel of its own, which the channels of a group share.

    y[b, i, j, c] = sum over taps u, v of kernels[b, i, j, u, v, c G // C] x[b, i + u, j + v, c], counted from the
    centre, and x is 0 outside of the map; with `channel_kernels` each tap is multiplied by channel_kernels[b, u, v, c]
    too. With strides, kernels[b, i, j] is centred on the pixel (i, j) times the strides, whatever the map's size, as in
    the code of Involution and DDF. A SAME convolution is centred one pixel further where the size is even. A sum of
    shifted products: the neighbourhoods, kh kw times the map, are never laid out in memory.

    MACs: kh kw C for each output pixel, twice that with `channel_kernels`; taps on the padding count.

    Raises:
        ValueError: if shapes do not agree.
    """
    batch, height, width, *sides, groups = kernels.shape
    channels = x.shape[3]
    # The padding of stride 1: with SAME for the stride, XLA would move the centres, and kernels belong to pixels.
    geometry = _geometry(x.shape[1:3], sides, 1, "SAME", dilation, 1)
    geometry = dataclasses.replace(geometry, strides=pair(strides, "strides"))
    if (batch, height, width) != (x.shape[0], *geometry.out_size(x.shape[1:3], sides)):
        raise ValueError(
            f"kernels of shape {kernels.shape} do not fit x of shape {x.shape} with strides={geometry.strides}: there "
            f"must be one for each of {(x.shape[0], *geometry.out_size(x.shape[1:3], sides))} output pixels"
        )
    if channels % groups:
        raise ValueError(f"{channels} channels cannot be parted into groups={groups} of one size")
    if channel_kernels is not None and channel_kernels.shape != (batch, *sides, channels):
        raise ValueError(f"channel_kernels has shape {channel_kernels.shape}; it must be {(batch, *sides, channels)}")
    padded = jnp.pad(x, ((0, 0), *geometry.pads, (0, 0)))
    y = jnp.zeros((batch, height, width, groups, channels // groups), jnp.result_type(x, kernels))
    for u, v in _taps(sides):
        shifted = geometry.tap(padded, u, v, (height, width))
        # Products written as einsum, which XLA turns into plain products, so that cost.macs counts them.
        if channel_kernels is not None:
            shifted = jnp.einsum("bhwc,bc->bhwc", shifted, channel_kernels[:, u, v])
        y = y + jnp.einsum("bhwgc,bhwg->bhwgc", shifted.reshape(y.shape), kernels[:, :, :, u, v])
    return y.reshape(batch, height, width, channels)


Model = TypeVar("Model", bound=nnx.Module)
_LAST = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
"""Channels last, as `nnx.Conv` has them."""
_plain = contextvars.ContextVar("_plain", default=False)


def convolution(
    x: Float[Array, "B *pixels C"],
    kernel: Float[Array, "*sides I D"],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    **ways: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, on CPUs by shifted products where it is depthwise and by a matrix product where
    its kernel has one pixel: the same numbers but for rounding."""
    numbers = lax.conv_dimension_numbers(x.shape, kernel.shape, dimension_numbers)
    channels = numbers.lhs_spec == _LAST.lhs_spec and numbers.rhs_spec == _LAST.rhs_spec
    channels = channels and numbers.out_spec == _LAST.out_spec and set(lhs_dilation or (1,)) == {1}
    asked = any(value is not None for value in ways.values())  # a precision, say
    groups = feature_group_count
    if _here() and channels and not asked and padding != "SAME_LOWER":
        if groups > 1 and kernel.shape[2:] == (1, groups):
            dilation = rhs_dilation or 1
            return depthwise(x, kernel, strides=window_strides, padding=padding, dilation=dilation, strategy="shifted")
        bare = isinstance(padding, str) or not any(map(any, padding))
        if groups == 1 and kernel.shape[:2] == (1, 1) and bare:
            return x[:, :: window_strides[0], :: window_strides[1]] @ kernel[0, 0]
    return lax.conv_general_dilated(
        x, kernel, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, groups, **ways
    )


def _here() -> bool:
    return jax.default_backend() == "cpu" and not _plain.get()


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Inside this all convolutions are XLA's own, for what reads them in a jaxpr."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def by_platform(model: Model) -> Model:
    """`model` itself, in whose `nnx.Conv`s `convolution` convolves, unless they have something else of their own."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Conv) and module.conv_general_dilated is lax.conv_general_dilated:
            module.conv_general_dilated = convolution
    return model


def depthwise(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "kh kw 1 C"],
    *,
    strides: Sides = 1,
    padding: Padding = "SAME",
    dilation: Sides = 1,
    strategy: DepthwiseStrategy = "auto",
) -> Float[Array, "B h w C"]:
    """A kernel for each channel. On CPUs, where XLA's grouped convolution takes many times as long, a sum of shifted
    products, which is one loop. MACs: kh kw C for each output pixel.

    Args:
        padding: as in `generated`.
        strategy: "shifted" or "grouped"; "auto" takes the former on CPUs.

    Raises:
        ValueError: for another padding or strategy.
    """
    if strategy == "auto":
        strategy = "shifted" if _here() else "grouped"
    if strategy not in ("shifted", "grouped"):
        raise ValueError(f"strategy={strategy!r} must be 'auto', 'shifted' or 'grouped'")
    sides = kernel.shape[:2]
    geometry = _geometry(x.shape[1:3], sides, strides, padding, dilation, x.shape[3])
    if strategy == "grouped":
        return geometry.convolve(x, kernel)
    size = geometry.out_size(x.shape[1:3], sides)
    padded = jnp.pad(x, ((0, 0), *geometry.pads, (0, 0)))
    # Plain products, which `cost.macs` does not see: it counts `plain` convolutions. An einsum's gradient would be a
    # matrix product for each channel, for which XLA lays out the shifted maps anew, channels first.
    y = jnp.zeros((len(x), *size, x.shape[3]), jnp.result_type(x, kernel))
    for u, v in _taps(sides):
        y = y + geometry.tap(padded, u, v, size) * kernel[None, None, u, v]
    return y


# Both strategies


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loop(kernel_of, geometry, x, codes, shared):
    def one(pair):
        example, code = pair
        return geometry.convolve(example[None], kernel_of(code, shared).astype(x.dtype))[0]

    return lax.map(one, (x, codes))


def _loop_backward(kernel_of, geometry, saved, slopes):
    """One example after the other. Autodiff of the loop would convolve with pictures as kernels, and XLA on CPUs is an
    order of magnitude slower at that than at the static convolution's gradient."""
    x, codes, shared = saved

    def one(total, example):
        image, code, slope = example
        kernel, back = jax.vjp(lambda code, shared: kernel_of(code, shared).astype(x.dtype), code, shared)
        own, common = back(geometry.kernel_gradient(image, slope, kernel.shape))
        total = jax.tree.map(lambda t, c: t + c.astype(t.dtype), total, common)
        return total, (geometry.input_gradient(kernel, slope, image.shape), own)

    # Many examples are summed: not in half precision.
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), shared)
    total, (images, own) = lax.scan(one, zeros, (x, codes, slopes))
    return images, own, jax.tree.map(lambda t, leaf: t.astype(leaf.dtype), total, shared)


_loop.defvjp(lambda kernel_of, geometry, *saved: (_loop(kernel_of, geometry, *saved), saved), _loop_backward)


def _grouped(geometry, x, kernels):
    batch, height, width, channels = x.shape
    sides, (inputs, outputs) = kernels.shape[1:3], kernels.shape[3:]
    side_by_side = jnp.moveaxis(x, 0, 2).reshape(1, height, width, batch * channels)
    kernel = jnp.moveaxis(kernels, 0, 3).reshape(*sides, inputs, batch * outputs)
    y = dataclasses.replace(geometry, groups=batch * geometry.groups).convolve(side_by_side, kernel)
    return jnp.moveaxis(y.reshape(*y.shape[1:3], batch, outputs), 2, 0)


# Geometry of one convolution


@dataclasses.dataclass(frozen=True)
class _Geometry:
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

    def kernel_gradient(self, x: jax.Array, slope: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Of one example (H, W, C): for every tap a product of the shifted map with the slopes (h, w, D)."""
        padded = lax.pad(x, jnp.zeros((), x.dtype), [(*pad, 0) for pad in self.pads] + [(0, 0, 0)])
        flat = slope.reshape(-1, self.groups, shape[3] // self.groups)
        maps = [self.tap(padded, u, v, slope.shape[:2]).reshape(-1, self.groups, shape[2]) for u, v in _taps(shape[:2])]
        if self.groups == 1:
            products = [a[:, 0].T @ flat[:, 0] for a in maps]
        else:
            products = [jnp.einsum("ngc,ngd->cgd", a, flat) for a in maps]
        return jnp.stack(products).reshape(shape)

    def input_gradient(self, kernel: jax.Array, slope: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Of one example: the slopes, spread to stride 1, convolved with the turned kernel."""
        sides, (inputs, outputs) = kernel.shape[:2], kernel.shape[2:]
        # The kernel is really turned: dimension numbers that say so take XLA's slow path on CPUs.
        turned = kernel[::-1, ::-1].reshape(*sides, inputs, self.groups, outputs // self.groups)
        turned = jnp.transpose(turned, (0, 1, 4, 3, 2)).reshape(*sides, outputs // self.groups, self.groups * inputs)
        pads, crops = [], []
        for side, gap, stride, (low, _), n, m in zip(
            sides, self.dilation, self.strides, self.pads, shape[:2], slope.shape[:2], strict=True
        ):
            # Rows that no output reads, at the end of a strided map, get zeros.
            start, end = (side - 1) * gap - low, n + low - (m - 1) * stride - 1
            # Less than no padding is cut off before: XLA's convolution on CPUs reads past the map then.
            pads.append((max(start, 0), max(end, 0)))
            crops.append((min(start, 0), min(end, 0), stride - 1))
        spread = lax.pad(slope, jnp.zeros((), slope.dtype), [*crops, (0, 0, 0)])
        return dataclasses.replace(self, strides=(1, 1), pads=tuple(pads)).convolve(spread[None], turned)[0]


def _geometry(size, sides, strides, padding, dilation, groups) -> _Geometry:
    strides, pads, dilation = pair(strides, "strides"), pads_of(padding), pair(dilation, "dilation")
    if isinstance(pads, str):
        reach = [(side - 1) * gap + 1 for side, gap in zip(sides, dilation, strict=True)]
        pads = tuple(lax.padtype_to_pads(size, reach, strides, pads))
    return _Geometry(strides, pads, dilation, groups)


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


def _taps(sides: Sequence[int]) -> list[tuple[int, int]]:
    return [(u, v) for u in range(sides[0]) for v in range(sides[1])]
