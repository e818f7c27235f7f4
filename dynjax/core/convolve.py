"""Convolutions as the platform wants them, and with kernels of the input: one for each example, or for each pixel.

XLA's grouped convolutions take many times as long on CPUs as a sum of shifted products, a convolution of single
pixels is a matrix product, with a faster gradient, and so is one with strides of few channels, as a network begins
with, once what each kernel sees lies side by side; `convolution` is `jax.lax.conv_general_dilated` that chooses, and
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

from dynjax.core.geometry import Padding, Sides, geometry_of, pair, taps

Strategy = Literal["auto", "loop", "grouped"]
DepthwiseStrategy = Literal["auto", "shifted", "grouped"]


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
    geometry = geometry_of(x.shape[1:3], kernel.shape[:2], strides, padding, dilation, groups)
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
    geometry = geometry_of(x.shape[1:3], sides, 1, "SAME", dilation, 1)
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
    for u, v in taps(sides):
        shifted = geometry.tap(padded, u, v, (height, width))
        # Products written as einsum, which XLA turns into plain products, so that cost.macs counts them.
        if channel_kernels is not None:
            shifted = jnp.einsum("bhwc,bc->bhwc", shifted, channel_kernels[:, u, v])
        y = y + jnp.einsum("bhwgc,bhwg->bhwgc", shifted.reshape(y.shape), kernels[:, :, :, u, v])
    return y.reshape(batch, height, width, channels)


Model = TypeVar("Model", bound=nnx.Module)
_LAST = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
"""Channels last, as `nnx.Conv` has them."""
FEW = 36
"""Numbers that a kernel sees, up to which they are laid side by side: 3x3 pixels of four channels."""
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
    its kernel has one pixel, or few numbers of few channels and strides: the same numbers but for rounding. `plain`
    has forward-mode derivatives too."""
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
            return product(x[:, :: window_strides[0], :: window_strides[1]], kernel[0, 0])
        if groups == 1 and max(window_strides) > 1 and kernel[..., 0].size <= FEW:
            geometry = geometry_of(x.shape[1:3], kernel.shape[:2], window_strides, padding, rhs_dilation or 1, 1)
            return product(geometry.side_by_side(x, kernel.shape[:2]), kernel.reshape(-1, kernel.shape[3]))
    return lax.conv_general_dilated(
        x, kernel, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, groups, **ways
    )


def dot_general(x: Float[Array, "..."], kernel: Float[Array, "..."], dimension_numbers: Any, **ways: Any) -> jax.Array:
    """`jax.lax.dot_general`, by `product` where it is a `nnx.Linear`'s: the same numbers but for rounding."""
    asked = any(value is not None for value in ways.values())
    if asked or kernel.ndim != 2 or dimension_numbers != (((x.ndim - 1,), (0,)), ((), ())):
        return lax.dot_general(x, kernel, dimension_numbers, **ways)
    return product(x, kernel)


def product(x: Float[Array, "*pixels C"], kernel: Float[Array, "C D"]) -> Float[Array, "*pixels D"]:
    """`x @ kernel`, on CPUs with all pixels as one axis: of several, XLA lays the slopes out anew for the kernel's
    gradient, pixels last."""
    if not _here() or x.ndim < 3:
        return x @ kernel
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[1])


def _here() -> bool:
    return jax.default_backend() == "cpu" and not _plain.get()


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Inside this all convolutions and products are XLA's own, for what reads them in a jaxpr."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def by_platform(model: Model) -> Model:
    """`model` itself, with `convolution` in its `nnx.Conv`s and `dot_general` in its `nnx.Linear`s, unless they have
    something else of their own."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Conv) and module.conv_general_dilated is lax.conv_general_dilated:
            module.conv_general_dilated = convolution
        if isinstance(module, nnx.Linear) and module.dot_general is lax.dot_general:
            module.dot_general = dot_general
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
    products, which is one loop; its gradients are of reverse mode only (no `jax.jvp`), but inside of `plain`. MACs:
    kh kw C for each output pixel.

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
    geometry = geometry_of(x.shape[1:3], sides, strides, padding, dilation, x.shape[3])
    if strategy == "grouped":
        return geometry.convolve(x, kernel)
    dtype = jnp.result_type(x, kernel)
    return _shifted(geometry, x.astype(dtype), kernel.astype(dtype))


# Depthwise by shifted products


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _shifted(geometry, x, kernel):
    padded = jnp.pad(x, ((0, 0), *geometry.pads, (0, 0)))
    return geometry.shifted(padded, kernel, geometry.out_size(x.shape[1:3], kernel.shape[:2]))


def _shifted_backward(geometry, saved, slopes):
    """Two loops of their own. Autodiff would keep, or make anew, a shifted map of each tap, and add up one at a time.

    Examples stay apart until the end, so that those of a mesh stay where they are. The barriers keep XLA from making
    the padded maps anew for each tap, with all that they are made of.
    """
    x, kernel = saved
    sides, (height, width) = kernel.shape[:2], slopes.shape[1:3]
    pads = geometry.transposed(sides, x.shape[1:3], (height, width))
    spread = lax.pad(slopes, jnp.zeros((), slopes.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
    still = dataclasses.replace(geometry, strides=(1, 1))
    to_x = still.shifted(lax.optimization_barrier(spread), kernel[::-1, ::-1], x.shape[1:3])
    padded = lax.optimization_barrier(jnp.pad(x, ((0, 0), *geometry.pads, (0, 0))))
    tall = (sides[0] - 1) * geometry.dilation[0] + 1

    def products(place):
        """Of a row of the output: what each tap has in each column. Many are summed: not in half precision."""
        slope = lax.dynamic_slice_in_dim(slopes, place, 1, axis=1)
        window = lax.dynamic_slice_in_dim(padded, place * geometry.strides[0], tall, axis=1)
        found = [geometry.tap(window, u, v, (1, width)) * slope for u, v in taps(sides)]
        return [each.astype(jnp.promote_types(each.dtype, jnp.float32)) for each in found]

    def add(sums, place):
        return [total + each for total, each in zip(sums, products(place), strict=True)], None

    sums, _ = lax.scan(add, products(0), jnp.arange(1, height))
    to_kernel = jnp.stack([total.sum((0, 1, 2)) for total in sums]).reshape(kernel.shape)
    return to_x, to_kernel.astype(kernel.dtype)


_shifted.defvjp(lambda geometry, x, kernel: (_shifted(geometry, x, kernel), (x, kernel)), _shifted_backward)


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
