"""Autoregressive images: the bits that a picture takes, per dimension.

Letters: B examples, H W pixels.
"""

import dataclasses
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from dynjax.core import budget
from dynjax.core.training import Predicts
from dynjax.models.likelihoods import Encodes, OfIntegers, quantise
from dynjax.ops.doubt import PixelExits
from dynjax.tasks.task import Batch, Loss, OnePlayer, Progress, Scores, Shown


def integers(model: OfIntegers, image: Array) -> Array:
    """Pictures of bytes (B, H, W, 3) as the integers that the model has: values of pixels, or codes."""
    if isinstance(model, Encodes):
        return model.encode(image)
    return quantise(image, model.likelihood.values, model.shape[2])


def nats(model: OfIntegers, params: Float[Array, "B H W P"], x: Array) -> Float[Array, " B"]:
    """-log p of each picture x of integers, by what the model gives of it."""
    return -model.likelihood.log_prob(params, x).sum((1, 2))


DOUBT = (-8.0, 3.0)
"""Thresholds of exits that are trained for: logits of the entropy's share, from nearly all going on to few."""


def training_nats(model: OfIntegers, image: Array, label: Array, key: PRNGKeyArray) -> Float[Array, " B"]:
    """As `nats`, label -1 being no class; of a model that has several `predictions` of every pixel, their mean.

    Of a model with exits the mean of this and of `nats` under a threshold drawn from `key`: who comes later must have
    learnt to look at those who left early. The model is left with all going on.
    """
    x = integers(model, image)
    given = (x, label) if model.classes else (x,)
    if not isinstance(model, Predicts):
        return nats(model, model(*given), x)
    each = model.predictions(*given)
    first, *others = [nats(model, params, x) for params in each]
    mean = sum(others, first) / len(each)
    assert isinstance(model, nnx.Module)
    if not any(isinstance(op, PixelExits) for _, op in nnx.iter_modules(model)):
        return mean
    budget.set_threshold(model, jax.random.uniform(key, minval=DOUBT[0], maxval=DOUBT[1]))
    leaving = nats(model, model(*given), x)
    budget.set_threshold(model, jnp.float32(budget.LOWEST))
    return (mean + leaving) / 2


@dataclasses.dataclass(frozen=True)
class AutoregressiveTask(OnePlayer[OfIntegers]):
    """The bits of a picture (see `Task`): batches are {"image" (B, H, W, 3), "label" (B,)}.

    Bits per dimension are -log2 p(picture) / (H W C), of the integers that the model has: of black and white pictures
    they are not those of bytes.
    """

    score: ClassVar[str] = "bits_per_dim"
    score_name: ClassVar[str] = "bits/dim"
    percent: ClassVar[bool] = False
    timed: ClassVar[tuple[int, ...]] = ()
    """How long drawing takes is a matter of samplers."""
    budget: ClassVar[None] = None

    def loss(self, model: OfIntegers, batch: Batch, key: PRNGKeyArray, progress: Progress) -> Loss:
        """Bits per dimension, and metrics."""
        bits = training_nats(model, batch["image"], batch["label"], key).mean() / (np.log(2) * np.prod(model.shape))
        return bits, {"loss": bits, "bits_per_dim": bits, "macs_fraction": jnp.float32(1)}

    def prepare(self, model: OfIntegers, batch: Batch) -> Batch:
        """The batch with "x", its pictures as integers. Where an encoder makes them, that is no work of the model's."""
        return {**batch, "x": integers(model, batch["image"])}

    def infer(self, model: OfIntegers, batch: Batch) -> Float[Array, "B H W P"]:
        """Parameters of every pixel's distribution."""
        return model(batch["x"], batch["label"]) if model.classes else model(batch["x"])

    def counts(self, model: OfIntegers, output: Array, batch: Batch) -> Float[Array, "2"]:
        """Bits and dimensions of the batch's pictures; blank ones, with label -1, are not in them."""
        valid = batch["label"] >= 0
        each = jnp.where(valid, nats(model, output, batch["x"]), 0)
        return jnp.stack([each.sum() / np.log(2), valid.sum() * float(np.prod(model.shape))])

    def scores(self, counts: np.ndarray) -> Scores:
        """`bits_per_dim` of the sum of the batches' counts; nan without an example."""
        bits, dimensions = np.asarray(counts, np.float64)
        return {"bits_per_dim": float(bits / dimensions) if dimensions else np.nan}

    def show(self, folder: Path, shown: Shown) -> str:
        """No picture: `experiments.sample` draws them. The same in nats, and of how many values they are."""
        model, bits = shown.model, shown.scores["bits_per_dim"]
        assert isinstance(model, OfIntegers)
        whole = bits * float(np.prod(model.shape)) * np.log(2)
        return f"{bits:.4f} bits/dim of {model.likelihood.values} values are {whole:.2f} nats a picture"
