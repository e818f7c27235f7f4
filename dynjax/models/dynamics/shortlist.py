"""Logits are computed only for the classes that a picture may have."""

import dataclasses
from typing import Literal

from flax import nnx

from dynjax.models.blocks import ClassifyingHead, make_gate
from dynjax.models.dense import Dense, DynamicsConfig
from dynjax.models.registry import SOLVED, Family, register
from dynjax.models.rules import Width
from dynjax.ops import PresenceGate, Shortlist


@dataclasses.dataclass(frozen=True)
class ShortlistConfig:
    """A shortlist of classes for each picture, in the last layer of the head."""

    family: Literal["shortlist"] = "shortlist"
    hidden: Width = 64
    """Features of the gate's hidden layer."""
    gate: Literal["learned", "random"] = "learned"


def build(config: ShortlistConfig, model: Dense, *, rngs: nnx.Rngs) -> Dense:
    head = model.head
    if not isinstance(head, ClassifyingHead):
        raise ValueError(f"dynamics shortlist need a head that ends in one linear layer, not {type(head).__name__}")
    last = head.classify
    assert not isinstance(last.linear, Shortlist), "the model that dynamics are put into has none"
    if config.gate == "random":
        gate = make_gate("random", last.features, groups=last.classes, rngs=rngs)
    else:
        gate = PresenceGate(last.features, last.classes, hidden=config.hidden, rngs=rngs)
    last.linear = Shortlist(last.linear, gate, last.classes)
    return model


def _uses(config: ShortlistConfig) -> frozenset[str]:
    return SOLVED | ({"loss.presence"} if config.gate == "learned" else set())


FAMILY = register(Family(ShortlistConfig, build, tiny=dict(hidden=8), uses=_uses), DynamicsConfig)
