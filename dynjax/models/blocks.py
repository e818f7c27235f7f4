"""What several model families are built of: blocks, and changes of resolution that are fast to train on CPUs.

Letters: B examples, H W pixels, C D channels.
"""

import abc
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from dynjax.core.controls import RandomGate
from dynjax.core.gates import BranchGate, ChannelGate, SampleGate, TileGate
from dynjax.ops.shortlist import Shortlist, largest


def pixels(image: UInt8[Array, "B H W 3"] | Float[Array, "B H W 3"], dtype: Any) -> Float[Array, "B H W 3"]:
    """Bytes as numbers from -1 to 1, in the type of the model's parameters."""
    return image.astype(dtype) / 127.5 - 1


def in_channels(x: Float[Array, "B H W 3"], channels: int) -> Float[Array, "B H W C"]:
    """Colours as they are, for 3 channels, or as their mean."""
    return x if channels == 3 else x.mean(-1, keepdims=True)


def as_bytes(x: Float[Array, "B H W C"]) -> UInt8[Array, "B H W 3"]:
    """Numbers from 0 to 1 as bytes of three colours."""
    x = jnp.round(255 * jnp.clip(x.astype(jnp.float32), 0, 1)).astype(jnp.uint8)
    return jnp.broadcast_to(x, (*x.shape[:3], 3))


