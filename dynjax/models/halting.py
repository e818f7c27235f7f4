"""One block, applied as often as a picture needs: ACT, SACT and PonderNet (`dynjax.ops.halting`) as classifiers.

Letters: B examples, H W pixels, C channels, K classes.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from dynjax.core.controls import RandomGate
from dynjax.core.gates import SampleGate, TileGate
from dynjax.models.blocks import Mix, gather_pixels, pixels
from dynjax.models.registry import SOLVED, Family, budgeted, filled, register
from dynjax.models.rules import Depth, Halvings, Side, Width
from dynjax.ops.halting import Halt


@dataclasses.dataclass(frozen=True)
class HaltConfig:
    """A residual block applied again and again, until a halting unit says stop."""

    family: Literal["halting"] = "halting"
    channels: Width = 32
    halvings: Halvings = 1
    """How often the stem halves the picture's resolution."""
    steps: Depth = 8
    """Most applications of the block; the static twin always has as many."""
    dynamics: Literal["static", "act", "sact", "pondernet"] = "static"
    """act: adaptive computation time per picture; sact: per tile; pondernet: trained on the prediction of every
    step."""
    tile: Side = 4
    """Side of a tile of sact, in pixels of the block's map."""
    gate: Literal["learned", "random"] = "learned"


GO_ON = 0.75
"""Chance of going on after a step, of the random control."""


class Stem(nnx.Module):
    """A 3x3 convolution at the picture's resolution, then half the resolution, `halvings` times."""

    def __init__(self, channels: int, halvings: int, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, channels, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(channels, momentum=0.95, rngs=rngs)
        self.down = nnx.List([Mix(4 * channels, channels, rngs=rngs) for _ in range(halvings)])

    def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
        x = nnx.relu(self.norm(self.conv(x)))
        for mix in self.down:
            x = mix(gather_pixels(x))
        return x


class Step(nnx.Module):
    """Two 3x3 convolutions around a shortcut, normalised per pixel. Receptive radius 2.

    Not by batch statistics, which differ from step to step; nor over the map, which would mix its tiles.
    """

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(channels, rngs=rngs)
        self.conv1 = nnx.Conv(channels, channels, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(channels, channels, (3, 3), rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return x + self.conv2(nnx.relu(self.conv1(nnx.relu(self.norm(x)))))


class Head(nnx.Module):
    """Logits from the mean over the normalised map."""

    def __init__(self, channels: int, classes: int, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(channels, rngs=rngs)
        self.linear = nnx.Linear(channels, classes, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B K"]:
        return self.linear(nnx.relu(self.norm(x)).mean((1, 2))).astype(jnp.float32)


class Repeat(nnx.Module):
    """`step` applied `steps` times to everything: what `Halt` does without a halting unit."""

    def __init__(self, step: nnx.Module, steps: int):
        self.step, self.steps = step, steps

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        for _ in range(self.steps):
            x = self.step(x)
        return x


class HaltNet(nnx.Module):
    """Stem, a block applied again and again, head: (B, H, W, 3) bytes to (B, K) float32."""

    def __init__(self, stem: Stem, body: Repeat | Halt, head: Head):
        self.stem, self.body, self.head = stem, body, head

    def __call__(self, image: UInt8[Array, "B H W 3"]) -> Float[Array, "B K"]:
        return self.head(self.body(self.stem(pixels(image, self.head.linear.kernel.dtype))))


class PonderNet(nnx.Module):
    """A `HaltNet` that is trained on its predictions after every step."""

    def __init__(self, stem: Stem, body: Halt, head: Head):
        self.stem, self.body, self.head = stem, body, head

    def __call__(self, image: UInt8[Array, "B H W 3"]) -> Float[Array, "B K"]:
        return self.head(self.body(self.stem(pixels(image, self.head.linear.kernel.dtype))))

    def predictions(self, image: UInt8[Array, "B H W 3"]) -> list[Float[Array, "B K"]]:
        """The logits after every step, each to be weighted by `halting_distribution` of the traced decision."""
        states = self.body.predictions(self.stem(pixels(image, self.head.linear.kernel.dtype)))
        return [self.head(state) for state in states]


def build(config: HaltConfig, num_classes: int, *, rngs: nnx.Rngs, twin_params: nnx.State | None = None) -> nnx.Module:
    """The network of `config`, which halts if it says so."""
    stem, step = Stem(config.channels, config.halvings, rngs=rngs), Step(config.channels, rngs=rngs)
    head = Head(config.channels, num_classes, rngs=rngs)
    static = filled(HaltNet(stem, Repeat(step, config.steps), head), twin_params)
    if config.dynamics == "static":
        return static
    size = config.tile if config.dynamics == "sact" else None
    if config.gate == "random":
        # Whatever the kind: it stops by chance, and gives the state that it then has.
        body = Halt(static.body.step, RandomGate(GO_ON, size=size, rngs=rngs), config.steps, kind="hard")
        return HaltNet(static.stem, body, static.head)
    gate = SampleGate(config.channels, rngs=rngs) if size is None else TileGate(config.channels, size=size, rngs=rngs)
    if config.dynamics == "pondernet":
        return PonderNet(static.stem, Halt(static.body.step, gate, config.steps, kind="pondernet"), static.head)
    return HaltNet(static.stem, Halt(static.body.step, gate, config.steps, kind="act"), static.head)


def _uses(config: HaltConfig) -> frozenset[str]:
    # PonderNet is trained on every output whatever it costs.
    pondernet = config.dynamics == "pondernet" and config.gate == "learned"
    return SOLVED | {"loss.ponder"} if pondernet else budgeted(config)


FAMILY = register(Family(HaltConfig, build, tiny=dict(channels=4, halvings=0, steps=2), uses=_uses, apart=("tile",)))
