"""Features by networks that others trained: EfficientNet-Lite0 and Inception.

Letters: B examples, H W h w pixels, D features.
"""

from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from dynjax.config import UserError
from dynjax.core import views
from dynjax.data.source import Size
from dynjax.data.tensors import read_tensors
from dynjax.models.backbones.efficientnet import EfficientNetLite0, pretrained
from dynjax.models.inception import Inception, filled
from dynjax.tasks import cache


class EfficientNetFeatures(nnx.Module):
    """1,280 features of EfficientNet-Lite0, whose weights are those of ImageNet.

    Pictures are resized bilinearly to its 224x224, those that shrink averaged over their own pixels. A smaller `size`
    is faster, and gives another distance.
    """

    name: ClassVar[str] = "efficientnet_lite0"

    def __init__(self, net: EfficientNetLite0, size: Size = (224, 224)):
        self.net, self.size = net, size
        self.checksum = cache.checksum(["efficientnet_lite0-57934424", str(size)])

    @property
    def distance_name(self) -> str:
        height, width = self.size
        at = "" if self.size == (224, 224) else f" at {height}x{width}"
        return f"Fréchet distance (EfficientNet-Lite0{at})"

    def __call__(self, image: UInt8[Array, "B H W 3"]) -> Float[Array, "B D"]:
        return self.net.features(_resized(image, self.size, averaged=True)).astype(jnp.float32)

    def probabilities(self, image: UInt8[Array, "B H W 3"]) -> None:
        """None: ImageNet's classes are not those of the set."""


class InceptionFeatures(nnx.Module):
    """2,048 features of Inception with FID's weights, of pictures from -1 to 1 that are resized to 299x299.

    As in pytorch-fid the resizing is bilinear without averaging, also for pictures that shrink. Heusel et al. 2017
    compare 50,000 drawn pictures with all of the training set; whoever gives a number says both.
    """

    name: ClassVar[str] = "inception"
    distance_name: ClassVar[str] = "FID"

    def __init__(self, net: Inception, checksum: str):
        self.net, self.checksum = net, checksum

    def __call__(self, image: UInt8[Array, "B H W 3"]) -> Float[Array, "B D"]:
        return self.net(_resized(image, (299, 299), averaged=False) / 127.5 - 1)

    def probabilities(self, image: UInt8[Array, "B H W 3"]) -> None:
        """None: its classes are not those of the set."""


def efficientnet_lite0(size: Size = (224, 224)) -> EfficientNetFeatures:
    """Raises UserError where the extra `pretrained` is not installed."""
    if min(size) < 32:
        raise UserError(f"pictures of {size[0]}x{size[1]} are too small for EfficientNet-Lite0: 32x32 at least")
    return EfficientNetFeatures(views.still(pretrained(top=True)), size)


def inception(path: str) -> InceptionFeatures:
    """With the weights of a file: .pth, .npz or .safetensors with pytorch-fid's names. Raises UserError."""
    if not path:
        raise UserError(
            "inception needs its weights by path: pt_inception-2015-12-05-6726825d.pth of pytorch-fid, or the same "
            "tensors as .npz or .safetensors; nothing is downloaded"
        )
    file = Path(path).expanduser()
    tensors = read_tensors(file)
    return InceptionFeatures(views.still(filled(tensors, file)), cache.of_arrays(tensors))


def _resized(image: UInt8[Array, "B H W 3"], size: Size, *, averaged: bool) -> Float[Array, "B h w 3"]:
    ways: dict[str, Any] = dict(method="bilinear", antialias=averaged)
    return jax.image.resize(image.astype(jnp.float32), (len(image), *size, image.shape[3]), **ways)
