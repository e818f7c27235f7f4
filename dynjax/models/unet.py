"""A residual U-Net (after Ronneberger et al. 2015, arXiv:1505.04597), and dynamics put into it.

The network is plain nnx and knows nothing of dynamics: `adaptive` wraps its blocks with `dynamize`. Static and adaptive
forms have the same blocks, so a trained static twin's parameters go under the wrappers as they are.

Letters: B examples, H W pixels, C channels, K classes.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from dynjax.core.controls import RandomGate
from dynjax.core.gates import BranchGate, SampleGate, TileGate
from dynjax.models import rules
from dynjax.models.blocks import Block, Mix, PlainBlock, gather_pixels, pixels
from dynjax.models.registry import BUDGET, Family, budgeted, filled, register
from dynjax.models.rules import LARGEST_SIDE, Rule
from dynjax.ops import Select, Skip, Tiles, dynamize


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """A residual U-Net and the dynamics put into it."""

    family: Literal["unet"] = "unet"
    widths: tuple[int, ...] = (32, 48, 64, 96)
    """Channels of each level, finest first."""
    blocks: tuple[int, ...] = (1, 1, 1, 1)
    """Residual blocks of each level, in the encoder and again in the decoder."""
    stem_stride: int = 2
    """The finest level works at 1/stem_stride of the picture."""
    dynamics: Literal["static", "tiles", "skip", "select"] = "static"
    gate: Literal["learned", "random"] = "learned"
    tiles: tuple[int, ...] = (16, 8, 8)
    """Side of a tile at each level, in pixels of that level's map; levels beyond stay static."""


