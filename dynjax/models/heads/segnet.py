"""The decoder of SegNet (Badrinarayanan et al. 2017, arXiv:1511.00561, section 3).

Deviation: the indices are those of the backbone's finer map, whether or not it made the coarser one by pooling at its
maxima; blocks are residual.

Letters: B examples, H W pixels, C D channels, K classes.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dynjax.models.blocks import Mix, gather_pixels, spread_pixels
from dynjax.models.dense import Backbone, BackboneConfig, HeadConfig
from dynjax.models.heads.decoder import Decoder, of_levels
from dynjax.models.registry import Family, register
from dynjax.models.rules import Counts, Rule


@dataclasses.dataclass(frozen=True)
class SegNetHeadConfig:
    """From the coarsest map up; of the finer ones only where their maxima are is used."""

    family: Literal["segnet"] = "segnet"
    blocks: Counts = (1, 1, 1)
    """Residual blocks of each level but the coarsest, finest first. Without one a map keeps the holes of unpooling."""


def pooling_indices(x: Float[Array, "B H W C"]) -> Int[Array, "B h w C"]:
    """Which of the 2x2 pixels under each has the largest value, 0 to 3 by rows; the first of several."""
    four = gather_pixels(x)
    return four.reshape(*four.shape[:3], 4, x.shape[3]).argmax(3)


def unpool(x: Float[Array, "B h w C"], indices: Int[Array, "B h w C"]) -> Float[Array, "B 2*h 2*w C"]:
    """Every value at the pixel of its index, and 0 at the three others."""
    spread = jnp.where(indices[:, :, :, None] == jnp.arange(4)[None, None, None, :, None], x[:, :, :, None], 0)
    return spread_pixels(spread.reshape(*x.shape[:3], -1), 2)


class Unpool(nnx.Module):
    """A coarse map with fewer channels, unpooled to where the fine one has its maxima, and mixed."""

    def __init__(self, fine: int, coarse: int, *, rngs: nnx.Rngs):
        self.narrow, self.fill = Mix(coarse, fine, rngs=rngs), Mix(fine, fine, rngs=rngs)

    def __call__(self, fine: Float[Array, "B H W C"], coarse: Float[Array, "B h w D"]) -> Float[Array, "B H W C"]:
        x = unpool(self.narrow(coarse), pooling_indices(fine))
        return self.fill(x[:, : fine.shape[1], : fine.shape[2]])


def build(config: SegNetHeadConfig, backbone: Backbone, classes: int, *, rngs: nnx.Rngs) -> Decoder:
    return Decoder(Unpool, config.blocks, backbone, classes, rngs=rngs)


def _rules(config: SegNetHeadConfig, backbone: BackboneConfig) -> Iterator[Rule]:
    return of_levels(config.blocks, backbone)


FAMILY = register(Family(SegNetHeadConfig, build, tiny=dict(blocks=(1,)), rules=_rules), HeadConfig)
