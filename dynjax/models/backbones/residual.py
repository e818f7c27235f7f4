"""The encoder of a residual U-Net (after Ronneberger et al. 2015, arXiv:1505.04597).

Letters: B examples, H W pixels, C channels.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Literal

import jax
from flax import nnx
from jaxtyping import Array, UInt8

from dynjax.models import rules
from dynjax.models.blocks import Block, Mix, gather_pixels, pixels
from dynjax.models.dense import BackboneConfig, Site, sites_of
from dynjax.models.registry import Family, register
from dynjax.models.rules import Counts, Rule, Widths


@dataclasses.dataclass(frozen=True)
class ResidualConfig:
    """Levels of residual blocks, each at half the resolution of the one before."""

    family: Literal["residual"] = "residual"
    widths: Widths = (32, 48, 64, 96)
    """Channels of each level, finest first."""
    blocks: Counts = (1, 1, 1, 1)
    """Residual blocks of each level."""
    stem_stride: int = 2
    """The finest level works at 1/stem_stride of the picture."""


class Residual(nnx.Module):
    """Level 0 works at 1/`stem_stride` of the picture, each further level at half of the one before; odd sizes are
    rounded up."""

    def __init__(self, config: ResidualConfig, *, rngs: nnx.Rngs):
        widths, blocks, stride = config.widths, config.blocks, config.stem_stride
        self.widths, self.strides = widths, tuple(stride * 2**level for level in range(len(widths)))
        side = max(3, 2 * stride - 1)
        self.stem = nnx.Conv(3, widths[0], (side, side), (stride, stride), use_bias=False, rngs=rngs)
        self.stem_norm = nnx.BatchNorm(widths[0], momentum=0.95, rngs=rngs)
        levels = [nnx.List([Block(w, rngs=rngs) for _ in range(n)]) for w, n in zip(widths, blocks, strict=True)]
        self.blocks = nnx.List(levels)
        self.down = nnx.List([Mix(4 * fine, coarse, rngs=rngs) for fine, coarse in itertools.pairwise(widths)])

    def __call__(self, image: UInt8[Array, "B H W 3"]) -> list[jax.Array]:
        x = nnx.relu(self.stem_norm(self.stem(pixels(image, self.stem.kernel.dtype))))
        maps = []
        for level, blocks in enumerate(self.blocks):
            x = self.down[level - 1](gather_pixels(x)) if level else x
            for block in blocks:
                x = block(x)
            maps.append(x)
        return maps

    def sites(self) -> Iterator[Site]:
        return sites_of(self.blocks, self.widths)

    @property
    def tail(self) -> nnx.List:
        return self.blocks[-1]

    def peel(self) -> nnx.Module:
        self.widths, self.strides = self.widths[:-1], self.strides[:-1]
        return nnx.Sequential(gather_pixels, self.down.pop(), *self.blocks.pop())


def _rules(config: ResidualConfig) -> Iterator[Rule]:
    yield from rules.levels(config.widths, config.blocks, "level")
    yield from rules.one_of("stem_stride", config.stem_stride, 1, 2, 4)


SMALL = dict(widths=(8, 12), blocks=(1, 0))
FAMILY = register(Family(ResidualConfig, Residual, tiny=SMALL, rules=_rules), BackboneConfig)
