"""A network that looks at a picture at a low resolution first (RANet, Yang et al. 2020, arXiv:2003.07326), for CIFAR.

Sub-networks of dense blocks work on base maps of rising resolution, the coarsest first, each with exits behind its last
blocks. A finer one is run for the pictures that no exit so far was sure about: its first blocks are fused with the
blocks of the coarser one, and where that one ended it goes down to the next coarser resolution, so that every exit
reads the coarsest. Deviations: it goes down by average pooling behind a block, not by a stride in its last layer; every
sub-network has a resolution of its own; coarse maps are resized so that pixels cover the same part of the picture,
where the authors' code lays the centres of the corner pixels on each other (`align_corners`).

The coarser of two sub-networks has twice the channels. Letters: B examples, H W pixels, C D channels, K classes.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynjax.models import rules
from dynjax.models.blocks import ConvNorm, Pyramid, conv3
from dynjax.models.exits import build_exits
from dynjax.models.registry import SOLVED, Family, register
from dynjax.models.rules import WIDEST, Depth, Range, Rule, Scales, Width


@dataclasses.dataclass(frozen=True)
class RANetConfig:
    """A network of sub-networks for rising resolutions, with exits; the coarsest is run first."""

    family: Literal["ranet"] = "ranet"
    scales: Scales = 3
    """Sub-networks; the last works at the picture's resolution, each one before at half of the next one's."""
    channels: Width = 16
    """Channels of the finest base map; each coarser one has twice as many."""
    growth: Annotated[int, Range(4, WIDEST)] = 6
    """Channels that a layer of the finest sub-network adds, at least 4; twice as many in each coarser one."""
    blocks: Depth = 2
    """Dense blocks of the coarsest sub-network, each ending in an exit."""
    step: Depth = 2
    """Further blocks, and exits, that each finer sub-network has behind those that are fused with the coarser one's."""
    layers: Depth = 4
    """Layers of a dense block."""
    dynamics: Literal["static", "exits"] = "static"
    """static: only the last exit is there."""
    gate: Literal["learned", "random"] = "learned"


COARSE = 0.25
"""Share of a fused layer's channels that come from the coarser sub-network."""
REDUCTION = 0.5
"""Share of the channels that are left where a sub-network goes down to a lower resolution."""


def resized(x: Float[Array, "B h w C"], like: Float[Array, "B H W D"]) -> Float[Array, "B H W C"]:
    """`x`, by bilinear interpolation, at the resolution of `like`."""
    return jax.image.resize(x, (*like.shape[:3], x.shape[-1]), "bilinear")


class Block(nnx.Module):
    """A dense block: every layer sees what all before it gave. (B, H, W, C) to (B, H, W, C + layers * growth)."""

    def __init__(self, before: int, growth: int, layers: int, narrow: int, *, rngs: nnx.Rngs):
        self.layers = nnx.List([conv3(before + i * growth, growth, 1, narrow, rngs=rngs) for i in range(layers)])
        self.widths = tuple(before + i * growth for i in range(layers + 1))
        self.after = self.widths[-1]

    def __call__(self, x: Float[Array, "B H W C"]) -> tuple[jax.Array, jax.Array]:
        """The dense map, for the finer sub-network, and the block's output."""
        for layer in self.layers:
            x = jnp.concatenate([x, layer(x)], -1)
        return x, x


class FusedBlock(nnx.Module):
    """A dense block whose layers also see what the layers of a coarser block saw (section 3.2, fusion block)."""

    def __init__(self, before: int, growth: int, coarse: "Block | FusedBlock", narrow: int, *, rngs: nnx.Rngs):
        layers, up = len(coarse.layers), int(growth * COARSE)
        self.widths = tuple(before + i * growth for i in range(layers + 1))
        self.layers: nnx.List[nnx.Sequential] = nnx.List(
            [conv3(w, growth - up, 1, narrow, rngs=rngs) for w in self.widths[:-1]]
        )
        self.coarse = nnx.List([conv3(w, up, 1, 2 * narrow, rngs=rngs) for w in coarse.widths[:-1]])
        last = int(self.widths[-1] * COARSE)
        self.last = ConvNorm(coarse.widths[-1], last, 1, rngs=rngs)
        self.seen = coarse.widths
        self.after = self.widths[-1] + last

    def __call__(self, x: Float[Array, "B H W C"], coarse: Float[Array, "B h w D"]) -> tuple[jax.Array, jax.Array]:
        """The dense map, for the finer sub-network, and the block's output; from the dense map of the coarser block."""
        for layer, up, seen in zip(self.layers, self.coarse, self.seen, strict=False):
            x = jnp.concatenate([x, resized(up(coarse[..., :seen]), x), layer(x)], -1)
        return x, jnp.concatenate([x, resized(self.last(coarse), x)], -1)


