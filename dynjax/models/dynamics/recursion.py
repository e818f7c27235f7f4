"""The cell of a recursive decoder is applied as often as each picture, or tile, needs (ACT and SACT; see `Halt`)."""

import dataclasses
from typing import Annotated, Literal

from flax import nnx

from dynjax.models.dense import Dense, DynamicsConfig
from dynjax.models.halting import make_halt
from dynjax.models.heads.recursive import RecursiveHead, Repeated
from dynjax.models.registry import BUDGET, Family, register
from dynjax.models.rules import LARGEST_SIDE, Range


@dataclasses.dataclass(frozen=True)
class RecursionConfig:
    """A recursive decoder that stops per picture or per tile."""

    family: Literal["recursion"] = "recursion"
    tile: Annotated[int, Range(0, LARGEST_SIDE)] = 0
    """Side of a tile that stops by itself, in pixels of the decoder's map; 0: the whole picture stops."""
    gate: Literal["learned", "random"] = "learned"


def build(config: RecursionConfig, model: Dense, *, rngs: nnx.Rngs) -> Dense:
    head = model.head
    if not isinstance(head, RecursiveHead) or not isinstance(head.cell, Repeated):
        raise ValueError(f"dynamics recursion need the recursive head, and this is {type(head).__name__}")
    size, step = config.tile or None, head.cell.step
    head.cell = make_halt(step, config.gate, head.features, head.steps, size=size, rngs=rngs)
    return model


FAMILY = register(Family(RecursionConfig, build, uses=BUDGET), DynamicsConfig)
