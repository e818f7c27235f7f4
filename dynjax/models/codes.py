"""An autoregressive model of the codes of a trained VQ-VAE, whose weights stay as they are.

Letters: B examples, H W pixels, h w places of the grid of codes, V codes, P parameters of a code.
"""

import dataclasses
from typing import TypeVar

from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from dynjax.config import CodesConfig
from dynjax.models import pixelcnn, pixeltransformer, vqvae
from dynjax.models.likelihoods import Likelihood

Model = TypeVar("Model", bound=nnx.Module)


class Frozen(nnx.Variable):
    """What was a parameter and is not trained any more."""


def freeze(model: Model) -> Model:
    """`model` itself, its parameters being none any more."""
    for _, module in list(nnx.iter_modules(model)):
        for name, value in list(vars(module).items()):
            if isinstance(value, nnx.Param):
                setattr(module, name, Frozen(value[...]))
    return model


class Codes(nnx.Module):
    """Parameters of every code's distribution given those before it. Samplers draw codes from `prior`."""

    def __init__(self, prior: pixelcnn.PixelCNN | pixeltransformer.PixelTransformer, coder: vqvae.VQVAE):
        self.prior, self.coder = prior, coder

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the grid of codes: (h, w, 1)."""
        return self.prior.shape

    @property
    def classes(self) -> int:
        return self.prior.classes

    @property
    def likelihood(self) -> Likelihood:
        return self.prior.likelihood

    def __call__(self, x: Int[Array, "B h w 1"], label: Int[Array, " B"] | None = None) -> Float[Array, "B h w P"]:
        return self.prior(x, label) if self.classes else self.prior(x)

    def predictions(
        self, x: Int[Array, "B h w 1"], label: Int[Array, " B"] | None = None
    ) -> list[Float[Array, "B h w P"]]:
        """Those of `prior`, where it has several; else what it gives."""
        given = (x, label) if self.classes else (x,)
        return self.prior.predictions(*given) if hasattr(self.prior, "predictions") else [self.prior(*given)]

    def encode(self, image: UInt8[Array, "B H W 3"]) -> Int[Array, "B h w 1"]:
        """The codes of pictures."""
        return self.coder.encode(image)[..., None]

    def decode(self, x: Int[Array, "B h w 1"]) -> UInt8[Array, "B H W 3"]:
        """Pictures of codes."""
        return self.coder.decode(x[..., 0])


def build(config: CodesConfig, num_classes: int, *, rngs: nnx.Rngs, twin_params: nnx.State | None = None) -> Codes:
    """The model of `config`, with the weights of a trained VQ-VAE if these are given (`twin_params`)."""
    coder = vqvae.build(config.vqvae, num_classes, rngs=rngs, twin_params=twin_params)
    shape = (*coder.grid, 1)
    prior = dataclasses.replace(
        config.prior, shape=shape, values=config.vqvae.codes, likelihood="categorical", embed=True
    )
    family = {"pixelcnn": pixelcnn, "pixeltransformer": pixeltransformer}[prior.family]
    return Codes(family.build(prior, num_classes, rngs=rngs), freeze(coder))
