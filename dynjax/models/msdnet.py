"""A multi-scale dense network with exits (MSDNet, Huang et al. 2018, arXiv:1703.09844), in its form for CIFAR.

Every layer holds maps of several resolutions, so that an exit, which reads the coarsest, has features of a whole
network behind it at any depth; dense connections keep the features that an early exit spoils from being lost to later
ones. In thirds of the depth the finest scale is left out (section 4, network reduction) and the channels are halved.

A map of scale s has 2**s times the channels of the finest. Letters: B examples, H W pixels, K classes, S scales.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from dynjax.models import rules
from dynjax.models.blocks import ConvNorm, Pyramid, conv3
from dynjax.models.exits import build_exits
from dynjax.models.registry import SOLVED, Family, register
from dynjax.models.rules import Depth, Rule, Scales, Width


@dataclasses.dataclass(frozen=True)
class MSDNetConfig:
    """A multi-scale dense network with exits."""

    family: Literal["msdnet"] = "msdnet"
    scales: Scales = 3
    """Resolutions, each half of the one before."""
    channels: Width = 16
    """Channels of the finest scale after the first layer; a coarser one has twice as many."""
    growth: Width = 6
    """Channels that a layer adds to the finest scale; twice as many to each coarser one."""
    blocks: Depth = 5
    """Blocks, each ending in an exit."""
    base: Depth = 4
    """Layers of the first block."""
    step: Depth = 2
    """Layers of each further block."""
    bottleneck: bool = True
    """1x1 convolutions before the 3x3 ones."""
    dynamics: Literal["static", "exits"] = "static"
    """static: only the last exit is there."""
    gate: Literal["learned", "random"] = "learned"


class Layer(nnx.Module):
    """New channels for every scale from `first` on: from its own map and from the next finer one, half each.

    The finest map has nothing finer, unless it is left out from here on (`first` is above `before`).
    """

    def __init__(self, channels: int, before: int, first: int, config: MSDNetConfig, *, rngs: nnx.Rngs):
        own, finer = {}, {}
        for s in range(first, config.scales):
            narrow = 2**s if config.bottleneck else None
            after = config.growth * 2**s
            if s > before:
                narrow_finer = 2 ** (s - 1) if config.bottleneck else None
                finer[str(s)] = conv3(channels * 2 ** (s - 1), after // 2, 2, narrow_finer, rngs=rngs)
                after -= after // 2
            own[str(s)] = conv3(channels * 2**s, after, 1, narrow, rngs=rngs)
        self.own, self.finer = nnx.Dict(own), nnx.Dict(finer)
        self.scales, self.dropped = range(first, config.scales), first - before

    def __call__(self, maps: list[jax.Array]) -> list[jax.Array]:
        found = []
        for place, s in enumerate(self.scales, start=self.dropped):
            new = [self.finer[str(s)](maps[place - 1])] if str(s) in self.finer else []
            found.append(jnp.concatenate([maps[place], *new, self.own[str(s)](maps[place])], -1))
        return found


class Transition(nnx.Module):
    """1x1 convolutions that bring `channels` down to `after`, at every scale from `first` on."""

    def __init__(self, channels: int, after: int, first: int, scales: int, *, rngs: nnx.Rngs):
        self.convs = nnx.List([ConvNorm(channels * 2**s, after * 2**s, 1, rngs=rngs) for s in range(first, scales)])

    def __call__(self, maps: list[jax.Array]) -> list[jax.Array]:
        return [conv(x) for conv, x in zip(self.convs, maps, strict=True)]


def _stages(config: MSDNetConfig, rngs: nnx.Rngs) -> Iterator[tuple[nnx.Sequential, int]]:
    """Each block of layers, and how many channels the coarsest scale has behind it."""
    total = config.base + config.step * (config.blocks - 1)
    interval = math.ceil(total / config.scales)
    channels, number = config.channels, 0
    for block in range(config.blocks):
        layers: list[nnx.Module] = (
            [Pyramid([config.channels * 2**s for s in range(config.scales)], rngs=rngs)] if block == 0 else []
        )
        for _ in range(config.base if block == 0 else config.step):
            before, first = max(0, number - 1) // interval, number // interval
            layers.append(Layer(channels, before, first, config, rngs=rngs))
            channels, number = channels + config.growth, number + 1
            if first > before:
                layers.append(Transition(channels, channels // 2, first, config.scales, rngs=rngs))
                channels //= 2
        yield nnx.Sequential(*layers), channels * 2 ** (config.scales - 1)


def build(
    config: MSDNetConfig, num_classes: int, *, rngs: nnx.Rngs, twin_params: nnx.State | None = None
) -> nnx.Module:
    """The MSDNet of `config`."""
    gate = None if config.dynamics == "static" else config.gate
    return build_exits(_stages(config, rngs), num_classes, gate, rngs=rngs, twin_params=twin_params)


def _rules(config: MSDNetConfig) -> Iterator[Rule]:
    halves = config.scales == 1 or config.growth >= 2
    yield Rule("growth", config.growth, halves, "at least 2: a scale takes half of it from the next finer one")
    yield from rules.doubled(config, "channels growth", config.scales)


FAMILY = register(
    Family(
        MSDNetConfig,
        build,
        tiny=dict(scales=2, channels=4, growth=2, blocks=2, base=1, step=1),
        rules=_rules,
        uses=SOLVED,
    )
)
