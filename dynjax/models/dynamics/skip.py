"""Whole blocks run or not, per picture."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from flax import nnx

from dynjax.core.controls import RandomGate
from dynjax.core.gates import SampleGate
from dynjax.models.dense import BackboneConfig, Dense, DynamicsConfig
from dynjax.models.registry import BUDGET, Family, register
from dynjax.models.rules import Rule
from dynjax.ops import Skip


@dataclasses.dataclass(frozen=True)
class SkipConfig:
    """Whole blocks run or not, per picture."""

    family: Literal["skip"] = "skip"
    gate: Literal["learned", "random"] = "learned"


def build(config: SkipConfig, model: Dense, *, rngs: nnx.Rngs) -> Dense:
    def wrapper(block: nnx.Module, channels: int, level: int) -> Skip:
        random = config.gate == "random"
        return Skip(block, RandomGate(0.5, rngs=rngs) if random else SampleGate(channels, rngs=rngs))

    return model.wrap(wrapper)


def _rules(config: SkipConfig, backbone: BackboneConfig) -> Iterator[Rule]:
    wanted = f"static: there is nothing to skip, --model.backbone.blocks is {backbone.blocks}"
    yield Rule("family", config.family, any(backbone.blocks), wanted)


FAMILY = register(Family(SkipConfig, build, rules=_rules, uses=lambda _: BUDGET), DynamicsConfig)