class Merge(nnx.Module):
    """`Mix` of a fine map beside a coarse one repeated to its size.

    The coarse one is multiplied before it is repeated: a quarter of the work, with the same result.
    """

    def __init__(self, fine: int, coarse: int, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(fine + coarse, fine, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(fine, momentum=0.95, rngs=rngs)

    def __call__(self, fine: Float[Array, "B H W C"], coarse: Float[Array, "B h w D"]) -> Float[Array, "B H W C"]:
        own, other = jnp.split(self.linear.kernel[...], [fine.shape[-1]])
        y = fine @ own + repeat_pixels(coarse @ other)[:, : fine.shape[1], : fine.shape[2]]
        return nnx.relu(self.norm(y))


class UNet(nnx.Module):
    """Logits for every pixel: (B, H, W, 3) bytes to (B, H, W, K) float32.

    Level 0 works at 1/`stem_stride` of the picture, each further level at half of the one before. Odd sizes are rounded
    up going down and cut going up. The head gives every pixel of level 0 the logits of the `stem_stride`^2 pixels of
    the picture under it.

    Args:
        widths: channels of each level, the finest first.
        blocks: residual blocks of each level in the encoder, and, but for the last level, again in the decoder.
    """

    def __init__(
        self, classes: int, widths: Sequence[int], blocks: Sequence[int], stem_stride: int = 2, *, rngs: nnx.Rngs
    ):
        if len(widths) != len(blocks):
            raise ValueError(f"widths={tuple(widths)} and blocks={tuple(blocks)} must have one entry for each level")
        if stem_stride not in (1, 2, 4):
            raise ValueError(f"stem_stride={stem_stride} must be 1, 2 or 4")
        self.stem_stride = stem_stride
        self.stem = nnx.Conv(
            3, widths[0], (max(3, 2 * stem_stride - 1),) * 2, (stem_stride, stem_stride), use_bias=False, rngs=rngs
        )
        self.stem_norm = nnx.BatchNorm(widths[0], momentum=0.95, rngs=rngs)
        pairs = list(itertools.pairwise(widths))
        self.encoder = nnx.List(
            [nnx.List([Block(w, rngs=rngs) for _ in range(n)]) for w, n in zip(widths, blocks, strict=True)]
        )
        self.down = nnx.List([Mix(4 * fine, coarse, rngs=rngs) for fine, coarse in pairs])
        self.up = nnx.List([Merge(fine, coarse, rngs=rngs) for fine, coarse in pairs])
        self.decoder = nnx.List(
            [nnx.List([Block(w, rngs=rngs) for _ in range(n)]) for w, n in zip(widths[:-1], blocks, strict=False)]
        )
        self.head = nnx.Linear(widths[0], classes * stem_stride**2, rngs=rngs)

    def __call__(self, image: UInt8[Array, "B H W 3"]) -> Float[Array, "B H W K"]:
        height, width = image.shape[1:3]
        x = nnx.relu(self.stem_norm(self.stem(pixels(image, self.head.kernel.dtype))))
        maps = []
        for level, blocks in enumerate(self.encoder):
            if level:
                x = self.down[level - 1](gather_pixels(x))
            for block in blocks:
                x = block(x)
            maps.append(x)
        for level in reversed(range(len(self.decoder))):
            x = self.up[level](maps[level], x)
            for block in self.decoder[level]:
                x = block(x)
        logits = spread_pixels(self.head(x).astype(jnp.float32), self.stem_stride)
        return logits[:, :height, :width]


def repeat_pixels(x: Float[Array, "B H W C"]) -> Float[Array, "B 2*H 2*W C"]:
    """Nearest interpolation to twice the size."""
    return jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)


def spread_pixels(x: Float[Array, "B H W C"], factor: int) -> Float[Array, "B H*{factor} W*{factor} D"]:
    """Channels as factor x factor pixels each (sub-pixel convolution, Shi et al. 2016, arXiv:1609.05158, eq. 4)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, factor, factor, channels // factor**2).swapaxes(2, 3)
    return x.reshape(batch, height * factor, width * factor, channels // factor**2)


def build(config: UNetConfig, num_classes: int, *, rngs: nnx.Rngs, twin_params: nnx.State | None = None) -> nnx.Module:
    """The U-Net of `config`, adaptive if it says so.

    `twin_params`: variables of a static twin, which go under the wrappers.
    """
    model = UNet(num_classes, config.widths, config.blocks, config.stem_stride, rngs=rngs)
    filled(model, twin_params)
    return model if config.dynamics == "static" else adaptive(model, config, rngs=rngs)


def adaptive(model: UNet, config: UNetConfig, *, rngs: nnx.Rngs) -> nnx.Module:
    """A copy of `model` with wrappers around its residual blocks.

    "skip": every block, per example. "tiles": blocks of the levels that have a tile size, per tile. "select": on the
    same blocks, the residual block or a plain 1x1 one, per tile.
    """
    if config.dynamics == "skip":
        gate = (
            (lambda c: RandomGate(0.5, rngs=rngs)) if config.gate == "random" else (lambda c: SampleGate(c, rngs=rngs))
        )
        return dynamize(model, {r"(encoder|decoder)/\d+/\d+": lambda block, c, rngs: Skip(block, gate(c))}, rngs=rngs)
    if len(config.tiles) > len(config.widths):
        raise ValueError(f"tiles={config.tiles} names more levels than widths={config.widths} has")

    def wrap(size):
        def tiles(block, channels, rngs):
            gate = (
                RandomGate(0.5, size=size, rngs=rngs)
                if config.gate == "random"
                else TileGate(channels, size=size, rngs=rngs)
            )
            return Tiles(block, gate)

        def select(block, channels, rngs):
            # Starts with the residual block: bias 0 for the plain one, so the gate is as open as the others.
            gate = (
                RandomGate(0.5, branches=2, size=size, rngs=rngs)
                if config.gate == "random"
                else BranchGate(channels, 2, size=size, rngs=rngs)
            )
            return Select([PlainBlock(channels, rngs=rngs), block], gate)

        return {"tiles": tiles, "select": select}[config.dynamics]

    patterns = {rf"(encoder|decoder)/{level}/\d+": wrap(size) for level, size in enumerate(config.tiles)}
    return dynamize(model, patterns, rngs=rngs)


def _rules(config: UNetConfig) -> Iterator[Rule]:
    yield from rules.levels(config.widths, config.blocks, "level")
    yield from rules.one_of("stem_stride", config.stem_stride, 1, 2, 4)
    if config.dynamics == "skip":
        yield from rules.has_blocks(config.blocks, "skip")
    if config.dynamics not in ("tiles", "select"):
        return
    levels, tiles = len(config.widths), config.tiles
    yield Rule("tiles", tiles, 1 <= len(tiles) <= levels, f"one side for each of the first 1 to {levels} levels")
    yield from rules.each(config, "tiles", 1, LARGEST_SIDE)
    blocks = config.blocks[: len(tiles)]
    yield Rule(
        "blocks", config.blocks, all(blocks), f"1 or more in the levels that have tiles, the first {len(blocks)}"
    )


FAMILY = register(
    Family(
        UNetConfig,
        build,
        task="segmentation",
        tiny=dict(widths=(8, 12), blocks=(1, 0), tiles=(4,)),
        rules=_rules,
        uses=lambda config: BUDGET | {"loss.load_balance"} if config.dynamics == "select" else budgeted(config),
        apart=("tiles",),
    )
)
