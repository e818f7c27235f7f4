"""Reconstruction: the picture itself is to be given back, through codes.

Letters: B examples, H W pixels, N counts.
"""

import dataclasses
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from dynjax.models.vqvae import VQVAE, Reconstruction
from dynjax.tasks.task import Batch, Loss, OnePlayer, Progress, Scores, Shown


@dataclasses.dataclass(frozen=True)
class ReconstructionTask(OnePlayer[VQVAE]):
    """The picture through a VQ-VAE (see `Task`): batches are {"image" (B, H, W, 3), "label" (B,)}.

    PSNR is 10 log10(1 / mean squared error) of pictures from 0 to 1, in dB. The codebook's perplexity is exp(entropy)
    of how often each code is used: as many codes, used alike, would have it.
    """

    commitment: float = 0.25

    score: ClassVar[str] = "psnr"
    score_name: ClassVar[str] = "PSNR"
    percent: ClassVar[bool] = False
    timed: ClassVar[tuple[int, ...]] = ()
    budget: ClassVar[None] = None

    def loss(self, model: VQVAE, batch: Batch, key: PRNGKeyArray, progress: Progress) -> Loss:
        """Squared error, codebook and commitment (van den Oord et al. 2017, eq. 3), and metrics.

        The squared error is that of a normal distribution of a tenth of the brightness' range: the losses weigh alike.
        """
        found = model(batch["image"])
        error = ((found.image - model.pixels(batch["image"])) ** 2).mean()
        loss = error / (2 * 0.1**2) + found.codebook + self.commitment * found.commitment
        psnr = -10 * jnp.log10(error)
        return loss, {"loss": loss, "psnr": psnr, "commitment": found.commitment, "macs_fraction": jnp.float32(1)}

    def infer(self, model: VQVAE, batch: Batch) -> Reconstruction:
        """The pictures once more."""
        return model(batch["image"])

    def counts(self, model: VQVAE, output: Reconstruction, batch: Batch) -> Float[Array, " N"]:
        """Squared error and numbers of the batch's pictures, and uses of every code; blank ones, with label -1, are not
        in them."""
        valid = (batch["label"] >= 0).astype(jnp.float32)
        error = ((output.image - model.pixels(batch["image"])) ** 2).sum((1, 2, 3))
        used = jax.nn.one_hot(output.codes, len(model.codebook)).sum((1, 2))
        sums = jnp.stack([error @ valid, valid.sum() * float(np.prod(model.shape))])
        return jnp.concatenate([sums, valid @ used])

    def scores(self, counts: np.ndarray) -> Scores:
        """`psnr`, `mse` and `perplexity` of the sum of the batches' counts; nan without an example."""
        error, numbers, *used = np.asarray(counts, np.float64)
        if not numbers:
            return {"psnr": np.nan, "mse": np.nan, "perplexity": np.nan}
        share = np.array(used)[np.array(used) > 0] / sum(used)
        mse = error / numbers
        perplexity = float(np.exp(-(share * np.log(share)).sum()))
        return {"psnr": float(-10 * np.log10(mse)), "mse": float(mse), "perplexity": perplexity}

    def show(self, folder: Path, shown: Shown) -> str:
        return ""