def leaky(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """A rectifier that lets a fifth of what is negative pass, as in most discriminators."""
    return nnx.leaky_relu(x, 0.2)


def batch_norm(channels: int, *, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """With statistics that follow soon enough for short trainings."""
    return nnx.BatchNorm(channels, momentum=0.95, rngs=rngs)


def make_gate(
    kind: str,
    channels: int,
    *,
    size: int | None = None,
    groups: int | None = None,
    branches: int | None = None,
    rate: float = 0.5,
    rngs: nnx.Rngs,
) -> RandomGate | SampleGate | TileGate | ChannelGate | BranchGate:
    """What decides per picture, or per tile of `size`: yes or no, each of `groups`, or one of `branches`. Of the kind
    "random" it is chance alone, at first at this `rate`."""
    if kind == "random":
        return RandomGate(rate, size=size, units=groups, branches=branches, rngs=rngs)
    if branches is not None:
        return BranchGate(channels, branches, size=size, rngs=rngs)
    if groups is not None:
        return ChannelGate(channels, groups, rngs=rngs)
    return SampleGate(channels, rngs=rngs) if size is None else TileGate(channels, size=size, rngs=rngs)


class Block(nnx.Module):
    """Two 3x3 convolutions, normalised, around a shortcut (He et al. 2016). Receptive radius 2."""

    def __init__(self, channels: int, norm: Callable[..., nnx.Module] = batch_norm, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(channels, channels, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = norm(channels, rngs=rngs)
        self.conv2 = nnx.Conv(channels, channels, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = norm(channels, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        y = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(x + self.norm2(self.conv2(y)))


class PlainBlock(nnx.Module):
    """A linear layer around a shortcut: the cheap 1x1 kernel that `Select` gives to the background."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(channels, channels, use_bias=False, rngs=rngs)
        self.norm = batch_norm(channels, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return nnx.relu(x + self.norm(self.linear(x)))


class Mix(nnx.Module):
    """A linear layer over the channels, normalised, and ReLU: a 1x1 convolution as the product that it is."""

    def __init__(self, before: int, after: int, norm: Callable[..., nnx.Module] = batch_norm, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(before, after, use_bias=False, rngs=rngs)
        self.norm = norm(after, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        return nnx.relu(self.norm(self.linear(x)))


class Down(nnx.Module):
    """Half the resolution, odd sizes rounded up: every 2x2 pixels through one linear layer."""

    def __init__(self, before: int, after: int, norm: Callable[..., nnx.Module] = batch_norm, *, rngs: nnx.Rngs):
        self.mix = Mix(4 * before, after, norm, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        return self.mix(gather_pixels(x))


class ConvNorm(nnx.Module):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, before: int, after: int, side: int, stride: int = 1, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(before, after, (side, side), stride, padding=side // 2, use_bias=False, rngs=rngs)
        self.norm = batch_norm(after, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        return nnx.relu(self.norm(self.conv(x)))


def conv3(before: int, after: int, stride: int, narrow: int | None, *, rngs: nnx.Rngs) -> nnx.Sequential:
    """A 3x3 convolution, behind a 1x1 convolution to `narrow` times its channels where that is fewer."""
    inner = before if narrow is None else min(before, narrow * after)
    first = [] if narrow is None else [ConvNorm(before, inner, 1, rngs=rngs)]
    return nnx.Sequential(*first, ConvNorm(inner, after, 3, stride, rngs=rngs))


class Pyramid(nnx.Module):
    """Maps of the picture, each of half the resolution of the one before and made from it; `widths` channels."""

    def __init__(self, widths: Sequence[int], *, rngs: nnx.Rngs):
        pairs = zip((3, *widths), widths, strict=False)
        self.convs = nnx.List([ConvNorm(a, b, 3, 1 if i == 0 else 2, rngs=rngs) for i, (a, b) in enumerate(pairs)])

    def __call__(self, x: Float[Array, "B H W 3"]) -> list[jax.Array]:
        maps = []
        for conv in self.convs:
            x = conv(x)
            maps.append(x)
        return maps


def gather_pixels(x: Float[Array, "B H W C"], side: int = 2) -> Float[Array, "B h w D"]:
    """Every side x side pixels as one with the channels of all; the last row and column repeated where there are no
    more.

    A stride without a strided convolution, whose weight gradient is slow on CPUs.
    """
    # Not jnp.pad, which also puts no rows before and behind: ONNX has no map without rows.
    x = jnp.concatenate([x, *[x[:, -1:]] * (-x.shape[1] % side)], 1)
    x = jnp.concatenate([x, *[x[:, :, -1:]] * (-x.shape[2] % side)], 2)
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // side, side, width // side, side, channels).swapaxes(2, 3)
    return x.reshape(batch, height // side, width // side, side**2 * channels)


def repeat_pixels(x: Float[Array, "B H W C"]) -> Float[Array, "B 2*H 2*W C"]:
    """Nearest interpolation to twice the size."""
    return jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)


def spread_pixels(x: Float[Array, "B H W C"], factor: int) -> Float[Array, "B H*{factor} W*{factor} D"]:
    """Channels as factor x factor pixels each (sub-pixel convolution, Shi et al. 2016, arXiv:1609.05158, eq. 4)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, factor, factor, channels // factor**2).swapaxes(2, 3)
    return x.reshape(batch, height * factor, width * factor, channels // factor**2)


def enlarge(x: Float[Array, "B H W C"], factor: int) -> Float[Array, "B H*{factor} W*{factor} C"]:
    """Bilinear interpolation, pixels of the border repeated: `jax.image.resize` without its product with a matrix,
    whose work grows with the size of the map."""
    for axis in (1, 2):
        ends = [jax.lax.slice_in_dim(x, start, start + 1, axis=axis) for start in (0, x.shape[axis] - 1)]
        padded = jnp.concatenate([ends[0], x, ends[1]], axis)
        phases = []
        for phase in range(factor):
            place = (phase + 0.5) / factor - 0.5  # of the finer pixel, in those of x
            first = 0 if place < 0 else 1
            low, high = (jax.lax.slice_in_dim(padded, k, k + x.shape[axis], axis=axis) for k in (first, first + 1))
            share = place % 1
            phases.append(low * (1 - share) + high * share)
        shape = list(x.shape)
        shape[axis] *= factor
        x = jnp.stack(phases, axis + 1).reshape(shape)
    return x


def of_pixels(
    logits: Float[Array, "B _h _w _k"], stride: int, sharp: bool, size: tuple[int, int]
) -> Float[Array, "B _H _W _K"]:
    """Logits, float32, of a picture of `size` from those of a map that has one pixel for `stride` x `stride` of it:
    spread, of `stride` squared times the classes, where `sharp`, otherwise interpolated."""
    logits = logits.astype(jnp.float32)
    return (spread_pixels if sharp else enlarge)(logits, stride)[:, : size[0], : size[1]]


class Classify(nnx.Module):
    """Logits of every pixel of a picture, float32, from a map that has one for `stride` x `stride` of them: of each of
    these by itself where `sharp`, otherwise interpolated."""

    def __init__(self, features: int, classes: int, stride: int, sharp: bool = False, *, rngs: nnx.Rngs):
        self.stride, self.sharp, self.features, self.classes = stride, sharp, features, classes
        outputs = classes * (stride**2 if sharp else 1)
        self.linear: nnx.Linear | Shortlist = nnx.Linear(features, outputs, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"], size: tuple[int, int]) -> Float[Array, "B _h _w _K"]:
        pixels = functools.partial(self._pixels, size)
        return self.linear(x, pixels) if isinstance(self.linear, Shortlist) else pixels(self.linear(x))

    def largest(self, x: Float[Array, "B H W C"], size: tuple[int, int]) -> Int[Array, "B _h _w"]:
        """The class of each pixel's largest logit, without an array of all logits."""
        pixels = functools.partial(self._pixels, size)
        if isinstance(self.linear, Shortlist):
            return self.linear.largest(x, pixels)
        return largest(self.linear, x, self.classes, pixels)

    def _pixels(self, size: tuple[int, int], logits: Float[Array, "B H W D"]) -> Float[Array, "B _h _w _n"]:
        """Logits of pixels, of any number of classes."""
        return of_pixels(logits, self.stride, self.sharp, size)


class ClassifyingHead(nnx.Module, abc.ABC):
    """A head whose last layer is `Classify`: an abstract base."""

    classify: Classify

    @abc.abstractmethod
    def decode(self, maps: Sequence[Array]) -> jax.Array:
        """The map (B, H, W, C) that is classified."""

    def __call__(self, maps: Sequence[Array], size: tuple[int, int]) -> Float[Array, "B H W K"]:
        return self.classify(self.decode(maps), size)

    def largest(self, maps: Sequence[Array], size: tuple[int, int]) -> Int[Array, "B H W"]:
        """The class of each pixel's largest logit."""
        return self.classify.largest(self.decode(maps), size)
