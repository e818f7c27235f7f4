"""MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381, table 2).

Weights in the layout of torchvision's `mobilenet_v2` can be loaded. Deviation: no dropout.

Letters: B examples, H W pixels.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import jax
from flax import nnx
from jaxtyping import Array, UInt8

from dynjax.data.tensors import read_tensors
from dynjax.models import rules
from dynjax.models.backbones.inverted import STAGES_OF, InvertedBlock, Ways, maps_of, peeled, sites_of_stages
from dynjax.models.backbones.resnet import Stem
from dynjax.models.dense import BackboneConfig, Site
from dynjax.models.from_torch import fill
from dynjax.models.frozen import freeze_whole
from dynjax.models.registry import Family, register
from dynjax.models.rules import Range, Rule

STAGES = (
    *((1, 1, 16, 1), (6, 2, 24, 2), (6, 3, 32, 2), (6, 4, 64, 2)),
    *((6, 3, 96, 1), (6, 3, 160, 2), (6, 1, 320, 1)),
)
"""Expansion, blocks, channels and stride of the first block."""
STEM = 32


def scaled(channels: int, width: float) -> int:
    """Channels times the width, to the nearest multiple of 8 that is no less than nine tenths of it."""
    wanted = channels * width
    found = max(8, int(wanted + 4) // 8 * 8)
    return found + 8 if found < 0.9 * wanted else found


@dataclasses.dataclass(frozen=True)
class MobileNetConfig:
    """MobileNetV2, up to a map."""

    family: Literal["mobilenet"] = "mobilenet"
    levels: Annotated[int, Range(1, 5)] = 5
    """Maps, at strides 2, 4, 8, 16 and 32; what is only behind these is left out."""
    width: float = 1.0
    """Of all channels, as a multiple of the paper's."""
    weights: str = ""
    """File (.pth, .npz, .safetensors) of weights that training begins with, named as torchvision's."""
    frozen: Annotated[int, Range(0, 5)] = 0
    """Levels, the finest first, whose layers and statistics stay as they begin: training is faster."""

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(scaled(STAGES[last - 1][2], self.width) for last in STAGES_OF[: self.levels])


class MobileNet(nnx.Module):
    """Maps at strides 2, 4, 8, 16 and 32, each the last of its size, sizes rounded up."""

    def __init__(self, config: MobileNetConfig, *, rngs: nnx.Rngs):
        ways = Ways(1e-5, lambda side: ((side // 2, side // 2),) * 2, None, rngs)
        self.widths, self.strides = config.widths, tuple(2 ** (level + 1) for level in range(config.levels))
        before = scaled(STEM, config.width)
        self.stem = Stem(ways.conv(3, before, 3, 2), ways.norm(before), nnx.relu6)
        self.channels, stages = tuple(scaled(stage[2], config.width) for stage in STAGES), []
        for expansion, count, channels, stride in STAGES[: STAGES_OF[config.levels - 1]]:
            after = scaled(channels, config.width)
            shapes = [(before, after, 3, stride, expansion), *[(after, after, 3, 1, expansion)] * (count - 1)]
            stages.append(nnx.List([InvertedBlock(*shape, ways) for shape in shapes]))
            before = after
        self.stages = nnx.List(stages)
        if config.frozen:
            freeze_whole(self.stem)
            freeze_whole(nnx.List(self.stages[: STAGES_OF[config.frozen - 1]]))

    def __call__(self, image: UInt8[Array, "B H W 3"]) -> list[jax.Array]:
        x = self.stem(image)
        return maps_of(self.stages, x)

    def sites(self) -> Iterator[Site]:
        return sites_of_stages(self.stages, self.channels)

    @property
    def tail(self) -> nnx.List:
        return self.stages[-1]

    def peel(self) -> nnx.Module:
        coarsest = peeled(self.stages, self.widths)
        self.widths, self.strides = self.widths[:-1], self.strides[:-1]
        return coarsest

    def layers(self) -> dict[str, nnx.Module]:
        """By torchvision's names."""
        found: dict[str, nnx.Module] = {"features.0.0": self.stem.conv, "features.0.1": self.stem.norm}
        for index, block in enumerate((block for blocks in self.stages for block in blocks), 1):
            *inner, (project, project_norm) = block.layers()
            for part, (layer, norm) in enumerate(inner):
                found |= {f"features.{index}.conv.{part}.0": layer, f"features.{index}.conv.{part}.1": norm}
            parts = len(inner)
            found |= {
                f"features.{index}.conv.{parts}": project,
                f"features.{index}.conv.{parts + 1}": project_norm,
            }
        return found


def _begin(config: MobileNetConfig, net: MobileNet) -> None:
    if config.weights:
        blocks = sum(len(stage) for stage in net.stages)
        behind = tuple(f"features.{index}." for index in range(blocks + 1, 19))
        fill(net.layers(), read_tensors(Path(config.weights)), config.weights, (*behind, "classifier."))


def _rules(config: MobileNetConfig) -> Iterator[Rule]:
    yield Rule("width", config.width, 0 < config.width <= 8, "above 0, and at most 8")
    yield from rules.frozen(config.frozen, config.levels)


FAMILY = register(
    Family(
        MobileNetConfig,
        MobileNet,
        tiny=dict(levels=2, width=0.25, weights="", frozen=1),
        rules=_rules,
        begin=_begin,
        apart=("weights", "frozen"),
    ),
    BackboneConfig,
)
