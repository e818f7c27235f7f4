"""The nets of benchmarks/static_segmenters.py as PyTorch would have them, with the weights of ours. Needs torch.

Channels first, batch normalisation by its statistics; layers over 1x1 and 2x2 pixels are convolutions.
"""

import itertools
from typing import Any

import numpy as np
import torch
from flax import nnx
from torch import nn
from torch.nn import functional

from dynjax.models.backbones.efficientnet import STAGES_OF, EfficientNetLite0
from dynjax.models.dense import Dense


def tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(array, np.float32))


def filled(layer: nn.Conv2d, kernel: Any, bias: Any = None) -> nn.Conv2d:
    """`layer` itself, with a kernel (kh, kw, I, D)."""
    layer.weight.data = tensor(np.asarray(kernel).transpose(3, 2, 0, 1)).contiguous()
    if bias is not None and layer.bias is not None:
        layer.bias.data = tensor(bias)
    return layer


def pointwise(kernel: Any, bias: Any = None) -> nn.Conv2d:
    """A linear layer (I, D)."""
    kernel = np.asarray(kernel)
    return filled(nn.Conv2d(*kernel.shape, 1, bias=bias is not None), kernel[None, None], bias)


def normalised(norm: nnx.BatchNorm) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(norm.num_features, eps=norm.epsilon)
    layer.weight.data, layer.bias.data = tensor(norm.scale[...]), tensor(norm.bias[...])
    layer.running_mean.data, layer.running_var.data = tensor(norm.mean[...]), tensor(norm.var[...])
    return layer


