"""Inverted residual blocks, of which mobile networks are made.

Letters: B examples, H W pixels, C D channels.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from dynjax.models.dense import Site

Init = Callable[..., Any] | None
Padding = str | Sequence[tuple[int, int]]


class Ways:
    """How the layers of one network are made."""

    def __init__(self, epsilon: float, padding: Callable[[int], Padding], init: Init, rngs: nnx.Rngs):
        self.epsilon, self.padding, self.rngs = epsilon, padding, rngs
        self.init: dict[str, Any] = {} if init is None else {"kernel_init": init}

    def norm(self, channels: int) -> nnx.BatchNorm:
        return nnx.BatchNorm(channels, momentum=0.99, epsilon=self.epsilon, rngs=self.rngs)

    def linear(self, before: int, after: int) -> nnx.Linear:
        return nnx.Linear(before, after, use_bias=False, rngs=self.rngs, **self.init)

    def conv(self, before: int, after: int, side: int, stride: int, groups: int = 1) -> nnx.Conv:
        ways = dict(self.init, padding=self.padding(side), feature_group_count=groups)
        return nnx.Conv(before, after, (side, side), (stride, stride), use_bias=False, rngs=self.rngs, **ways)


class InvertedBlock(nnx.Module):
    """More channels by a linear layer, a convolution of each channel, fewer channels; around a shortcut where the shape
    stays (Sandler et al. 2018, arXiv:1801.04381, section 3.3)."""

    def __init__(self, before: int, after: int, side: int, stride: int, expansion: int, ways: Ways):
        inner = before * expansion
        self.expand = ways.linear(before, inner) if expansion > 1 else None
        self.expand_norm = ways.norm(inner) if expansion > 1 else None
        self.depthwise, self.depthwise_norm = ways.conv(inner, inner, side, stride, inner), ways.norm(inner)
        self.project, self.project_norm = ways.linear(inner, after), ways.norm(after)
        self.stays = stride == 1 and before == after

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        y = x
        if self.expand is not None and self.expand_norm is not None:
            y = nnx.relu6(self.expand_norm(self.expand(y)))
        y = nnx.relu6(self.depthwise_norm(self.depthwise(y)))
        y = self.project_norm(self.project(y))
        return x + y if self.stays else y

    def layers(self) -> list[tuple[nnx.Module, nnx.Module]]:
        """Its layers, each with its norm, in their order."""
        pairs = (self.expand, self.expand_norm), (self.depthwise, self.depthwise_norm)
        found = (*pairs, (self.project, self.project_norm))
        return [(layer, norm) for layer, norm in found if layer is not None and norm is not None]


STAGES_OF = (1, 2, 3, 5, 7)
"""Stages of inverted blocks up to the map of each level, of strides 2, 4, 8, 16 and 32."""


def maps_of(stages: Sequence[nnx.List], x: Float[Array, "B H W C"]) -> list[jax.Array]:
    """The last map of each resolution, finest first."""
    maps: list[jax.Array] = []
    for number, blocks in enumerate(stages, 1):
        for block in blocks:
            x = block(x)
        if number in STAGES_OF:
            maps.append(x)
    return maps


def peeled(stages: nnx.List, widths: Sequence[int]) -> nnx.Sequential:
    """The blocks of the coarsest of so many levels, which `stages` has no more."""
    kept = STAGES_OF[len(widths) - 2]
    blocks = [block for stage in stages[kept:] for block in stage]
    while len(stages) > kept:
        stages.pop()
    return nnx.Sequential(*blocks)


def sites_of_stages(stages: Sequence[nnx.List], channels: Sequence[int]) -> Iterator[Site]:
    """All blocks but the first of every stage, which changes the shape."""
    for number, (blocks, width) in enumerate(zip(stages, channels, strict=False), 1):
        level = sum(last < number for last in STAGES_OF)
        yield from (Site(blocks, index, width, level) for index in range(1, len(blocks)))
