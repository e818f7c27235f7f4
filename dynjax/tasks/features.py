"""Numbers that say what is in a picture, by which sets of pictures are compared (see `dynjax.tasks.distances`).

Distances are those of one extractor: `Extractor.distance_name` says which, and it is called FID only where the features
are those of Inception's published weights. Letters: B N examples, H W pixels, D features, K classes.
"""

from collections.abc import Iterable, Iterator
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8
from tqdm import tqdm

from dynjax.config import UserError
from dynjax.data.source import Source
from dynjax.tasks import cache
from dynjax.tasks.distances import Moments

Kind = Literal["classifier", "efficientnet_lite0", "inception"]
BATCH = 128
"""Pictures at a time."""


@runtime_checkable
class Extractor(Protocol):
    """A frozen network; an `nnx.Module`, so that it may be an argument of `nnx.jit`."""

    @property
    def name(self) -> str: ...
    @property
    def distance_name(self) -> str:
        """What a Fréchet distance of its features is called."""

    @property
    def checksum(self) -> str:
        """Of its weights and of how it looks at pictures."""

    def __call__(self, image: UInt8[Array, "B H W 3"]) -> Float[Array, "B D"]:
        """Features, also under `jax.jit`."""

    def probabilities(self, image: UInt8[Array, "B H W 3"]) -> Float[Array, "B K"] | None:
        """Of the classes of its source; None where it knows others, or none."""


def make_extractor(kind: Kind, source: Source, path: str = "") -> Extractor:
    """The extractor of a name. `source` is the train split that the classifier is trained on, `path` the file of
    Inception's weights. Raises UserError."""
    if path and kind != "inception":
        raise UserError(f"{path}: weights are read for inception only, not for {kind}")
    # Each is imported when it is wanted.
    if kind == "classifier":
        from dynjax.tasks.classifier import classifier

        return classifier(source)
    if kind in ("efficientnet_lite0", "inception"):
        from dynjax.tasks import pretrained

        return pretrained.efficientnet_lite0() if kind == "efficientnet_lite0" else pretrained.inception(path)
    raise UserError(f"features {kind!r} are not known: there are classifier, efficientnet_lite0, inception")


def pictures(source: Source, batch_size: int = BATCH) -> Iterator[UInt8[np.ndarray, "B H W 3"]]:
    """All pictures of a source, in its order; the last batch may be short."""
    for start in range(0, len(source), batch_size):
        stop = min(start + batch_size, len(source))
        yield np.stack([source[index]["image"] for index in range(start, stop)])


def features_of(
    extractor: Extractor, batches: Iterable[UInt8[np.ndarray, "B H W 3"] | UInt8[Array, "B H W 3"]]
) -> Float[np.ndarray, "N D"]:
    """Features of all pictures. Raises UserError where there is none."""
    found = list(_in_batches(extractor, batches))
    if not found:
        raise UserError("features of no pictures")
    return np.concatenate(found)


def reference(extractor: Extractor, source: Source) -> Moments:
    """Moments of the features of all pictures of a source, which are kept in the cache. Raises UserError for a source
    without any."""
    if not len(source):
        raise UserError(f"{source.describe()}: there is no picture to compare with")

    def make() -> cache.Arrays:
        count = -(-len(source) // BATCH)
        batches = tqdm(pictures(source), f"{extractor.name} features of {source.name}", count, leave=False)
        parts = [Moments.of(part) for part in _in_batches(extractor, batches)]
        whole = sum(parts[1:], parts[0])
        return {"count": np.asarray(whole.count), "mean": whole.mean, "covariance": whole.covariance}

    name = cache.checksum(["reference 1", extractor.name, extractor.checksum, digest(source)])
    found = cache.cached(name, make)
    return Moments(int(found["count"]), found["mean"], found["covariance"])


def digest(source: Source, *roles: str) -> str:
    """Checksum of a source's pictures, and of the other fields named, one after the other."""
    keys = ("image", *roles)
    return cache.checksum(part for index in range(len(source)) for part in _fields(source[index], keys))


def _fields(example: dict[str, np.ndarray], keys: tuple[str, ...]) -> list[np.ndarray]:
    return [np.asarray(example[key]) for key in keys]


def _in_batches(extractor: Extractor, batches: Iterable) -> Iterator[Float[np.ndarray, "B D"]]:
    """Features of each batch; shorter ones than the first are filled up, for one program for all."""
    run = nnx.jit(_call)
    size = 0
    for batch in batches:
        count, size = len(batch), size or len(batch)
        if count < size:
            batch = np.concatenate([batch, np.zeros((size - count, *batch.shape[1:]), np.uint8)])
        yield np.asarray(run(extractor, jnp.asarray(batch)))[:count]


def _call(extractor: Extractor, image: jax.Array) -> jax.Array:
    return extractor(image)
