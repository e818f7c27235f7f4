"""Residual networks for large pictures (He et al. 2016, arXiv:1512.03385, table 1), of 18, 34 or 50 layers.

Weights in the layout of torchvision's `resnet18`, `resnet34` and `resnet50` can be loaded; as there, a bottleneck has
its stride in the 3x3 convolution.

Letters: B examples, H W pixels, C D channels.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from dynjax.data.tensors import read_tensors
from dynjax.models import rules
from dynjax.models.dense import BackboneConfig, Site
from dynjax.models.from_torch import fill
from dynjax.models.frozen import freeze_whole
from dynjax.models.registry import Family, register
from dynjax.models.rules import Range, Rule, Width

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
"""Of the four stages, by depth."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's colours, from 0 to 1."""


def normalised(image: UInt8[Array, "B H W 3"], dtype: Any) -> Float[Array, "B H W 3"]:
    """Bytes as torchvision's networks have them."""
    mean, deviation = (jnp.asarray(each, dtype)[None, None, None] for each in (MEAN, DEVIATION))
    return (image.astype(dtype) / 255 - mean) / deviation


@dataclasses.dataclass(frozen=True)
class ResNetBackboneConfig:
    """A residual network for large pictures, up to a map."""

    family: Literal["resnet"] = "resnet"
    depth: Literal[18, 34, 50] = 18
    levels: Annotated[int, Range(2, 5)] = 5
    """Maps, at strides 2, 4, 8, 16 and 32; what is only behind these is left out."""
    width: Width = 64
    """Channels of the stem, and of the first stage's 3x3 convolutions; each further stage has twice as many."""
    weights: str = ""
    """File (.pth, .npz, .safetensors) of weights that training begins with, named as torchvision's."""
    frozen: Annotated[int, Range(0, 5)] = 0
    """Levels, the finest first, whose layers and statistics stay as they begin: training is faster."""

    @property
    def widths(self) -> tuple[int, ...]:
        more = 4 if self.depth == 50 else 1
        return (self.width, *(self.width * more * 2**stage for stage in range(4)))[: self.levels]


def _conv(before: int, after: int, side: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(before, after, (side, side), (stride, stride), padding=side // 2, use_bias=False, rngs=rngs)


def _norm(channels: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(channels, momentum=0.95, rngs=rngs)


def _pool(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    return nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


class Stem(nnx.Module):
    """Half the resolution: normalised colours through a convolution, a norm and a rectifier."""

    def __init__(self, conv: nnx.Conv, norm: nnx.BatchNorm, rectify: Callable[[jax.Array], jax.Array]):
        self.conv, self.norm, self.rectify = conv, norm, rectify

    def __call__(self, image: UInt8[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
        return self.rectify(self.norm(self.conv(normalised(image, self.conv.kernel.dtype))))


class ResidualBlock(nnx.Module):
    """Convolutions of these sides around a shortcut, which is a linear layer where the shape changes: (3, 3), or the
    bottleneck (1, 3, 1)."""

    def __init__(self, channels: tuple[int, ...], sides: tuple[int, ...], stride: int, *, rngs: nnx.Rngs):
        first = sides.index(3)
        strides = [stride if number == first else 1 for number in range(len(sides))]
        shapes = zip(channels, channels[1:], sides, strides, strict=False)
        self.convs = nnx.List([_conv(*shape, rngs) for shape in shapes])
        self.norms = nnx.List([_norm(after, rngs) for after in channels[1:]])
        same = stride == 1 and channels[0] == channels[-1]
        self.shortcut = None if same else _conv(channels[0], channels[-1], 1, stride, rngs)
        self.shortcut_norm = None if same else _norm(channels[-1], rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        y = x
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True), 1):
            y = norm(conv(y))
            y = nnx.relu(y) if number < len(self.convs) else y
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut(x))
        return nnx.relu(x + y)


class ResNetBackbone(nnx.Module):
    """The stem's map at stride 2, and those of the four stages at strides 4, 8, 16 and 32, sizes rounded up."""

    def __init__(self, config: ResNetBackboneConfig, *, rngs: nnx.Rngs):
        self.widths, self.strides = config.widths, tuple(2 ** (level + 1) for level in range(config.levels))
        self.stem = Stem(_conv(3, config.width, 7, 2, rngs), _norm(config.width, rngs), nnx.relu)
        before, stages = config.width, []
        for stage, after in enumerate(self.widths[1:]):
            inner = config.width * 2**stage
            middle = (inner, inner) if config.depth == 50 else (inner,)
            sides = (1, 3, 1) if config.depth == 50 else (3, 3)
            blocks = []
            for number in range(BLOCKS[config.depth][stage]):
                stride = 2 if stage and not number else 1
                blocks.append(ResidualBlock((before, *middle, after), sides, stride, rngs=rngs))
                before = after
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)
        if config.frozen:
            freeze_whole(self.stem)
            freeze_whole(nnx.List(self.stages[: config.frozen - 1]))

    def __call__(self, image: UInt8[Array, "B H W 3"]) -> list[jax.Array]:
        x: jax.Array = self.stem(image)
        maps = [x]
        for number, blocks in enumerate(self.stages):
            x = x if number else _pool(x)
            for block in blocks:
                x = block(x)
            maps.append(x)
        return maps

    def sites(self) -> Iterator[Site]:
        for level, (blocks, width) in enumerate(zip(self.stages, self.widths[1:], strict=True), 1):
            for number, block in enumerate(blocks):
                if not isinstance(block, ResidualBlock) or block.shortcut is None:
                    yield Site(blocks, number, width, level)

    @property
    def tail(self) -> nnx.List:
        return self.stages[-1]

    def peel(self) -> nnx.Module:
        self.widths, self.strides = self.widths[:-1], self.strides[:-1]
        blocks = self.stages.pop()
        return nnx.Sequential(*blocks) if len(self.stages) else nnx.Sequential(_pool, *blocks)

    def layers(self) -> dict[str, nnx.Module]:
        """By torchvision's names."""
        found: dict[str, nnx.Module] = {"conv1": self.stem.conv, "bn1": self.stem.norm}
        for stage, blocks in enumerate(self.stages, 1):
            for index, block in enumerate(blocks):
                name = f"layer{stage}.{index}"
                for number, pair in enumerate(zip(block.convs, block.norms, strict=True), 1):
                    found |= {f"{name}.conv{number}": pair[0], f"{name}.bn{number}": pair[1]}
                if block.shortcut is not None and block.shortcut_norm is not None:
                    found |= {f"{name}.downsample.0": block.shortcut, f"{name}.downsample.1": block.shortcut_norm}
        return found


def _begin(config: ResNetBackboneConfig, net: ResNetBackbone) -> None:
    if config.weights:
        behind = tuple(f"layer{stage}." for stage in range(config.levels, 5))
        fill(net.layers(), read_tensors(Path(config.weights)), config.weights, (*behind, "fc."))


def _rules(config: ResNetBackboneConfig) -> Iterator[Rule]:
    yield from rules.frozen(config.frozen, config.levels)


FAMILY = register(
    Family(
        ResNetBackboneConfig,
        ResNetBackbone,
        tiny=dict(levels=2, width=4, weights="", frozen=1),
        rules=_rules,
        begin=_begin,
        apart=("weights", "frozen"),
    ),
    BackboneConfig,
)
