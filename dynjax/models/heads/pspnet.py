"""The head of PSPNet (Zhao et al. 2017, arXiv:1612.01105, section 3.2).

Letters: B examples, H W pixels, C D channels, K classes.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dynjax.models.blocks import Block, Classify, ClassifyingHead, ConvNorm, Mix, enlarge
from dynjax.models.dense import Backbone, HeadConfig, Site
from dynjax.models.heads.deeplab import level_of
from dynjax.models.registry import Family, register
from dynjax.models.rules import Count, Range, Rule, Sides, Width


@dataclasses.dataclass(frozen=True)
class PSPNetHeadConfig:
    """Means over parts of the map beside the map itself."""

    family: Literal["pspnet"] = "pspnet"
    features: Width = 64
    """Channels behind the pyramid; the paper's 512."""
    bins: Sides = (1, 2, 3, 6)
    """Parts, along a side, over which the map is averaged."""
    stride: Annotated[int, Range(1, 32)] = 8
    """Pixels of the picture, along a side, to one of the map; coarser maps are enlarged and added to it."""
    blocks: Count = 1
    """Residual blocks behind the pyramid."""


def pooled(x: Float[Array, "B H W C"], parts: int) -> Float[Array, "B {parts} {parts} C"]:
    """Means over parts x parts windows that cover the map: from floor(i H / parts) to ceil((i + 1) H / parts), as in
    PyTorch's adaptive pooling. Windows of few pixels overlap."""
    rows, columns = (jnp.asarray(_means(side, parts), x.dtype) for side in x.shape[1:3])
    return jnp.einsum("ph,bhwc,qw->bpqc", rows, x, columns, optimize="optimal")


def _means(side: int, parts: int) -> np.ndarray:
    """(parts, side): the share of every pixel in every window."""
    starts, ends = np.arange(parts) * side // parts, -(-(np.arange(1, parts + 1) * side) // parts)
    places = np.arange(side)
    inside = (places >= starts[:, None]) & (places < ends[:, None])
    return inside / inside.sum(1, keepdims=True)


class PooledPyramid(nnx.Module):
    """The map, and its means over several numbers of parts through a linear layer each, interpolated to its size.

    Deviation: the means are not normalised: of one part of one picture a batch has but one number.
    """

    def __init__(self, channels: int, bins: Sequence[int], *, rngs: nnx.Rngs):
        self.bins, each = tuple(bins), max(1, channels // len(bins))
        self.linears = nnx.List([nnx.Linear(channels, each, rngs=rngs) for _ in bins])
        self.features = channels + each * len(bins)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        found = [x]
        for parts, linear in zip(self.bins, self.linears, strict=True):
            y = nnx.relu(linear(pooled(x, parts)))
            found.append(jax.image.resize(y, (*x.shape[:3], y.shape[-1]), "bilinear"))
        return jnp.concatenate(found, -1)


class PSPNetHead(ClassifyingHead):
    """The maps from the coarsest up to that of `stride` as one of `features` channels, the pyramid, a 3x3 convolution,
    blocks and logits.

    Deviation: the paper dilates the backbone's last stages so that one map has stride 8; here coarser maps are added.
    There is no auxiliary loss.
    """

    def __init__(self, config: PSPNetHeadConfig, backbone: Backbone, classes: int, *, rngs: nnx.Rngs):
        self.level, self.strides, self.features = level_of(config.stride, backbone), backbone.strides, config.features
        self.gather = Gather(backbone, self.level, config.features, rngs=rngs)
        self.pyramid = PooledPyramid(config.features, config.bins, rngs=rngs)
        self.join = ConvNorm(self.pyramid.features, config.features, 3, rngs=rngs)
        self.blocks = nnx.List([Block(config.features, rngs=rngs) for _ in range(config.blocks)])
        self.classify = Classify(config.features, classes, config.stride, rngs=rngs)

    def decode(self, maps: Sequence[Array]) -> jax.Array:
        x = self.join(self.pyramid(self.gather(maps)))
        for block in self.blocks:
            x = block(x)
        return x

    def sites(self) -> Iterator[Site]:
        return (Site(self.blocks, number, self.features, self.level) for number in range(len(self.blocks)))

    def scales(self) -> Iterator[Site]:
        return self.gather.scales()


class Gather(nnx.Module):
    """The sum of a map and of all coarser ones, enlarged, each through a linear layer."""

    def __init__(self, backbone: Backbone, level: int, features: int, *, rngs: nnx.Rngs):
        self.level, self.widths = level, backbone.widths
        self.factors = [stride // backbone.strides[level] for stride in backbone.strides[level:]]
        self.mixes = nnx.List([Mix(width, features, rngs=rngs) for width in backbone.widths[level:]])

    def __call__(self, maps: Sequence[Array]) -> Float[Array, "B H W C"]:
        height, width = maps[self.level].shape[1:3]
        parts = zip(self.mixes, self.factors, maps[self.level :], strict=True)
        first, *others = [enlarge(mix(x), factor)[:, :height, :width] for mix, factor, x in parts]
        return sum(others, first)

    def scales(self) -> Iterator[Site]:
        """All but the map itself."""
        coarser = enumerate(self.widths[self.level + 1 :], 1)
        return (Site(self.mixes, number, width, self.level + number) for number, width in coarser)


def _rules(config: PSPNetHeadConfig, backbone: object) -> Iterator[Rule]:
    yield Rule("bins", config.bins, len(config.bins) >= 1, "one or more")


SMALL = dict(features=8, bins=(1, 2), stride=2)
FAMILY = register(Family(PSPNetHeadConfig, PSPNetHead, tiny=SMALL, rules=_rules), HeadConfig)
