"""Scales that a picture does without: its coarsest maps are not made (see `Skip`).

A head fuses the maps of all scales; here each picture selects how many there are, and for the others neither the
backbone's stages nor what is behind them run. Resolution as what adapts to the input: RANet (Yang et al. 2020,
arXiv:2003.07326) goes from coarse to fine, this from fine to coarse, since a backbone makes its fine maps first.

Letters: B examples, H W pixels, C channels.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynjax.models.blocks import make_gate
from dynjax.models.dense import BackboneConfig, Dense, DynamicsConfig, Peels
from dynjax.models.registry import BUDGET, Family, register
from dynjax.models.rules import Depth, Rule
from dynjax.ops import Skip


@dataclasses.dataclass(frozen=True)
class LevelsConfig:
    """Each picture has as many levels of the backbone as it needs."""

    family: Literal["levels"] = "levels"
    levels: Depth = 2
    """Of the coarsest, how many a picture may do without."""
    gate: Literal["learned", "random"] = "learned"


class Coarser(nnx.Module):
    """The map of a level and those of all that are coarser, from the map before it."""

    def __init__(self, level: nnx.Module, coarser: Skip | None):
        self.level, self.coarser = level, nnx.data(coarser)

    def __call__(self, x: Float[Array, "B H W C"]) -> list[Float[Array, "B _ _ _"]]:
        y = self.level(x)
        return [y] if self.coarser is None else [y, *self.coarser(y)]


class Missing(nnx.Module):
    """Zeros in the place of maps of so many channels, each half as large as the one before, rounded up."""

    def __init__(self, widths: Sequence[int]):
        self.widths = tuple(widths)

    def __call__(self, x: Float[Array, "B H W C"]) -> list[Float[Array, "B _ _ _"]]:
        examples, height, width, _ = x.shape
        shapes = ((-(-height // 2**n), -(-width // 2**n), channels) for n, channels in enumerate(self.widths, 1))
        return [jnp.zeros((examples, *shape), x.dtype) for shape in shapes]


def build(config: LevelsConfig, model: Dense, *, rngs: nnx.Rngs) -> Dense:
    backbone, widths = model.backbone, model.backbone.widths
    if not isinstance(backbone, Peels):
        raise ValueError(f"dynamics levels need a backbone with `peel`, and {type(backbone).__name__} has none")
    coarser = None
    for level in range(len(widths) - 1, len(widths) - 1 - config.levels, -1):
        gate = make_gate(config.gate, widths[level - 1], rngs=rngs)
        coarser = Skip(Coarser(backbone.peel(), coarser), gate, otherwise=Missing(widths[level:]))
    model.coarser = coarser
    return model


def _rules(config: LevelsConfig, backbone: BackboneConfig) -> Iterator[Rule]:
    most = len(backbone.widths)
    yield Rule("levels", config.levels, config.levels < most, f"fewer than the backbone's levels, which are {most}")


FAMILY = register(Family(LevelsConfig, build, tiny=dict(levels=1), rules=_rules, uses=BUDGET), DynamicsConfig)
