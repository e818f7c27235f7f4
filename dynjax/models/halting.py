"""One block, applied as often as a picture needs: ACT, SACT and PonderNet (`dynjax.ops.halting`) as classifiers.

Letters: B examples, H W pixels, C channels, K classes.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from dynjax.models.blocks import make_gate, pixels
from dynjax.models.registry import BUDGET, SOLVED, Family, filled, register
from dynjax.models.resnet import Stem
from dynjax.models.rules import Depth, Halvings, Side, Width
from dynjax.ops.halting import Halt, Kind


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


def make_halt(
    step: nnx.Module,
    gate: str,
    channels: int,
    steps: int,
    *,
    size: int | None = None,
    kind: Kind = "act",
    rngs: nnx.Rngs,
) -> Halt:
    """`step` again and again, per picture or per tile of `size`. By chance, at first of 0.75 to go on: whatever the
    kind, it then gives the state in which it stops."""
    decides = make_gate(gate, channels, size=size, rate=0.75, rngs=rngs)
    return Halt(step, decides, steps, kind="hard" if gate == "random" else kind)


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
    channels = config.channels
    stem, step = Stem(channels, 1, config.halvings, rngs=rngs), Step(channels, rngs=rngs)
    static = filled(HaltNet(stem, Repeat(step, config.steps), Head(channels, num_classes, rngs=rngs)), twin_params)
    if config.dynamics == "static":
        return static
    size = config.tile if config.dynamics == "sact" else None
    kind: Kind = "pondernet" if config.dynamics == "pondernet" else "act"
    body = make_halt(step, config.gate, channels, config.steps, size=size, kind=kind, rngs=rngs)
    return (PonderNet if body.kind == "pondernet" else HaltNet)(static.stem, body, static.head)


def _uses(config: HaltConfig) -> frozenset[str]:
    # PonderNet is trained on every output whatever it costs.
    pondernet = config.dynamics == "pondernet" and config.gate == "learned"
    return SOLVED | {"loss.ponder"} if pondernet else BUDGET


FAMILY = register(Family(HaltConfig, build, tiny=dict(channels=4, halvings=0, steps=2), uses=_uses, apart=("tile",)))
