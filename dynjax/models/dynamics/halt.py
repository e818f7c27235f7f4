"""In the place of the coarsest level's blocks one step, applied as often as the picture needs (ACT, Graves 2016)."""

import dataclasses
from typing import Literal

from flax import nnx

from dynjax.models.dense import Dense, DynamicsConfig
from dynjax.models.halting import Step, make_halt
from dynjax.models.registry import BUDGET, Family, register
from dynjax.models.rules import Depth


@dataclasses.dataclass(frozen=True)
class HaltStepConfig:
    """A residual step again and again in the place of the coarsest level's blocks, per picture."""

    family: Literal["halt"] = "halt"
    steps: Depth = 4
    """Most applications of the step."""
    gate: Literal["learned", "random"] = "learned"


def build(config: HaltStepConfig, model: Dense, *, rngs: nnx.Rngs) -> Dense:
    width = model.backbone.widths[-1]
    return model.coarsest([make_halt(Step(width, rngs=rngs), config.gate, width, config.steps, rngs=rngs)])


FAMILY = register(Family(HaltStepConfig, build, tiny=dict(steps=2), uses=BUDGET), DynamicsConfig)
