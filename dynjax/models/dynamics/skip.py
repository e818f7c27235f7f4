"""Whole blocks run or not, per picture."""

import dataclasses
from typing import Literal

from flax import nnx

from dynjax.models.blocks import make_gate
from dynjax.models.dense import Dense, DynamicsConfig
from dynjax.models.registry import BUDGET, Family, register
from dynjax.ops import Skip


@dataclasses.dataclass(frozen=True)
class SkipConfig:
    """Whole blocks run or not, per picture."""

    family: Literal["skip"] = "skip"
    gate: Literal["learned", "random"] = "learned"


def build(config: SkipConfig, model: Dense, *, rngs: nnx.Rngs) -> Dense:
    def wrapper(block: nnx.Module, channels: int, level: int) -> Skip:
        return Skip(block, make_gate(config.gate, channels, rngs=rngs))

    return model.wrap(wrapper)


FAMILY = register(Family(SkipConfig, build, uses=BUDGET), DynamicsConfig)
