"""Kernels of the pixel: filters that are generated for every place of the map. Stand-ins for `nnx.Conv`.

They mix pixels within a channel. Where a convolution would also change the channels, a linear layer over them follows.
Without pooling over the map they may be inside `Tiles`.

Letters: B examples, H W pixels, h w pixels of the output, C D channels in and out, G groups of channels that share a
kernel, V channels of a guide.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynjax.core import convolve, geometry
from dynjax.core.geometry import Sides


class _PixelFilter(nnx.Module):
    """What all of these share: sides of the kernel in the words of `nnx.Conv`, and a linear layer where channels
    change, which each makes last."""

    project: nnx.Linear | None

    def __init__(self, in_features: int, out_features: int, kernel_size: Sides, strides: Sides, kernel_dilation: Sides):
        self.in_features, self.out_features = in_features, out_features
        self.kernel_size = geometry.pair(kernel_size, "kernel_size")
        self.strides = geometry.pair(strides, "strides")
        self.kernel_dilation = geometry.pair(kernel_dilation, "kernel_dilation")

    def _filtered(self, x: jax.Array, kernels: jax.Array, channel_kernels: jax.Array | None = None) -> jax.Array:
        """`x` under the kernels (B, h, w, taps * groups) of its pixels."""
        kernels = kernels.reshape(*kernels.shape[:3], *self.kernel_size, -1)
        ways = dict(strides=self.strides, dilation=self.kernel_dilation)
        y = convolve.per_pixel(x, kernels, channel_kernels=channel_kernels, **ways)
        return y if self.project is None else self.project(y)


class Involution(_PixelFilter):
    """Every pixel generates its own kernel, which the channels of a group share (Li et al. 2021, arXiv:2103.06255).

    y[i, j, c] = sum over taps of H[i, j, tap, c G // C] x[(i, j) + tap, c], with H[i, j] = W_1 relu(norm(W_0 x[i, j]))
    (section 3). With strides, output pixel (i, j) is centred on the pixel (i, j) times the strides, and x is averaged
    over the strides from there on before it generates kernels, as in the authors' code. Deviations: where a stride does
    not divide the map, its last pixels give a pixel too; where `out_features` is not `in_features`, a linear layer
    follows. MACs for each output pixel: C C / r + C / r kh kw G + kh kw C.

    Args:
        group_channels: channels that share a kernel, C / G; fewer where there are not so many.
        reduction: r, of the layer between.
        others: as in `nnx.Conv`; the padding is SAME.

    Raises:
        ValueError: if the channels cannot be parted into groups.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sides = (7, 7),
        strides: Sides = 1,
        *,
        group_channels: int = 16,
        reduction: int = 4,
        kernel_dilation: Sides = 1,
        rngs: nnx.Rngs,
    ):
        super().__init__(in_features, out_features, kernel_size, strides, kernel_dilation)
        group_channels = min(group_channels, in_features)
        if in_features % group_channels:
            raise ValueError(f"group_channels={group_channels} must divide in_features={in_features}")
        groups, hidden = in_features // group_channels, max(in_features // reduction, 1)
        self.reduce = nnx.Linear(in_features, hidden, use_bias=False, rngs=rngs)
        # As in models/blocks.py: short trainings need statistics that follow sooner than flax's default.
        self.norm = nnx.BatchNorm(hidden, momentum=0.95, rngs=rngs)
        self.span = nnx.Linear(hidden, math.prod(self.kernel_size) * groups, rngs=rngs)
        self.project = _projection(in_features, out_features, rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        seen = x
        if self.strides != (1, 1):
            seen = nnx.avg_pool(x, self.strides, self.strides, "SAME", count_include_pad=False)
        return self._filtered(x, self.span(nnx.relu(self.norm(self.reduce(seen)))))


class DDF(_PixelFilter):
    """Decoupled dynamic filter: one per pixel times one per channel (Zhou et al. 2021, arXiv:2104.14107).

    y[i, j, c] = sum over taps of S[i, j, tap] T[tap, c] x[(i, j) + tap, c]; S is linear in x[i, j], T squeezes and
    excites the mean over the map, and both are normalised over their taps (filter normalisation), then scaled and
    shifted by learned numbers: one pair for S, one for each channel of T (section 3). With strides, S and the window
    are those of the pixel (i, j) times the strides. Deviations from the authors' code, which shifts neither: it scales
    S by a constant, and T by a learned number for each channel and tap that starts at random; its standard deviation
    divides by n - 1 for n taps, here by n, a constant factor that the scale takes up. Where `out_features` is not
    `in_features`, a linear layer follows. MACs for each output pixel: C kh kw + 2 kh kw C; per example: C A +
    A kh kw C, with A hidden units.

    Args:
        squeeze: A as a share of C.
        others: as in `nnx.Conv`; the padding is SAME.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sides = (3, 3),
        strides: Sides = 1,
        *,
        squeeze: float = 0.2,
        kernel_dilation: Sides = 1,
        rngs: nnx.Rngs,
    ):
        super().__init__(in_features, out_features, kernel_size, strides, kernel_dilation)
        taps, hidden = math.prod(self.kernel_size), max(int(squeeze * in_features), 1)
        self.spatial = nnx.Linear(in_features, taps, rngs=rngs)
        self.squeeze = nnx.Linear(in_features, hidden, rngs=rngs)
        self.excite = nnx.Linear(hidden, taps * in_features, rngs=rngs)
        # Each filter starts with the deviation at which a sum of so many taps, followed by ReLU, keeps its size.
        deviation = (2 / taps) ** 0.5
        self.spatial_scale, self.spatial_shift = nnx.Param(jnp.full((), deviation)), nnx.Param(jnp.zeros(()))
        self.channel_scale = nnx.Param(jnp.full((in_features,), deviation))
        self.channel_shift = nnx.Param(jnp.zeros((in_features,)))
        self.project = _projection(in_features, out_features, rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        (down, across), channels = self.strides, x.shape[-1]
        spatial = _standardised(self.spatial(x[:, ::down, ::across]), -1)
        spatial = spatial * self.spatial_scale[...] + self.spatial_shift[...]
        channel = self.excite(nnx.relu(self.squeeze(x.astype(jnp.float32).mean((1, 2)).astype(x.dtype))))
        channel = _standardised(channel.reshape(len(x), -1, channels), 1)
        channel = channel * self.channel_scale[...][None, None] + self.channel_shift[...][None, None]
        return self._filtered(x, spatial, channel.reshape(len(x), *self.kernel_size, channels))


class DynamicFilter(_PixelFilter):
    """Dynamic local filtering: a filter for each pixel, from a network that may look at another picture (De Brabandere
    et al. 2016, arXiv:1605.09673, section 3).

    y[i, j] = sum over taps of F[i, j, tap] x[(i, j) + tap], one filter for all channels; F comes from a 3x3 convolution
    of the guide, ReLU and a linear layer, and with `softmax` passes a softmax over its taps, as where the paper
    predicts frames by moving pixels. Deviations: that small network, where the paper has an encoder and decoder of many
    layers; where `out_features` is not `in_features`, a linear layer follows. MACs for each pixel:
    9 V A + A kh kw + kh kw C, with A hidden units.

    Args:
        guide: channels V of another map of the same size, given at call time, that the filters are made from; None
            makes them from x.
        hidden: A, of the network that makes the filters.
        softmax: whether a filter's taps are positive and sum to 1.
        others: as in `nnx.Conv`; stride 1 and SAME padding.

    Raises:
        ValueError: for a guide that is missing, or has other channels or another size.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sides = (3, 3),
        *,
        guide: int | None = None,
        hidden: int = 16,
        softmax: bool = False,
        kernel_dilation: Sides = 1,
        rngs: nnx.Rngs,
    ):
        super().__init__(in_features, out_features, kernel_size, 1, kernel_dilation)
        self.guide, self.softmax = guide, softmax
        self.look = nnx.Conv(in_features if guide is None else guide, hidden, (3, 3), rngs=rngs)
        self.make = nnx.Linear(hidden, math.prod(self.kernel_size), rngs=rngs)
        self.project = _projection(in_features, out_features, rngs)

    def __call__(
        self, x: Float[Array, "B H W C"], guide: Float[Array, "B H W V"] | None = None
    ) -> Float[Array, "B H W D"]:
        if (guide is None) != (self.guide is None):
            given = "none is given" if guide is None else "one is given; make it with guide="
            raise ValueError(f"DynamicFilter was made with guide={self.guide} and {given}")
        if guide is not None and guide.shape != (*x.shape[:3], self.guide):
            raise ValueError(f"guide has shape {guide.shape}; it must be {(*x.shape[:3], self.guide)}")
        filters = self.make(nnx.relu(self.look(x if guide is None else guide)))
        return self._filtered(x, jax.nn.softmax(filters) if self.softmax else filters)


def _projection(in_features: int, out_features: int, rngs: nnx.Rngs) -> nnx.Linear | None:
    return None if in_features == out_features else nnx.Linear(in_features, out_features, use_bias=False, rngs=rngs)


def _standardised(filters: jax.Array, axis: int) -> jax.Array:
    """Mean 0 and deviation 1 over the taps of each filter."""
    filters = filters - filters.mean(axis, keepdims=True)
    return filters * jax.lax.rsqrt(jnp.square(filters).mean(axis, keepdims=True) + 1e-6)
