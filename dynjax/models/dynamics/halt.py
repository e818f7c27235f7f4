"""In the place of the coarsest level's blocks one step, applied as often as the picture needs (ACT, Graves 2016)."""

import dataclasses
from typing import Literal

from flax import nnx

from dynjax.core.controls import RandomGate
from dynjax.core.gates import SampleGate
from dynjax.models.dense import Dense, DynamicsConfig
from dynjax.models.halting import GO_ON, Step
from dynjax.models.registry import BUDGET, Family, register
from dynjax.models.rules import Depth
from dynjax.ops.halting import Halt


@dataclasses.dataclass(frozen=True)
class HaltStepConfig:
    """A residual step again and again in the place of the coarsest level's blocks, per picture."""

    family: Literal["halt"] = "halt"
    steps: Depth = 4
    """Most applications of the step."""
    gate: Literal["learned", "random"] = "learned"


def build(config: HaltStepConfig, model: Dense, *, rngs: nnx.Rngs) -> Dense:
    width = model.backbone.widths[-1]
    step = Step(width, rngs=rngs)
    if config.gate == "random":
        return model.coarsest([Halt(step, RandomGate(GO_ON, rngs=rngs), config.steps, kind="hard")])
    return model.coarsest([Halt(step, SampleGate(width, rngs=rngs), config.steps, kind="act")])


FAMILY = register(Family(HaltStepConfig, build, tiny=dict(steps=2), uses=lambda _: BUDGET), DynamicsConfig)
