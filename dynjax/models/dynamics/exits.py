"""Exits along a decoder: tiles whose classes are sure run no block of its finer levels (see `Cascade`).

Letters: B examples, H W pixels, K classes.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from flax import nnx
from jaxtyping import Array, Float, UInt8

from dynjax.core import execute
from dynjax.models.blocks import enlarge, of_pixels
from dynjax.models.dense import Backbone, Dense, DynamicsConfig
from dynjax.models.heads.decoder import Decoder
from dynjax.models.registry import SOLVED, Family, register
from dynjax.models.rules import Side
from dynjax.ops.cascade import Cascade, chosen


@dataclasses.dataclass(frozen=True)
class DecoderExitsConfig:
    """Exits along the decoder, at which tiles stop."""

    family: Literal["exits"] = "exits"
    tile: Side = 4
    """Side of a tile in pixels of the decoder's coarsest map (that of the second coarsest level of the backbone)."""
    gate: Literal["learned", "random"] = "learned"
    """learned: by the confidence of what each exit predicts; random: by chance."""


class Levels(nnx.Module):
    """Blocks one after the other."""

    def __init__(self, blocks: Sequence[nnx.Module]):
        self.blocks = nnx.List(blocks)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        for block in self.blocks:
            x = block(x)
        return x


class ExitingDense(nnx.Module):
    """`Dense` with exits along its decoder; `predictions` has the logits of each, the coarsest first."""

    def __init__(self, backbone: Backbone, cascade: Cascade, strides: Sequence[int], sharp: bool):
        self.backbone, self.cascade, self.strides, self.sharp = backbone, cascade, tuple(strides), sharp

    def __call__(self, image: UInt8[Array, "B H W 3"]) -> Float[Array, "B H W K"]:
        maps, size = self.backbone(image), (image.shape[1], image.shape[2])
        (*early, last), going = self.cascade(maps[-1], maps[-2::-1])
        logits = of_pixels(last, self.strides[-1], self.sharp, size)
        if not early:
            return logits
        stopped = of_pixels(chosen(early, going, self.cascade.size, enlarge), self.strides[-2], False, size)
        side = self.cascade.size * self.strides[0]
        return execute.blend(execute.tile_pixels(going[-1], side, size), logits, stopped)

    def predictions(self, image: UInt8[Array, "B H W 3"]) -> list[Float[Array, "B H W K"]]:
        """The logits of every level at the picture's size, the coarsest first."""
        maps, size = self.backbone(image), (image.shape[1], image.shape[2])
        *early, last = self.cascade.predictions(maps[-1], maps[-2::-1])
        found = []
        for number, logits in enumerate(early):
            for finer in early[number + 1 :]:  # as `chosen` has it where all tiles stop
                logits = enlarge(logits, 2)[:, : finer.shape[1], : finer.shape[2]]
            found.append(of_pixels(logits, self.strides[-2], False, size))
        return [*found, of_pixels(last, self.strides[-1], self.sharp, size)]


def build(config: DecoderExitsConfig, model: Dense, *, rngs: nnx.Rngs) -> ExitingDense:
    head, backbone = model.head, model.backbone
    if not isinstance(head, Decoder):
        raise ValueError(f"dynamics exits need a decoder with levels (unet, segnet), and this is {type(head).__name__}")
    classify = head.classify
    widths, strides = backbone.widths[-2::-1], backbone.strides[-2::-1]
    exits = [nnx.Linear(width, classify.classes, rngs=rngs) for width in widths[:-1]]
    cascade = Cascade(
        list(head.up)[::-1],
        [Levels(blocks) for blocks in head.blocks][::-1],
        [*exits, classify.linear],
        size=config.tile,
        confidence="random" if config.gate == "random" else "max_prob",
    )
    return ExitingDense(backbone, cascade, strides, classify.sharp)


FAMILY = register(Family(DecoderExitsConfig, build, tiny=dict(tile=2), uses=SOLVED), DynamicsConfig)
