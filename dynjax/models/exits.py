"""Classifiers that stop early: what the families with exits share. Letters: B examples, H W pixels, K classes."""

from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from dynjax.core.arguments import Tree
from dynjax.models.blocks import ConvNorm, pixels
from dynjax.models.registry import filled
from dynjax.ops import Exits

INNER = 128
"""Channels inside an exit's head."""


class Head(nnx.Module):
    """An exit: two 3x3 convolutions of stride 2 on the coarsest map, its mean, and a linear layer."""

    def __init__(self, channels: int, classes: int, *, rngs: nnx.Rngs):
        self.convs = nnx.Sequential(ConvNorm(channels, INNER, 3, 2, rngs=rngs), ConvNorm(INNER, INNER, 3, 2, rngs=rngs))
        self.linear = nnx.Linear(INNER, classes, rngs=rngs)

    def __call__(self, maps: list[jax.Array]) -> Float[Array, "B K"]:
        return self.linear(self.convs(maps[-1]).mean((1, 2))).astype(jnp.float32)


class StaticExitNet(nnx.Module):
    """The twin of `ExitNet`: all stages and the last head alone; (B, H, W, 3) bytes to (B, K) float32."""

    def __init__(self, stages: list[nnx.Module], head: Head):
        self.stages, self.head = nnx.List(stages), head

    def __call__(self, image: UInt8[Array, "B H W 3"]) -> Float[Array, "B K"]:
        x: Tree = pixels(image, self.head.linear.kernel.dtype)
        for stage in self.stages:
            x = stage(x)
        return self.head(x)


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


def with_exits(stages: Sequence[nnx.Module], heads: Sequence[Callable], gate: str) -> ExitNet:
    """Stages and the head behind each; pictures leave where they are sure, or with the gate "random" by chance."""
    return ExitNet(Exits(stages, heads, confidence="random" if gate == "random" else "max_prob"))


def build_exits(
    parts: Iterable[tuple[nnx.Module, int]],
    classes: int,
    gate: str | None,
    *,
    rngs: nnx.Rngs,
    twin_params: nnx.State | None,
) -> StaticExitNet | ExitNet:
    """The classifier of stages, each with the channels that an exit behind it reads; without a gate the static twin."""
    stages, widths = zip(*parts, strict=True)
    static = filled(StaticExitNet(list(stages), Head(widths[-1], classes, rngs=rngs)), twin_params)
    if gate is None:
        return static
    heads = [Head(width, classes, rngs=rngs) for width in widths[:-1]]
    return with_exits(static.stages, [*heads, static.head], gate)
