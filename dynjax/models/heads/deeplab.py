"""The head of DeepLabv3+ (Chen et al. 2018, arXiv:1802.02611, section 3).

Letters: B examples, H W pixels, C D channels, K classes.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynjax.models.blocks import Block, Classify, ClassifyingHead, Mix, batch_norm, enlarge
from dynjax.models.dense import Backbone, HeadConfig, Site
from dynjax.models.registry import Family, register
from dynjax.models.rules import Count, Range, Rule, Sides, Width


@dataclasses.dataclass(frozen=True)
class DeepLabHeadConfig:
    """An atrous pyramid on the coarsest map, beside a finer one."""

    family: Literal["deeplab"] = "deeplab"
    features: Width = 96
    """Channels of the pyramid; the paper's 256."""
    rates: Sides = (2, 4, 6)
    """Dilations of its 3x3 convolutions, in pixels of the coarsest map; the paper's 6, 12 and 18 are for 33x33."""
    fine: Width = 24
    """Channels that the finer map is reduced to; the paper's 48."""
    stride: Annotated[int, Range(1, 32)] = 4
    """Pixels of the picture, along a side, to one of that map."""
    blocks: Count = 1
    """Residual blocks behind both, at the finer map's resolution."""


class Separable(nnx.Module):
    """A dilated 3x3 convolution of each channel, and a linear layer, both normalised (section 3.1)."""

    def __init__(self, before: int, after: int, rate: int = 1, *, rngs: nnx.Rngs):
        self.depthwise = nnx.Conv(
            before,
            before,
            (3, 3),
            kernel_dilation=(rate, rate),
            feature_group_count=before,
            use_bias=False,
            rngs=rngs,
        )
        self.norm = batch_norm(before, rngs=rngs)
        self.mix = Mix(before, after, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        return self.mix(nnx.relu(self.norm(self.depthwise(x))))


class AtrousPyramid(nnx.Module):
    """A linear layer, dilated convolutions and the mean of the map, side by side and mixed (figure 2).

    The mean is not normalised, as a batch of one would have it 0.
    """

    def __init__(self, before: int, features: int, rates: Sequence[int], *, rngs: nnx.Rngs):
        self.before, self.point = before, Mix(before, features, rngs=rngs)
        self.branches = nnx.List([Separable(before, features, rate, rngs=rngs) for rate in rates])
        self.whole = nnx.Linear(before, features, rngs=rngs)
        self.mix = Mix((2 + len(rates)) * features, features, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        mean = nnx.relu(self.whole(x.mean((1, 2), keepdims=True)))
        own = [self.point(x), *(branch(x) for branch in self.branches)]
        return self.mix(jnp.concatenate([*own, jnp.broadcast_to(mean, own[0].shape)], -1))


class DeepLabHead(ClassifyingHead):
    """The pyramid, enlarged, beside the finer map with few channels; a separable convolution, blocks, and logits.

    Deviation: the coarsest map is what the backbone gives; the paper dilates its last stage instead of a stride of 32.
    """

    def __init__(self, config: DeepLabHeadConfig, backbone: Backbone, classes: int, *, rngs: nnx.Rngs):
        self.level, self.strides = level_of(config.stride, backbone), backbone.strides
        features = config.features
        self.pyramid = AtrousPyramid(backbone.widths[-1], features, config.rates, rngs=rngs)
        self.reduce = Mix(backbone.widths[self.level], config.fine, rngs=rngs)
        self.join = Separable(features + config.fine, features, rngs=rngs)
        self.features, self.blocks = features, nnx.List([Block(features, rngs=rngs) for _ in range(config.blocks)])
        self.classify = Classify(features, classes, self.strides[self.level], rngs=rngs)

    def decode(self, maps: Sequence[Array]) -> jax.Array:
        fine = self.reduce(maps[self.level])
        coarse = enlarge(self.pyramid(maps[-1]), self.strides[-1] // self.strides[self.level])
        x: jax.Array = self.join(jnp.concatenate([coarse[:, : fine.shape[1], : fine.shape[2]], fine], -1))
        for block in self.blocks:
            x = block(x)
        return x

    def sites(self) -> Iterator[Site]:
        return (Site(self.blocks, number, self.features, self.level) for number in range(len(self.blocks)))

    def scales(self) -> Iterator[Site]:
        """The dilated convolutions of the pyramid."""
        branches, level = self.pyramid.branches, len(self.strides) - 1
        return (Site(branches, number, self.pyramid.before, level) for number in range(len(branches)))


def level_of(stride: int, backbone: Backbone) -> int:
    """The backbone's map of that stride. Raises ValueError where there is none."""
    if stride not in backbone.strides:
        told = ", ".join(map(str, backbone.strides))
        raise ValueError(f"--model.head.stride {stride}: the backbone has maps of stride {told}")
    return backbone.strides.index(stride)


def _rules(config: DeepLabHeadConfig, backbone: object) -> Iterator[Rule]:
    yield Rule("rates", config.rates, len(config.rates) >= 1, "one or more")


SMALL = dict(features=8, rates=(1, 2), fine=4, stride=2)
FAMILY = register(Family(DeepLabHeadConfig, DeepLabHead, tiny=SMALL, rules=_rules), HeadConfig)
