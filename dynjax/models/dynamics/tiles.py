"""Blocks run only on the tiles that their gate keeps."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from flax import nnx

from dynjax.models.blocks import make_gate
from dynjax.models.dense import BackboneConfig, Dense, DynamicsConfig
from dynjax.models.registry import BUDGET, Family, register
from dynjax.models.rules import Rule, Sides
from dynjax.ops import Tiles


@dataclasses.dataclass(frozen=True)
class TiledConfig:
    """Of dynamics of tiles: an abstract base."""

    tiles: Sides = (16, 8, 8)
    """Side of a tile at each level, in pixels of that level's map; levels beyond stay static."""
    gate: Literal["learned", "random"] = "learned"


@dataclasses.dataclass(frozen=True)
class TilesConfig(TiledConfig):
    """Blocks run only on the tiles that their gate keeps."""

    family: Literal["tiles"] = "tiles"


def build(config: TilesConfig, model: Dense, *, rngs: nnx.Rngs) -> Dense:
    def wrapper(block: nnx.Module, channels: int, level: int) -> Tiles:
        return Tiles(block, make_gate(config.gate, channels, size=config.tiles[level], rngs=rngs))

    return model.wrap(wrapper, len(config.tiles))


def tiled(config: TiledConfig, backbone: BackboneConfig) -> Iterator[Rule]:
    sides, levels = config.tiles, len(backbone.widths)
    yield Rule("tiles", sides, 1 <= len(sides) <= levels, f"one side for each of the first 1 to {levels} levels")


FAMILY = register(Family(TilesConfig, build, tiny=dict(tiles=(4,)), rules=tiled, uses=BUDGET), DynamicsConfig)
