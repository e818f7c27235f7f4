"""A residual network for small pictures whose 3x3 convolutions have kernels of the input.

The static form is the twin: the stem, the layers that halve the resolution and the head are the same in all forms. Its
trained parameters start the forms that mix kernels, or generate one for each picture: see `with_kernels`.

Letters: B examples, H W pixels, C channels, K classes.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Literal

from flax import nnx
from jaxtyping import Array, Float, UInt8

from dynjax.config import UserError
from dynjax.models import rules
from dynjax.models.blocks import batch_norm, pixels
from dynjax.models.registry import Family, filled, register
from dynjax.models.resnet import Down, Head, Stem
from dynjax.models.rules import Counts, Depth, Rule, Widths
from dynjax.ops.filters import DDF, Involution
from dynjax.ops.kernels import CondConv, DynamicConv, HyperConv, ODConv, with_kernels
from dynjax.ops.warehouse import Warehouse, WarehouseConv

PER_PIXEL = ("involution", "ddf")


@dataclasses.dataclass(frozen=True)
class DynamicConvNetConfig:
    """A small residual network whose 3x3 convolutions have kernels of the input."""

    family: Literal["dynamicconvnet"] = "dynamicconvnet"
    stem_stride: int = 1
    """The first stage works at 1/stem_stride of the picture: 1 or 2."""
    widths: Widths = (16, 24, 48)
    """Channels of each stage; each further stage works at half the resolution of the one before."""
    blocks: Counts = (1, 1, 1)
    """Residual blocks of each stage."""
    dynamics: Literal["static", "condconv", "dyconv", "odconv", "hyper", "warehouse", "involution", "ddf"] = "static"
    """condconv, dyconv, odconv: kernels mixed for each picture; hyper: generated for it; warehouse: assembled for
    it from cells that the layers of a stage share; involution, ddf: generated for each pixel."""
    kernels: Depth = 4
    """Kernels that are mixed."""
    cells: float = 1.0
    """Parameters of a stage's warehouse, as a multiple of those of the static kernels."""
    gate: Literal["learned", "random"] = "learned"


Convolutions = Callable[[int, int, nnx.Rngs], Iterator[nnx.Module]]
"""So many channels and layers of a stage: its convolutions, each made when its turn comes."""


class KernelBlock(nnx.Module):
    """Two convolutions of any kind with batch normalisation around a shortcut."""

    def __init__(self, channels: int, convolutions: Iterator[nnx.Module], *, rngs: nnx.Rngs):
        self.conv1, self.conv2 = next(convolutions), next(convolutions)
        self.norm1, self.norm2 = batch_norm(channels, rngs=rngs), batch_norm(channels, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        y = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(x + self.norm2(self.conv2(y)))


class DynamicConvNet(nnx.Module):
    """Logits for every picture: (B, H, W, 3) bytes to (B, K) float32; `convolutions` makes those of its blocks."""

    def __init__(self, config: DynamicConvNetConfig, classes: int, convolutions: Convolutions, *, rngs: nnx.Rngs):
        widths = config.widths
        self.stem = Stem(widths[0], config.stem_stride, rngs=rngs)
        self.down = nnx.List([Down(before, after, rngs=rngs) for before, after in itertools.pairwise(widths)])
        stages = []
        for width, count in zip(widths, config.blocks, strict=True):
            layers = convolutions(width, 2 * count, rngs)
            stages.append(nnx.List([KernelBlock(width, layers, rngs=rngs) for _ in range(count)]))
        self.stages = nnx.List(stages)
        self.head = Head(widths[-1], classes, rngs=rngs)

    def __call__(self, image: UInt8[Array, "B H W 3"]) -> Float[Array, "B K"]:
        x = self.stem(pixels(image, self.head.linear.kernel.dtype))
        for number, blocks in enumerate(self.stages):
            x = self.down[number - 1](x) if number else x
            for block in blocks:
                x = block(x)
        return self.head(x)


def build(
    config: DynamicConvNetConfig, num_classes: int, *, rngs: nnx.Rngs, twin_params: nnx.State | None = None
) -> nnx.Module:
    """The net of `config`.

    `twin_params`: variables of a static twin, whose kernels all mixed or generated ones start from.

    Raises:
        UserError: for per-pixel or assembled kernels that should start from a twin.
    """
    if config.dynamics in (*PER_PIXEL, "warehouse") and twin_params is not None:
        raise UserError(
            f"init_from: {config.dynamics} cannot start from a static twin's kernels; train it from the start"
        )
    from_static = twin_params is not None and config.dynamics != "static"
    kind = "static" if from_static else config.dynamics
    model = filled(DynamicConvNet(config, num_classes, _convolutions(kind, config), rngs=rngs), twin_params)
    if not from_static:
        return model
    return with_kernels(
        model,
        {r"stages/\d+/\d+/conv[12]": config.dynamics},
        kernels=config.kernels,
        random=config.gate == "random",
        rngs=rngs,
    )


def _convolutions(kind: str, config: DynamicConvNetConfig) -> Convolutions:
    """What makes 3x3 convolutions of this kind that keep the channels."""
    ways = dict(use_bias=False, random=config.gate == "random")

    def pointwise(module, channels, rngs):
        # What works within channels is followed by a layer over them, as a convolution is both.
        return nnx.Sequential(module, nnx.Linear(channels, channels, use_bias=False, rngs=rngs))

    def assembled(channels, layers, rngs):
        warehouse = Warehouse([(3, 3, channels, channels)] * layers, config.cells, rngs=rngs)
        for layer in range(layers):
            yield WarehouseConv(channels, channels, (3, 3), warehouse=warehouse, layer=layer, **ways, rngs=rngs)

    one = {
        "static": lambda c, rngs: nnx.Conv(c, c, (3, 3), use_bias=False, rngs=rngs),
        "condconv": lambda c, rngs: CondConv(c, c, (3, 3), kernels=config.kernels, **ways, rngs=rngs),
        "dyconv": lambda c, rngs: DynamicConv(c, c, (3, 3), kernels=config.kernels, **ways, rngs=rngs),
        "odconv": lambda c, rngs: ODConv(c, c, (3, 3), kernels=config.kernels, **ways, rngs=rngs),
        "hyper": lambda c, rngs: HyperConv(c, c, (3, 3), **ways, rngs=rngs),
        "involution": lambda c, rngs: pointwise(
            Involution(c, c, (3, 3), group_channels=math.gcd(c, 8), rngs=rngs), c, rngs
        ),
        "ddf": lambda c, rngs: pointwise(DDF(c, c, (3, 3), rngs=rngs), c, rngs),
    }
    if kind == "warehouse":
        return assembled
    return lambda channels, layers, rngs: (one[kind](channels, rngs) for _ in range(layers))


def _rules(config: DynamicConvNetConfig) -> Iterator[Rule]:
    yield from rules.levels(config.widths, config.blocks, "stage")
    yield from rules.one_of("stem_stride", config.stem_stride, 1, 2)
    if config.dynamics != "static":
        yield from rules.has_blocks(config.blocks, config.dynamics)
    yield Rule("cells", config.cells, 0 < config.cells <= 8, "more than 0 and at most 8")
    has_weights = config.gate != "random" or config.dynamics not in PER_PIXEL
    yield Rule("gate", config.gate, has_weights, f"learned: {config.dynamics} has no weights to draw, only filters")


FAMILY = register(
    Family(
        DynamicConvNetConfig,
        build,
        tiny=dict(widths=(4, 8), blocks=(1, 1), kernels=2),
        rules=_rules,
        apart=("kernels", "cells"),
    )
)
