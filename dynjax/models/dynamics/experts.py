"""Experts in the place of the coarsest level's blocks; its pixels are the tokens.

Letters: B examples, H W pixels, C channels.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from flax import nnx
from jaxtyping import Array, Float

from dynjax.models import rules
from dynjax.models.dense import BackboneConfig, Dense, DynamicsConfig
from dynjax.models.moe import make_router, router_uses
from dynjax.models.registry import Family, register
from dynjax.models.rules import Depth, Rule, Width
from dynjax.ops import Experts


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """Experts in the place of the coarsest level's blocks."""

    family: Literal["experts"] = "experts"
    layers: Depth = 4
    hidden: Width = 128
    """Hidden features of an expert."""
    experts: Depth = 8
    top: Depth = 2
    """The most experts that a pixel takes."""
    least: Depth = 1
    """The experts that a pixel takes at any budget."""
    gate: Literal["learned", "random"] = "learned"


class PixelExperts(nnx.Module):
    """Experts of every pixel of a map, behind a layer normalisation and around a shortcut."""

    def __init__(self, channels: int, config: ExpertsConfig, *, rngs: nnx.Rngs):
        router = make_router(config.gate, channels, config.experts, config.top, config.least, rngs=rngs)
        self.norm = nnx.LayerNorm(channels, rngs=rngs)
        self.experts = Experts(channels, config.hidden, config.experts, gate=router, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        tokens = self.norm(x).reshape(x.shape[0], -1, x.shape[-1])
        return x + self.experts(tokens).reshape(x.shape)


def build(config: ExpertsConfig, model: Dense, *, rngs: nnx.Rngs) -> Dense:
    width = model.backbone.widths[-1]
    return model.coarsest([PixelExperts(width, config, rngs=rngs) for _ in range(config.layers)])


def _rules(config: ExpertsConfig, backbone: BackboneConfig) -> Iterator[Rule]:
    return rules.routed(config.experts, config.top, config.least)


SMALL = dict(layers=1, hidden=8, experts=2)
FAMILY = register(
    Family(ExpertsConfig, build, tiny=SMALL, rules=_rules, uses=lambda config: router_uses(config.gate)), DynamicsConfig
)
