"""A classifier and a segmenter whose pictures take their own paths through a grid of scales and layers.

After dynamic routing (Li et al. 2020, arXiv:2003.10401, section 3.4), at a size for small pictures. Deviations: maps
are normalised per example, since batch statistics would depend on the paths that others take, count examples that do
not reach a cell, and change with the threshold; a path down folds 2x2 pixels into the channels of its 1x1 convolution
rather than drop three of four; a path up repeats pixels rather than interpolate, which would cost more than the
convolution; cells have plain 3x3 convolutions unless separable ones are asked for.

Letters: B examples, H W pixels, C D channels, K classes, S scales.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from dynjax.core.controls import SampledPaths
from dynjax.core.gates import PathGate
from dynjax.models import rules
from dynjax.models.blocks import Block, Down, Mix, pixels, repeat_pixels, spread_pixels
from dynjax.models.registry import BUDGET, Family, built_by, register
from dynjax.models.rules import DEEPEST, Rule, Scales, Width
from dynjax.ops import Cell, Supernet


@dataclasses.dataclass(frozen=True)
class RoutedConfig:
    """A grid of scales and layers through which every picture takes its own paths."""

    family: Literal["routed"] = "routed"
    task: Literal["classification", "segmentation"] = "classification"
    """One label for the picture, or for every pixel."""
    channels: Width = 16
    """Channels of the finest scale; each coarser one has twice as many."""
    scales: Scales = 3
    """Resolutions, each half of the one before."""
    layers: int = 4
    """Layers of cells, at least as many as scales: each reaches one scale more."""
    stem_stride: int = 1
    """The finest scale works at 1/stem_stride of the picture: 1, 2 or 4."""
    operation: Literal["residual", "separable"] = "residual"
    """What a cell does: a residual block of two 3x3 convolutions, or of two separable ones as in the paper, which are
    slow on CPUs."""
    dynamics: Literal["static", "gates", "single", "sandwich"] = "static"
    """static: all paths open. gates: each cell has a gate for its paths. single, sandwich: trained by sampling paths,
    one through the net, or all, none and some of them."""
    gate: Literal["learned", "random"] = "learned"


def _norm(channels: int, *, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """Each example by its own mean and deviation, over the map and all channels."""
    return nnx.GroupNorm(channels, num_groups=1, rngs=rngs)


class Separable(nnx.Module):
    """Two depthwise 3x3 convolutions, each with a linear layer, around a shortcut."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        def depthwise():
            return nnx.Conv(channels, channels, (3, 3), feature_group_count=channels, use_bias=False, rngs=rngs)

        self.depth1, self.mix1 = depthwise(), Mix(channels, channels, _norm, rngs=rngs)
        self.depth2, self.linear2 = depthwise(), nnx.Linear(channels, channels, use_bias=False, rngs=rngs)
        self.norm2 = _norm(channels, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        y = self.mix1(self.depth1(x))
        return nnx.relu(x + self.norm2(self.linear2(self.depth2(y))))


class Up(nnx.Module):
    """Half the channels at twice the resolution."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.mix = Mix(channels, channels // 2, _norm, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B 2*H 2*W D"]:
        return repeat_pixels(self.mix(x))


class LabelHead(nnx.Module):
    """Logits from the normalised means over the maps of all scales."""

    def __init__(self, channels: Sequence[int], classes: int, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(sum(channels), rngs=rngs)
        self.linear = nnx.Linear(sum(channels), classes, rngs=rngs)

    def __call__(self, maps: Sequence[Float[Array, "B _H _W _C"]]) -> Float[Array, "B K"]:
        means = jnp.concatenate([x.mean((1, 2)) for x in maps], -1)
        return self.linear(self.norm(means)).astype(jnp.float32)


class MaskHead(nnx.Module):
    """Logits of every pixel: from the coarsest scale up, each map is added to what comes from below, and mixed."""

    def __init__(self, channels: Sequence[int], classes: int, stride: int, *, rngs: nnx.Rngs):
        self.up = nnx.List([Up(coarse, rngs=rngs) for coarse in channels[1:]])
        self.mix = Mix(channels[0], channels[0], _norm, rngs=rngs)
        self.linear = nnx.Linear(channels[0], classes * stride**2, rngs=rngs)
        self.stride = stride

    def __call__(self, maps: Sequence[Float[Array, "B _H _W _C"]]) -> Float[Array, "B H W K"]:
        x = maps[-1]
        for finer, up in zip(reversed(maps[:-1]), reversed(self.up), strict=True):
            x = finer + up(x)[:, : finer.shape[1], : finer.shape[2]]
        return spread_pixels(self.linear(self.mix(x)).astype(jnp.float32), self.stride)


class Routed(nnx.Module):
    """Logits for every picture, (B, K), or for every pixel, (B, H, W, K), float32; takes (B, H, W, 3) bytes."""

    def __init__(self, config: RoutedConfig, classes: int, *, rngs: nnx.Rngs):
        stride, channels = config.stem_stride, [config.channels * 2**scale for scale in range(config.scales)]
        self.stem = nnx.Conv(3, channels[0], (max(3, 2 * stride - 1),) * 2, stride, use_bias=False, rngs=rngs)
        self.stem_norm = _norm(channels[0], rngs=rngs)
        self.supernet = Supernet([_layer(number, config, channels, rngs) for number in range(config.layers)])
        if config.task == "classification":
            self.head: LabelHead | MaskHead = LabelHead(channels, classes, rngs=rngs)
        else:
            self.head = MaskHead(channels, classes, stride, rngs=rngs)

    def __call__(self, image: UInt8[Array, "B H W 3"]) -> Float[Array, "B K"] | Float[Array, "B H W K"]:
        x = nnx.relu(self.stem_norm(self.stem(pixels(image, self.stem.kernel.dtype))))
        logits = self.head(self.supernet(x))
        return logits if logits.ndim == 2 else logits[:, : image.shape[1], : image.shape[2]]


def _layer(number: int, config: RoutedConfig, channels: Sequence[int], rngs: nnx.Rngs) -> list[Cell]:
    """The cells of one layer: as many as it reaches, with all the paths that lead somewhere."""
    last = number == config.layers - 1
    cells = []
    for scale, width in enumerate(channels[: number + 1]):
        up = Up(width, rngs=rngs) if scale and not last else None
        down = Down(width, 2 * width, _norm, rngs=rngs) if scale + 1 < config.scales and not last else None
        gate = _gate(config, width, 1 + (up is not None) + (down is not None), rngs)
        operation = Block(width, _norm, rngs=rngs) if config.operation == "residual" else Separable(width, rngs=rngs)
        cells.append(Cell(operation, gate, up=up, down=down))
    return cells


def _gate(config: RoutedConfig, channels: int, paths: int, rngs: nnx.Rngs) -> PathGate | SampledPaths | None:
    if config.dynamics == "static":
        return None
    if config.dynamics == "gates" and config.gate == "learned":
        return PathGate(channels, paths, rngs=rngs)
    return SampledPaths(paths, "independent" if config.dynamics == "gates" else config.dynamics, rngs=rngs)


def _rules(config: RoutedConfig) -> Iterator[Rule]:
    reaches, least = config.scales <= config.layers <= DEEPEST, config.scales
    yield Rule("layers", config.layers, reaches, f"from {least} to {DEEPEST}: each layer reaches one scale more")
    yield from rules.one_of("stem_stride", config.stem_stride, 1, 2, 4)
    yield from rules.doubled(config, "channels", config.scales)
    control = config.gate != "random" or config.dynamics not in ("single", "sandwich")
    wanted = f"learned: random is the control of gates, and {config.dynamics} learns none"
    yield Rule("gate", config.gate, control, wanted)


FAMILY = register(
    Family(
        RoutedConfig,
        built_by(Routed),
        task=lambda config: config.task,
        tiny=dict(channels=4, scales=2, layers=2),
        rules=_rules,
        uses=BUDGET,
    )
)
