"""Variational autoencoders: a bound on the bits that a picture takes, per dimension.

Letters: B examples, H W pixels, G groups of latents.
"""

import dataclasses
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from dynjax.config import BudgetConfig
from dynjax.core import training
from dynjax.core.trace import traced
from dynjax.models.likelihoods import quantise, to_bytes
from dynjax.models.vae import VAE, Explained
from dynjax.show import film
from dynjax.tasks import generated, objective
from dynjax.tasks.generated import keys_of
from dynjax.tasks.task import Batch, Loss, OnePlayer, Progress, Scores, Shown

DRAWN, GIVEN_BACK = 64, 32
"""Pictures in drawn.png and in reconstructions.png."""


def integers(model: VAE, image: Array) -> Int[Array, "B H W C"]:
    """Pictures of bytes (B, H, W, 3) as the integers that the model has."""
    return quantise(image, model.likelihood.values, model.shape[2])


def nats(model: VAE, found: Explained, x: Int[Array, "B H W C"]) -> Float[Array, " B"]:
    """-log p(x|z) of each picture."""
    return -model.likelihood.log_prob(found.params, x).sum((1, 2))


def divergence(kl: Float[Array, "B G"], free_bits: float = 0.0) -> Float[Array, ""]:
    """The mean divergence of a batch in nats, where each group's own mean counts from so many bits on."""
    return jnp.maximum(kl.mean(0), free_bits * np.log(2)).sum()


@dataclasses.dataclass(frozen=True)
class VariationalTask(OnePlayer[VAE]):
    """The bound on a picture's bits (see `Task`): batches are {"image" (B, H, W, 3), "label" (B,)}.

    Bits per dimension are (-log2 p(x|z) + KL(q(z|x)|p(z))) / (H W C) of the integers that the model has, at one z from
    the posterior: an upper bound in the mean. Training weighs and bounds the divergence as it is told; scores do not.
    """

    beta: float = 1.0
    free_bits: float = 0.0
    budget: BudgetConfig | None = None

    score: ClassVar[str] = "bits_per_dim"
    score_name: ClassVar[str] = "bits/dim"
    percent: ClassVar[bool] = False
    timed: ClassVar[tuple[int, ...]] = ()
    """How long drawing takes is a matter of samplers."""

    def loss(self, model: VAE, batch: Batch, key: PRNGKeyArray, progress: Progress) -> Loss:
        """The bound as it is trained, in bits per dimension, and what compute costs beside it; and metrics."""
        aiming, drawing = jax.random.split(key)
        training.schedule(model, progress)
        target = objective.aim(model, self.budget, aiming)
        x = integers(model, batch["image"])
        noise = jax.vmap(model.noise)(jax.random.split(drawing, len(x))).latents
        found, trace = (model(x, noise), None) if self.budget is None else traced(model)(x, noise)
        bits = 1 / (np.log(2) * np.prod(model.shape))
        error, own = nats(model, found, x).mean(), divergence(found.kl)
        task_loss = bits * (error + self.beta * divergence(found.kl, self.free_bits))
        budget_loss, spent = objective.charge(model, self.budget, trace, target, progress)
        loss = task_loss + budget_loss
        told = {"loss": loss, "task_loss": task_loss, "budget_loss": budget_loss, **spent}
        told |= {"bits_per_dim": bits * (error + own), "kl_per_dim": bits * own}
        return loss, {name: jnp.asarray(value, jnp.float32) for name, value in told.items()}

    def prepare(self, model: VAE, batch: Batch) -> Batch:
        """The batch with "x", its pictures as integers, and "noise" for their latents, by what is on them."""
        noise = jax.vmap(lambda key: model.noise(key).latents)(keys_of(batch["image"]))
        return {**batch, "x": integers(model, batch["image"]), "noise": noise}

    def infer(self, model: VAE, batch: Batch) -> Explained:
        """Encoder and decoder: what the bound is made of."""
        return model(batch["x"], batch["noise"])

    def counts(self, model: VAE, output: Explained, batch: Batch) -> Float[Array, "3"]:
        """Bits of the pixels, bits of the latents, and dimensions; blank pictures, with label -1, are not in them."""
        valid = batch["label"] >= 0
        each = jnp.stack([nats(model, output, batch["x"]), output.kl.sum(1)]) / np.log(2)
        sums = jnp.where(valid, each, 0).sum(1)
        return jnp.append(sums, valid.sum() * float(np.prod(model.shape)))

    def scores(self, counts: np.ndarray) -> Scores:
        """`bits_per_dim`, and `kl_per_dim`, its part that the latents take; nan without an example."""
        pixels, latents, dimensions = np.asarray(counts, np.float64)
        whole = dimensions or np.nan
        return {"bits_per_dim": float((pixels + latents) / whole), "kl_per_dim": float(latents / whole)}

    def pictures(self, model: VAE, count: int = 64) -> UInt8[np.ndarray, "N H W 3"]:
        """The first pictures of seed 0."""
        return generated.pictures(model, count)

    def show(self, folder: Path, shown: Shown) -> str:
        """drawn.png, and reconstructions.png: each picture, and to its right what its latents say of it."""
        model = shown.model
        assert isinstance(model, VAE)
        noise = jax.vmap(model.noise)(jax.random.split(jax.random.key(0), DRAWN))
        images, trace = _draw(model, noise)
        values, scale = model.likelihood.values, max(2, 64 // model.shape[0])
        film.save_grid(folder / "drawn.png", np.asarray(to_bytes(images, values)), scale=scale)
        number = min(GIVEN_BACK, len(shown.source))
        batch, found, _ = shown.examine(np.linspace(0, len(shown.source) - 1, number).astype(int).tolist())
        given = integers(model, jnp.asarray(batch["image"]))
        pairs = jnp.stack([given, model.likeliest(jnp.asarray(found.params))], 1).reshape(-1, *model.shape)
        film.save_grid(folder / "reconstructions.png", np.asarray(to_bytes(pairs, values)), columns=8, scale=scale)
        bits, latents = shown.scores["bits_per_dim"], shown.scores["kl_per_dim"]
        whole, spent = float(np.prod(model.shape)) * np.log(2), float(trace.macs().mean()) / 1e6
        return (
            f"drawn.png reconstructions.png\n{bits:.4f} bits/dim of {values} values are {bits * whole:.2f} nats a "
            f"picture, {latents * whole:.2f} of them for latents; drawing took {spent:.2f} of "
            f"{trace.full_macs / 1e6:.2f} MMAC a picture"
        )


@nnx.jit
def _draw(model, noise):
    """Pictures, and what they cost."""
    return traced(lambda model, noise: model.generate(noise))(model, noise)
