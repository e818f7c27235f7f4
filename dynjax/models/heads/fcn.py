"""A fully convolutional head (Long et al. 2015, arXiv:1411.4038, section 4).

Letters: B examples, H W pixels, K classes.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

from flax import nnx
from jaxtyping import Array, Float

from dynjax.models.blocks import enlarge
from dynjax.models.dense import Backbone, HeadConfig, Site
from dynjax.models.registry import Family, register
from dynjax.models.rules import Rule, one_of


@dataclasses.dataclass(frozen=True)
class FCNHeadConfig:
    """Scores of the coarsest map, and of those above it as far as asked for, enlarged and summed."""

    family: Literal["fcn"] = "fcn"
    stride: int = 8
    """Pixels of the picture, along a side, to one of the finest map that is scored: 32, 16 or 8 as in the paper, or
    4."""


class FCNHead(nnx.Module):
    """FCN-32s, -16s or -8s: a linear layer scores the classes on every map from the coarsest up to that of `stride`;
    what comes from below is enlarged twofold and added, and the sum enlarged to the picture.

    Deviations: the enlarging is bilinear and not learned (as the paper's last one); the classifier of the coarsest map
    is this layer alone, since the backbone has its features.
    """

    def __init__(self, config: FCNHeadConfig, backbone: Backbone, classes: int, *, rngs: nnx.Rngs):
        self.stride = max(config.stride, backbone.strides[0])
        self.levels = [level for level, stride in enumerate(backbone.strides) if stride >= self.stride]
        if not self.levels:
            raise ValueError(f"stride={config.stride}: the backbone's coarsest map has {backbone.strides[-1]}")
        self.strides = backbone.strides
        self.scores = nnx.List([nnx.Linear(backbone.widths[level], classes, rngs=rngs) for level in self.levels])

    def __call__(self, maps: Sequence[Array], size: tuple[int, int]) -> Float[Array, "B H W K"]:
        total, before = None, 0
        for level, score in reversed(list(zip(self.levels, self.scores, strict=True))):
            own = score(maps[level]).astype("float32")
            if total is not None:
                larger = enlarge(total, before // self.strides[level])
                own = own + larger[:, : own.shape[1], : own.shape[2]]
            total, before = own, self.strides[level]
        assert total is not None
        return enlarge(total, before)[:, : size[0], : size[1]]

    def sites(self) -> Iterator[Site]:
        return iter(())


def _rules(config: FCNHeadConfig, backbone: object) -> Iterator[Rule]:
    return one_of("stride", config.stride, 4, 8, 16, 32)


FAMILY = register(Family(FCNHeadConfig, FCNHead, tiny=dict(stride=4), rules=_rules), HeadConfig)
