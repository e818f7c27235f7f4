"""Inception v3 (Szegedy et al. 2016, arXiv:1512.00567) as the Fréchet inception distance has it, up to its features.

That is the network of TensorFlow's `inception-2015-12-05`, in the form and with the names of pytorch-fid, whose three
deviations from torchvision's are kept: averages do not count padding, the last block takes a maximum where others
average, and the weights are others. Nothing is downloaded; the file `pt_inception-2015-12-05-6726825d.pth` does.
(PyPI's `jax-fid` has the network in Flax Linen, downloads a pickle by itself, and takes no file.)

Letters: B examples, H W pixels, C D channels.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynjax.config import UserError
from dynjax.models.from_torch import Tensors, blank, fill

FEATURES, CLASSES = 2048, 1008


class _Conv(NamedTuple):
    """A convolution by its name."""

    name: str
    channels: int
    height: int = 1
    width: int = 1
    stride: int = 1
    padding: Literal["SAME", "VALID"] = "SAME"


Step = _Conv | tuple[_Conv, ...] | Literal["average", "maximum", "shrink"]
"""Several convolutions: of the same, side by side."""
Branches = tuple[tuple[Step, ...], ...]


def _a(pool: int) -> Branches:
    return (
        (_Conv("branch1x1", 64),),
        (_Conv("branch5x5_1", 48), _Conv("branch5x5_2", 64, 5, 5)),
        (_Conv("branch3x3dbl_1", 64), _Conv("branch3x3dbl_2", 96, 3, 3), _Conv("branch3x3dbl_3", 96, 3, 3)),
        ("average", _Conv("branch_pool", pool)),
    )


def _b() -> Branches:
    last = _Conv("branch3x3dbl_3", 96, 3, 3, 2, "VALID")
    return (
        (_Conv("branch3x3", 384, 3, 3, 2, "VALID"),),
        (_Conv("branch3x3dbl_1", 64), _Conv("branch3x3dbl_2", 96, 3, 3), last),
        ("shrink",),
    )


def _c(inner: int) -> Branches:
    name = "branch7x7dbl"
    double = (_Conv(f"{name}_1", inner), _Conv(f"{name}_2", inner, 7, 1), _Conv(f"{name}_3", inner, 1, 7))
    return (
        (_Conv("branch1x1", 192),),
        (_Conv("branch7x7_1", inner), _Conv("branch7x7_2", inner, 1, 7), _Conv("branch7x7_3", 192, 7, 1)),
        (*double, _Conv(f"{name}_4", inner, 7, 1), _Conv(f"{name}_5", 192, 1, 7)),
        ("average", _Conv("branch_pool", 192)),
    )


def _d() -> Branches:
    name = "branch7x7x3"
    return (
        (_Conv("branch3x3_1", 192), _Conv("branch3x3_2", 320, 3, 3, 2, "VALID")),
        (
            *(_Conv(f"{name}_1", 192), _Conv(f"{name}_2", 192, 1, 7)),
            *(_Conv(f"{name}_3", 192, 7, 1), _Conv(f"{name}_4", 192, 3, 3, 2, "VALID")),
        ),
        ("shrink",),
    )


def _e(pool: Literal["average", "maximum"]) -> Branches:
    def both(name: str) -> tuple[_Conv, ...]:
        return _Conv(f"{name}a", 384, 1, 3), _Conv(f"{name}b", 384, 3, 1)

    return (
        (_Conv("branch1x1", 320),),
        (_Conv("branch3x3_1", 384), both("branch3x3_2")),
        (_Conv("branch3x3dbl_1", 448), _Conv("branch3x3dbl_2", 384, 3, 3), both("branch3x3dbl_3")),
        (pool, _Conv("branch_pool", 192)),
    )


STEM: tuple[Step, ...] = (
    *(_Conv("Conv2d_1a_3x3", 32, 3, 3, 2, "VALID"), _Conv("Conv2d_2a_3x3", 32, 3, 3, 1, "VALID")),
    *(_Conv("Conv2d_2b_3x3", 64, 3, 3), "shrink", _Conv("Conv2d_3b_1x1", 80)),
    *(_Conv("Conv2d_4a_3x3", 192, 3, 3, 1, "VALID"), "shrink"),
)
BLOCKS: dict[str, Branches] = {
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": _b(),
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),
    "Mixed_7a": _d(),
    "Mixed_7b": _e("average"),
    "Mixed_7c": _e("maximum"),
}


class Inception(nnx.Module):
    """Features of pictures: the mean over the last map, which is 8x8 for pictures of 299x299. All zeros until it has
    weights: see `filled`."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.convs: nnx.Dict[nnx.Conv] = nnx.Dict()
        self.norms: nnx.Dict[nnx.BatchNorm] = nnx.Dict()
        channels = self._make(STEM, "", 3, rngs)
        for block, branches in BLOCKS.items():
            channels = sum(self._make(branch, f"{block}.", channels, rngs) for branch in branches)

    def _make(self, steps: tuple[Step, ...], prefix: str, channels: int, rngs: nnx.Rngs) -> int:
        """The layers of a branch; gives its channels."""
        for step in steps:
            if isinstance(step, str):
                continue
            convs = (step,) if isinstance(step, _Conv) else step
            for conv in convs:
                ways: dict[str, Any] = dict(use_bias=False, padding=conv.padding, kernel_init=blank, rngs=rngs)
                sides, strides = (conv.height, conv.width), (conv.stride, conv.stride)
                self.convs[prefix + conv.name] = nnx.Conv(channels, conv.channels, sides, strides, **ways)
                self.norms[prefix + conv.name] = nnx.BatchNorm(conv.channels, epsilon=1e-3, rngs=rngs)
            channels = sum(conv.channels for conv in convs)
        return channels

    def __call__(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B 2048"]:
        """Of pictures from -1 to 1, of 75 pixels a side at least; FID's have 299."""
        x = self._run(STEM, "", image)
        for block, branches in BLOCKS.items():
            x = jnp.concatenate([self._run(branch, f"{block}.", x) for branch in branches], -1)
        return x.mean((1, 2))

    def _run(self, steps: tuple[Step, ...], prefix: str, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        for step in steps:
            if step == "average":
                x = nnx.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)
            elif step == "maximum":
                x = nnx.max_pool(x, (3, 3), (1, 1), "SAME")
            elif step == "shrink":
                x = nnx.max_pool(x, (3, 3), (2, 2), "VALID")
            else:
                convs = (step,) if isinstance(step, _Conv) else step
                x = jnp.concatenate([self._conv(prefix + conv.name, x) for conv in convs], -1)
        return x

    def _conv(self, name: str, x: jax.Array) -> jax.Array:
        return nnx.relu(self.norms[name](self.convs[name](x)))

    def layers(self) -> dict[str, nnx.Module]:
        """By their names in the weights' file."""
        found: dict[str, nnx.Module] = {}
        for name in self.convs:
            found |= {f"{name}.conv": self.convs[name], f"{name}.bn": self.norms[name]}
        return found


def filled(tensors: Tensors, where: object) -> Inception:
    """With these weights, by pytorch-fid's names. Raises UserError for those of another network, beginning with
    `where`."""
    classes = tensors["fc.bias"].shape[0] if "fc.bias" in tensors else CLASSES
    if classes != CLASSES:
        raise UserError(
            f"{where}: weights for {classes} classes; those of FID are for {CLASSES}: "
            "pt_inception-2015-12-05-6726825d.pth of pytorch-fid"
        )
    net = Inception(rngs=nnx.Rngs(0))
    fill(net.layers(), tensors, where, ("fc.",))
    return net
