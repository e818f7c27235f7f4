"""Autoregressive images: the bits that a picture takes, per dimension.

Letters: B examples, H W pixels.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from dynjax.core import budget
from dynjax.models.likelihoods import OfIntegers, Predicts, quantise

USES: frozenset[str] = frozenset()
"""Options of the loss that the task looks at, whatever the model."""


def integers(model: OfIntegers, image: Array) -> Array:
    """Pictures of bytes (B, H, W, 3) as the integers that the model has: values of pixels, or codes."""
    if hasattr(model, "encode"):
        return model.encode(image)
    return quantise(image, model.likelihood.values, model.shape[2])


def nats(model: OfIntegers, x: Array, label: Array) -> Float[Array, " B"]:
    """-log p of each picture x of integers that the model has; `label` -1 is no class."""
    params = model(x, label) if model.classes else model(x)
    return -model.likelihood.log_prob(params, x).sum((1, 2))


DOUBT = (-8.0, 3.0)
"""Thresholds of exits that are trained for: logits of the entropy's share, from nearly all going on to few."""


def training_nats(model: OfIntegers, image: Array, label: Array, key: PRNGKeyArray) -> Float[Array, " B"]:
    """As `nats`; of a model that has several `predictions` of every pixel, their mean.

    Of a model with exits the mean of this and of `nats` under a threshold drawn from `key`: who comes later must have
    learnt to look at those who left early. The model is left with all going on.
    """
    x = integers(model, image)
    if not isinstance(model, Predicts):
        return nats(model, x, label)
    each = model.predictions(x, label) if model.classes else model.predictions(x)
    first, *others = [-model.likelihood.log_prob(params, x).sum((1, 2)) for params in each]
    mean = sum(others, first) / len(each)
    if getattr(getattr(model, "prior", model), "exits", None) is None:
        return mean
    assert isinstance(model, nnx.Module)
    budget.set_threshold(model, jax.random.uniform(key, minval=DOUBT[0], maxval=DOUBT[1]))
    leaving = nats(model, x, label)
    budget.set_threshold(model, jnp.float32(budget.LOWEST))
    return (mean + leaving) / 2


@dataclasses.dataclass(frozen=True)
class AutoregressiveTask:
    """What a training loop needs of a model of pixels: `loss`, `prepare`, `infer`, `counts` and `scores`.

    Bits per dimension are -log2 p(picture) / (H W C), of the integers that the model has: of black and white pictures
    they are not those of bytes.
    """

    target: ClassVar[str] = "label"
    score: ClassVar[str] = "bits_per_dim"
    score_name: ClassVar[str] = "bits/dim"
    budget: ClassVar[None] = None

    def loss(
        self, model: OfIntegers, batch: dict[str, Any], key: PRNGKeyArray, progress: Float[Array, ""] | float
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Bits per dimension of a batch {"image" (B, H, W, 3), "label" (B,)}, and metrics."""
        bits = training_nats(model, batch["image"], batch["label"], key).mean() / (np.log(2) * np.prod(model.shape))
        return bits, {"loss": bits, "bits_per_dim": bits, "macs_fraction": jnp.float32(1)}

    def prepare(self, model: OfIntegers, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with "x", its pictures as integers. Where an encoder makes them, that is no work of the model's."""
        return batch | {"x": integers(model, batch["image"])}

    def infer(self, model: OfIntegers, batch: dict[str, Any]) -> Float[Array, "B H W P"]:
        """Parameters of every pixel's distribution."""
        return model(batch["x"], batch["label"]) if model.classes else model(batch["x"])

    def counts(self, model: OfIntegers, output: Array, batch: dict[str, Any]) -> Float[Array, "2"]:
        """Bits and dimensions of the batch's pictures; blank ones, with label -1, are not in them."""
        valid = batch["label"] >= 0
        nats = -model.likelihood.log_prob(output, batch["x"]).sum((1, 2))
        return jnp.stack([jnp.where(valid, nats, 0).sum() / np.log(2), valid.sum() * float(np.prod(model.shape))])

    def scores(self, counts: np.ndarray) -> dict[str, Any]:
        """`bits_per_dim` of the sum of the batches' counts; nan without an example."""
        bits, dimensions = np.asarray(counts, np.float64)
        return {"bits_per_dim": float(bits / dimensions) if dimensions else np.nan}
