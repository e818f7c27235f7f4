"""The decoder of a residual U-Net (after Ronneberger et al. 2015, arXiv:1505.04597).

Letters: B examples, H W pixels, C D channels, K classes.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynjax.models.blocks import Block, Classify, ClassifyingHead, repeat_pixels
from dynjax.models.dense import Backbone, BackboneConfig, HeadConfig, Site, sites_of
from dynjax.models.registry import Family, register
from dynjax.models.rules import Counts, Rule


@dataclasses.dataclass(frozen=True)
class UNetHeadConfig:
    """From the coarsest map up, each merged with the next finer one, and residual blocks."""

    family: Literal["unet"] = "unet"
    blocks: Counts = (1, 1, 1)
    """Residual blocks of each level but the coarsest, finest first."""


class Merge(nnx.Module):
    """`Mix` of a fine map beside a coarse one repeated to its size.

    The coarse one is multiplied before it is repeated: a quarter of the work, with the same result.
    """

    def __init__(self, fine: int, coarse: int, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(fine + coarse, fine, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(fine, momentum=0.95, rngs=rngs)

    def __call__(self, fine: Float[Array, "B H W C"], coarse: Float[Array, "B h w D"]) -> Float[Array, "B H W C"]:
        own, other = jnp.split(self.linear.kernel[...], [fine.shape[-1]])
        y = fine @ own + repeat_pixels(coarse @ other)[:, : fine.shape[1], : fine.shape[2]]
        return nnx.relu(self.norm(y))


class UNetHead(ClassifyingHead):
    """Gives every pixel of the finest map the logits of the stride^2 pixels of the picture under it."""

    def __init__(self, config: UNetHeadConfig, backbone: Backbone, classes: int, *, rngs: nnx.Rngs):
        halves(backbone)
        self.widths = widths = backbone.widths
        self.up = nnx.List([Merge(fine, coarse, rngs=rngs) for fine, coarse in itertools.pairwise(widths)])
        levels = zip(widths[:-1], config.blocks, strict=True)
        self.blocks = nnx.List([nnx.List([Block(w, rngs=rngs) for _ in range(n)]) for w, n in levels])
        self.classify = Classify(widths[0], classes, backbone.strides[0], sharp=True, rngs=rngs)

    def decode(self, maps: Sequence[Array]) -> jax.Array:
        x = maps[-1]
        for level in reversed(range(len(self.blocks))):
            x = self.up[level](maps[level], x)
            for block in self.blocks[level]:
                x = block(x)
        return x

    def sites(self) -> Iterator[Site]:
        return sites_of(self.blocks, self.widths)


def halves(backbone: Backbone) -> None:
    """Raises ValueError where a map has not half the resolution of the one before."""
    strides = backbone.strides
    if any(coarse != 2 * fine for fine, coarse in itertools.pairwise(strides)):
        raise ValueError(f"strides={strides} of the backbone: each level must work at half the resolution")


def of_levels(blocks: tuple[int, ...], backbone: BackboneConfig) -> Iterator[Rule]:
    """Of a field `blocks` of a decoder."""
    levels = len(backbone.widths) - 1
    wanted = f"one number for each level but the coarsest, which are {levels}"
    yield Rule("blocks", blocks, len(blocks) == levels, wanted)


def _rules(config: UNetHeadConfig, backbone: BackboneConfig) -> Iterator[Rule]:
    return of_levels(config.blocks, backbone)


FAMILY = register(Family(UNetHeadConfig, UNetHead, tiny=dict(blocks=(1,)), rules=_rules), HeadConfig)
