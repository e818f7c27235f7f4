"""Of a residual block and a plain one, each tile takes the one that the gate chooses."""

import dataclasses
from typing import Literal

from flax import nnx

from dynjax.models.blocks import PlainBlock, make_gate
from dynjax.models.dense import Dense, DynamicsConfig
from dynjax.models.dynamics.tiles import TiledConfig, tiled
from dynjax.models.registry import BUDGET, Family, register
from dynjax.ops import Select


@dataclasses.dataclass(frozen=True)
class SelectConfig(TiledConfig):
    """The block itself or a plain 1x1 one, per tile."""

    family: Literal["select"] = "select"


def build(config: SelectConfig, model: Dense, *, rngs: nnx.Rngs) -> Dense:
    def wrapper(block: nnx.Module, channels: int, level: int) -> Select:
        # Starts with the residual block: bias 0 for the plain one, so the gate is as open as the others.
        gate = make_gate(config.gate, channels, size=config.tiles[level], branches=2, rngs=rngs)
        return Select([PlainBlock(channels, rngs=rngs), block], gate)

    return model.wrap(wrapper, len(config.tiles))


FAMILY = register(
    Family(SelectConfig, build, tiny=dict(tiles=(4,)), rules=tiled, uses=BUDGET | {"loss.load_balance"}),
    DynamicsConfig,
)
