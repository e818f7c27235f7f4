"""Fusion of several scales, of which each picture, or tile, selects its own (see `Skip` and `Tiles`).

Letters: B examples, H W pixels, C D channels.
"""

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynjax.core import views
from dynjax.models.blocks import make_gate
from dynjax.models.dense import Dense, DynamicsConfig, Fuses
from dynjax.models.registry import BUDGET, Family, register
from dynjax.models.rules import LARGEST_SIDE, Range
from dynjax.ops import Skip, Tiles


@dataclasses.dataclass(frozen=True)
class ScalesConfig:
    """Scales that are left out of the fusion, per picture or per tile."""

    family: Literal["scales"] = "scales"
    tile: Annotated[int, Range(0, LARGEST_SIDE)] = 0
    """Side of a tile that selects by itself, in pixels of each scale's map; 0: the whole picture selects."""
    gate: Literal["learned", "random"] = "learned"


class Nothing(nnx.Module):
    """What a scale that was left out adds: zeros of so many features."""

    def __init__(self, features: int):
        self.features = features

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        return jnp.zeros((*x.shape[:3], self.features), x.dtype)


def build(config: ScalesConfig, model: Dense, *, rngs: nnx.Rngs) -> Dense:
    if not isinstance(model.head, Fuses):
        raise ValueError(f"dynamics scales need a head that fuses scales, and this is {type(model.head).__name__}")
    for site in model.head.scales():
        path = site.modules[site.number]
        gate = make_gate(config.gate, site.channels, size=config.tile or None, rngs=rngs)
        seen = jax.ShapeDtypeStruct((1, 8, 8, site.channels), jnp.float32)
        nothing = Nothing(jax.eval_shape(views.fresh(views.still(path)), seen).shape[-1])
        site.modules[site.number] = (Tiles if config.tile else Skip)(path, gate, otherwise=nothing)
    return model


FAMILY = register(Family(ScalesConfig, build, uses=BUDGET), DynamicsConfig)
