"""The decoder of a residual U-Net (after Ronneberger et al. 2015, arXiv:1505.04597).

Letters: B examples, H W pixels, C D channels, K classes.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynjax.core import convolve
from dynjax.models.blocks import repeat_pixels
from dynjax.models.dense import Backbone, BackboneConfig, HeadConfig
from dynjax.models.heads.decoder import Decoder, of_levels
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
        coarse = repeat_pixels(convolve.product(coarse, other))
        y = convolve.product(fine, own) + coarse[:, : fine.shape[1], : fine.shape[2]]
        return nnx.relu(self.norm(y))


def build(config: UNetHeadConfig, backbone: Backbone, classes: int, *, rngs: nnx.Rngs) -> Decoder:
    return Decoder(Merge, config.blocks, backbone, classes, rngs=rngs)


def _rules(config: UNetHeadConfig, backbone: BackboneConfig) -> Iterator[Rule]:
    return of_levels(config.blocks, backbone)


FAMILY = register(Family(UNetHeadConfig, build, tiny=dict(blocks=(1,)), rules=_rules), HeadConfig)
