"""Classifiers that stop early: what the families with exits share. Letters: B examples, H W pixels, K classes."""

import jax
from flax import nnx
from jaxtyping import Array, Float, UInt8

from dynjax.models.blocks import pixels
from dynjax.ops import Exits

CONFIDENCE = {"learned": "max_prob", "random": "random"}
"""What a configuration's `gate` means for exits."""


class ExitNet(nnx.Module):
    """Pictures through stages with exits: (B, H, W, 3) bytes to (B, K) float32, and the logits of every exit."""

    def __init__(self, exits: Exits):
        self.exits = exits

    def _pixels(self, image: jax.Array) -> jax.Array:
        return pixels(image, jax.tree.leaves(nnx.state(self.exits.stages, nnx.Param))[0].dtype)

    def __call__(self, image: UInt8[Array, "B H W 3"]) -> Float[Array, "B K"]:
        return self.exits(self._pixels(image))

    def predictions(self, image: UInt8[Array, "B H W 3"]) -> list[Float[Array, "B K"]]:
        """The logits of every exit, the first first."""
        return self.exits.predictions(self._pixels(image))
