"""Features by a small classifier of the set itself, trained once and kept.

Letters: B examples, H W pixels, D features, K classes.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, UInt8
from tqdm import tqdm

from dynjax.config import UserError
from dynjax.core import views
from dynjax.core.modules import name as path_name
from dynjax.data.source import Size, Source, size_of
from dynjax.models.blocks import pixels
from dynjax.models.resnet import ResNet
from dynjax.tasks import cache
from dynjax.tasks.features import digest

RECIPE = "classifier 1"
"""Another one where anything below changes what comes of it: kept weights are of one recipe."""
WIDTHS, BLOCKS = (16, 32, 64), (0, 1, 1)
LARGEST = 32
"""Pixels of a side; larger pictures are shrunk to it."""
STEPS, PASSES, BATCH, RATE = 500, 16, 64, 5e-3
"""So many steps, but of a small set no more than so many passes."""


class Classifier(nnx.Module):
    """The mean over the last map of a ResNet of three stages: 64 features.

    It looks at pictures of one size, to which others are resized bilinearly, averaged where they shrink.
    """

    name: ClassVar[str] = "classifier"
    distance_name: ClassVar[str] = "Fréchet distance (classifier)"

    def __init__(self, net: ResNet, size: Size, checksum: str):
        self.net, self.size, self.checksum = net, size, checksum

    def __call__(self, image: UInt8[Array, "B H W 3"]) -> Float[Array, "B D"]:
        x = pixels(_resized(image, self.size), jnp.float32)
        for stage in self.net.stages:
            x = stage(x)
        return x.mean((1, 2))

    def probabilities(self, image: UInt8[Array, "B H W 3"]) -> Float[Array, "B K"]:
        """Of the classes of the source that it was trained on."""
        return jax.nn.softmax(self.net.head.linear(self(image)))


def classifier(source: Source) -> Classifier:
    """Trained on a train split with labels, or read from the cache. Raises UserError for a source without labels."""
    if not {"image", "label"} <= source.spec.keys():
        raise UserError(
            f"data.name={source.name} has {', '.join(source.spec)}: a classifier is trained on pictures with labels"
        )
    classes = len(source.classes)
    if not len(source) or classes < 2:
        raise UserError(f"{source.describe()}: a classifier is trained on pictures of two classes at least")
    height, width = (min(side, LARGEST) for side in size_of(source))
    stride = 1 if max(height, width) < 20 else 2
    net = nnx.jit(lambda: ResNet(classes, WIDTHS, BLOCKS, stride, rngs=nnx.Rngs(0)))()
    name = cache.checksum([RECIPE, str((height, width, classes)), digest(source, "label")])

    def make() -> cache.Arrays:
        _train(net, source, (height, width))
        return {path_name(path): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(net))}

    _fill(net, cache.cached(name, make))
    return Classifier(views.still(net), (height, width), name)


def _fill(net: ResNet, arrays: cache.Arrays) -> None:
    for path, leaf in nnx.to_flat_state(nnx.state(net)):
        leaf[...] = jnp.asarray(arrays[path_name(path)])


def _train(net: ResNet, source: Source, size: Size) -> None:
    """Adam with a rate that falls by a cosine, on batches drawn with a fixed seed."""
    net = views.training(net)  # the same variables
    steps = min(STEPS, -(-PASSES * len(source) // BATCH))
    optimizer = nnx.Optimizer(net, optax.adam(optax.cosine_decay_schedule(RATE, steps)), wrt=nnx.Param)

    @nnx.jit
    def step(net: ResNet, optimizer: nnx.Optimizer, image: jax.Array, label: jax.Array) -> None:
        def loss(net: ResNet) -> jax.Array:
            logits = net(_resized(image, size))
            # One-hot and not a gather, whose gradient is slow on CPUs.
            return optax.softmax_cross_entropy(logits, jax.nn.one_hot(label, logits.shape[1])).mean()

        optimizer.update(net, nnx.grad(loss)(net))

    rng = np.random.default_rng(0)
    order = np.concatenate([rng.permutation(len(source)) for _ in range(-(-steps * BATCH // len(source)))])
    batches = order[: steps * BATCH].reshape(steps, BATCH)
    for batch in tqdm(batches, f"classifier of {source.name}, for distances", leave=False):
        examples = [source[int(index)] for index in batch]
        image = jnp.asarray(np.stack([example["image"] for example in examples]))
        step(net, optimizer, image, jnp.asarray([int(example["label"]) for example in examples]))


def _resized(image: UInt8[Array, "B H W 3"], size: Size) -> UInt8[Array, "B h w 3"]:
    if image.shape[1:3] == size:
        return image
    shape = (len(image), *size, image.shape[3])
    return jnp.round(jax.image.resize(image.astype(jnp.float32), shape, "bilinear")).clip(0, 255).astype(jnp.uint8)