class Same(nn.Module):
    """A convolution of a size that SAME pads, behind more than before where the padding is odd."""

    def __init__(self, conv: nnx.Conv):
        super().__init__()
        side, strides = conv.kernel_size[0], conv.strides
        self.side, self.stride = side, strides if isinstance(strides, int) else strides[0]
        # As much as PyTorch pads by itself; with a stride the rest comes before it.
        inside = side // 2 if self.stride == 1 else 0
        ways = dict(groups=conv.feature_group_count, padding=inside, bias=False)
        self.conv = filled(nn.Conv2d(conv.in_features, conv.out_features, side, self.stride, **ways), conv.kernel[...])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.stride > 1:
            pads = [
                max((-(-n // self.stride) - 1) * self.stride + self.side - n, 0)
                for n in (int(x.shape[3]), int(x.shape[2]))
            ]
            x = functional.pad(x, [side for pad in pads for side in (pad // 2, pad - pad // 2)])
        return self.conv(x)


class Residual(nn.Module):
    def __init__(self, body: nn.Module, after: nn.Module):
        super().__init__()
        self.body, self.after = body, after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(x + self.body(x))


def block(of: Any) -> Residual:
    """`dynjax.models.blocks.Block`."""
    first = Same(of.conv1), normalised(of.norm1), nn.ReLU(inplace=True)
    return Residual(nn.Sequential(*first, Same(of.conv2), normalised(of.norm2)), nn.ReLU(inplace=True))


def inverted(of: Any) -> nn.Module:
    """`InvertedBlock`."""
    layers: list[nn.Module] = []
    for layer, norm in of.layers():
        conv = Same(layer) if isinstance(layer, nnx.Conv) else pointwise(layer.kernel[...])
        layers += [conv, normalised(norm), nn.ReLU6(inplace=True)]
    body = nn.Sequential(*layers[:-1])
    return Residual(body, nn.Identity()) if of.stays else body


class Halve(nn.Module):
    """A linear layer over every 2x2 pixels; the last row and column are repeated where there are no more."""

    def __init__(self, of: Any):
        super().__init__()
        kernel = np.asarray(of.linear.kernel[...])
        kernel = kernel.reshape(2, 2, -1, kernel.shape[1])
        self.conv, self.norm = filled(nn.Conv2d(*kernel.shape[2:], 2, 2, bias=False), kernel), normalised(of.norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bottom, right = int(x.shape[2]) % 2, int(x.shape[3]) % 2
        if bottom or right:
            x = functional.pad(x, (0, right, 0, bottom), mode="replicate")
        return functional.relu(self.norm(self.conv(x)), inplace=True)


class Merge(nn.Module):
    """As in ours, the coarse map is multiplied before it is repeated."""

    def __init__(self, of: Any):
        super().__init__()
        own, other = np.split(np.asarray(of.linear.kernel[...]), [of.linear.kernel.shape[1]])
        self.own, self.other, self.norm = pointwise(own), pointwise(other), normalised(of.norm)

    def forward(self, fine: torch.Tensor, coarse: torch.Tensor) -> torch.Tensor:
        repeated = functional.interpolate(self.other(coarse), scale_factor=2.0, mode="nearest")
        y = self.own(fine) + repeated[:, :, : fine.shape[2], : fine.shape[3]]
        return functional.relu(self.norm(y), inplace=True)


class Net(nn.Module):
    """Bytes (B, H, W, 3) to logits (B, K, H, W), with the layers and weights of `net`."""

    def __init__(self, net: Dense):
        super().__init__()
        backbone, head = net.backbone, net.head
        rectifier: nn.Module
        if isinstance(backbone, EfficientNetLite0):
            self.centre, self.scale, rectifier = 127.0, 128.0, nn.ReLU6(inplace=True)
            stages = [nn.Sequential(*map(inverted, blocks)) for blocks in backbone.stages]
            ends = itertools.pairwise([0, *STAGES_OF[: len(backbone.widths)]])
            levels = [nn.Sequential(*stages[start:end]) for start, end in ends]
        else:
            self.centre, self.scale, rectifier = 127.5, 127.5, nn.ReLU(inplace=True)
            pairs = zip([nn.Identity(), *map(Halve, backbone.down)], backbone.blocks, strict=True)
            levels = [nn.Sequential(down, *map(block, blocks)) for down, blocks in pairs]
        self.stem = nn.Sequential(Same(backbone.stem), normalised(backbone.stem_norm), rectifier)
        self.levels = nn.ModuleList(levels)
        self.up = nn.ModuleList(map(Merge, head.up))
        self.blocks = nn.ModuleList(nn.Sequential(*map(block, blocks)) for blocks in head.blocks)
        self.stride = head.classify.stride
        kernel, bias = (self._turned(each[...]) for each in (head.classify.linear.kernel, head.classify.linear.bias))
        self.classify = pointwise(kernel, bias)

    def _turned(self, array: Any) -> np.ndarray:
        """The pixels of each class, not the classes of each pixel."""
        array = np.asarray(array)
        return array.reshape(*array.shape[:-1], self.stride**2, -1).swapaxes(-1, -2).reshape(array.shape)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem((image.permute(0, 3, 1, 2).to(torch.float32) - self.centre) / self.scale)
        maps = []
        for level in self.levels:
            x = level(x)
            maps.append(x)
        for level in reversed(range(len(self.up))):
            x = self.blocks[level](self.up[level](maps[level], x))
        return functional.pixel_shuffle(self.classify(x), self.stride)[:, :, : image.shape[1], : image.shape[2]]


def convolutions(net: nn.Module, image: torch.Tensor) -> list[tuple[nn.Conv2d, torch.Tensor]]:
    """The convolutions that the net runs, in their order, each with its input."""
    found: list[tuple[nn.Conv2d, torch.Tensor]] = []

    def keep(layer: nn.Conv2d, inputs: tuple[torch.Tensor, ...]) -> None:
        found.append((layer, inputs[0].clone()))

    hooks = [each.register_forward_pre_hook(keep) for each in net.modules() if isinstance(each, nn.Conv2d)]
    with torch.inference_mode():
        net(image)
    for hook in hooks:
        hook.remove()
    return found
