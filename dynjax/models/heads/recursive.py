"""A recursive decoder: one cell, applied again and again with the encoder's features beside its state.

Weights shared between refinements as in recurrent convolutional networks for scene labelling (Pinheiro and Collobert
2014, arXiv:1306.2795); `dynjax.models.dynamics.recursion` stops it where it has done enough.

Letters: B examples, H W pixels, C channels, K classes.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynjax.models.blocks import Classify, ClassifyingHead
from dynjax.models.dense import Backbone, HeadConfig, Site
from dynjax.models.heads.deeplab import level_of
from dynjax.models.heads.pspnet import Gather
from dynjax.models.registry import Family, register
from dynjax.models.rules import Depth, Range, Width
from dynjax.ops import Halt


@dataclasses.dataclass(frozen=True)
class RecursiveHeadConfig:
    """One decoder cell, applied again and again."""

    family: Literal["recursive"] = "recursive"
    features: Width = 48
    steps: Depth = 4
    """Most applications of the cell."""
    stride: Annotated[int, Range(1, 32)] = 8
    """Pixels of the picture, along a side, to one of the state; coarser maps are enlarged and added to the features."""


class DecoderCell(nnx.Module):
    """The next state from the state and the features beside it: two 3x3 convolutions around a shortcut.

    Normalised per pixel, and not by statistics of a batch, which differ from step to step, nor over the map, which
    would mix tiles. Receptive radius 2.
    """

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.norm, self.beside = nnx.LayerNorm(features, rngs=rngs), nnx.LayerNorm(features, rngs=rngs)
        self.conv1 = nnx.Conv(2 * features, features, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(features, features, (3, 3), rngs=rngs)

    def __call__(self, state: Float[Array, "B H W C"], features: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        both = jnp.concatenate([self.norm(state), self.beside(features)], -1)
        return state + self.conv2(nnx.relu(self.conv1(nnx.relu(both))))


class Repeated(nnx.Module):
    """The cell, `steps` times for everything: what `Halt` does without a halting unit."""

    def __init__(self, step: DecoderCell, steps: int):
        self.step, self.steps = step, steps

    def __call__(self, state: Float[Array, "B H W C"], features: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        for _ in range(self.steps):
            state = self.step(state, features)
        return state


class RecursiveHead(ClassifyingHead):
    """The maps from the coarsest up to that of `stride` as features and as the first state, the cell, and logits."""

    def __init__(self, config: RecursiveHeadConfig, backbone: Backbone, classes: int, *, rngs: nnx.Rngs):
        self.level, self.features, self.steps = level_of(config.stride, backbone), config.features, config.steps
        self.gather = Gather(backbone, self.level, config.features, rngs=rngs)
        self.cell: Repeated | Halt = Repeated(DecoderCell(config.features, rngs=rngs), config.steps)
        self.norm = nnx.LayerNorm(config.features, rngs=rngs)
        self.classify = Classify(config.features, classes, config.stride, sharp=True, rngs=rngs)

    def decode(self, maps: Sequence[Array]) -> jax.Array:
        features = self.gather(maps)
        return nnx.relu(self.norm(self.cell(features, features)))

    def sites(self) -> Iterator[Site]:
        """None: what is dynamic in it is how often the cell is applied."""
        return iter(())

    def scales(self) -> Iterator[Site]:
        return self.gather.scales()


SMALL = dict(features=8, steps=2, stride=2)
FAMILY = register(Family(RecursiveHeadConfig, RecursiveHead, tiny=SMALL), HeadConfig)