class Down(nnx.Module):
    """Fewer channels and half the resolution."""

    def __init__(self, before: int, *, rngs: nnx.Rngs):
        self.after = int(before * REDUCTION)
        self.conv = ConvNorm(before, self.after, 1, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        return nnx.avg_pool(self.conv(x), (2, 2), (2, 2), "SAME")


def coarsest_first(maps: list[jax.Array]) -> list[jax.Array]:
    """The base maps in the order in which the sub-networks take them."""
    return maps[::-1]


class Stage(nnx.Module):
    """The blocks of one sub-network up to its next exit.

    Takes and gives a list of maps: the base maps of the finer sub-networks, and the dense maps of the blocks that the
    next one is fused with; the last is the map that the exit reads. The first stage of a sub-network takes its base map
    before the finer ones, and the dense maps of the coarser sub-network. Nothing is kept behind the finest.

    Args:
        blocks: dense blocks; `Down` behind them where the sub-network goes down.
        finer: how many sub-networks come after this one.
        starts: whether this is the first stage of its sub-network.
    """

    def __init__(self, blocks: Sequence[Block | FusedBlock | Down], finer: int, starts: bool):
        self.blocks, self.finer, self.starts = nnx.List(blocks), finer, starts

    def __call__(self, maps: list[jax.Array]) -> list[jax.Array]:
        x, maps = (maps[0], maps[1:]) if self.starts else (maps[-1], maps)
        bases, dense = maps[: self.finer], maps[self.finer :]
        coarse, own = (dense, []) if self.starts else ([], dense)
        for block in self.blocks:
            if isinstance(block, Down):
                x = block(x)
                continue
            seen, x = block(x, coarse[len(own)]) if isinstance(block, FusedBlock) else block(x)
            own = [*own, seen]
        # The last block is fused with nothing, so that its dense map is what it gives.
        return [*bases, *own] if self.finer else [x]


def stages(config: RANetConfig, rngs: nnx.Rngs) -> list[tuple[nnx.Module, int]]:
    """The stages of all sub-networks, and how many channels the exit behind each reads."""
    factors = [2**i for i in reversed(range(config.scales))]
    found: list[tuple[nnx.Module, int]] = []
    coarse: list[Block | FusedBlock] = []
    ends: list[int] = []
    for scale, factor in enumerate(factors):
        width, growth = config.channels * factor, config.growth * factor
        blocks: list[Block | FusedBlock | Down] = []
        own: list[Block | FusedBlock] = []
        for number in range(config.blocks + config.step * scale):
            if number < len(coarse):
                block: Block | FusedBlock = FusedBlock(width, growth, coarse[number], factor, rngs=rngs)
            else:
                block = Block(width, growth, config.layers, factor, rngs=rngs)
            width = block.after
            own.append(block)
            blocks.append(block)
            if number + 1 in ends:
                blocks.append(Down(width, rngs=rngs))
                width = blocks[-1].after
            if number >= len(coarse):
                starts = number == len(coarse)
                found.append((Stage(blocks, config.scales - 1 - scale, starts), width))
                blocks = []
        coarse = own
        ends.append(len(own))
    bases = Pyramid([config.channels * factor for factor in reversed(factors)], rngs=rngs)
    return [(nnx.Sequential(bases, coarsest_first, found[0][0]), found[0][1]), *found[1:]]


def build(config: RANetConfig, num_classes: int, *, rngs: nnx.Rngs, twin_params: nnx.State | None = None) -> nnx.Module:
    """The RANet of `config`."""
    gate = None if config.dynamics == "static" else config.gate
    return build_exits(stages(config, rngs), num_classes, gate, rngs=rngs, twin_params=twin_params)


def _rules(config: RANetConfig) -> Iterator[Rule]:
    yield from rules.doubled(config, "channels growth", config.scales)


FAMILY = register(
    Family(
        RANetConfig,
        build,
        tiny=dict(scales=2, channels=4, growth=4, blocks=1, step=1, layers=1),
        rules=_rules,
        uses=SOLVED,
    )
)
