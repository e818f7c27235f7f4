"""An autoregressive model of the codes of a trained VQ-VAE, whose weights stay as they are.

Letters: B examples, H W pixels, h w places of the grid of codes, V codes, P parameters of a code.
"""

import dataclasses
from collections.abc import Iterator
from typing import Generic, Literal, TypeVar

from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from dynjax.config import ModelConfig
from dynjax.core.training import Predicts
from dynjax.models import registry, rules
from dynjax.models.frozen import freeze
from dynjax.models.likelihoods import Likelihood, OfIntegers
from dynjax.models.registry import Family, register
from dynjax.models.rules import Rule
from dynjax.models.vqvae import VQVAE, VQVAEConfig

Prior = TypeVar("Prior", bound=ModelConfig)


@dataclasses.dataclass(frozen=True)
class CodesConfig(Generic[Prior]):
    """An autoregressive model of a trained VQ-VAE's codes; shape and values of `prior` are those of the codes."""

    vqvae: VQVAEConfig
    """Must be that of the workdir in --init-from."""
    prior: Prior
    family: Literal["codes"] = "codes"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the pictures."""
        return self.vqvae.shape


class Codes(nnx.Module):
    """Parameters of every code's distribution given those before it. Samplers draw codes from `prior`."""

    def __init__(self, prior: OfIntegers, coder: VQVAE):
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
        return self.prior.predictions(*given) if isinstance(self.prior, Predicts) else [self.prior(*given)]

    def encode(self, image: UInt8[Array, "B H W 3"]) -> Int[Array, "B h w 1"]:
        """The codes of pictures."""
        return self.coder.encode(image)[..., None]

    def decode(self, x: Int[Array, "B h w 1"]) -> UInt8[Array, "B H W 3"]:
        """Pictures of codes."""
        return self.coder.decode(x[..., 0])


def build(config: CodesConfig, num_classes: int, *, rngs: nnx.Rngs, twin_params: nnx.State | None = None) -> Codes:
    """The model of `config`, with the weights of a trained VQ-VAE if these are given (`twin_params`)."""
    coder = registry.filled(VQVAE(config.vqvae, rngs=rngs), twin_params)
    prior = registry.family_of(config.prior).build(_prior(config), num_classes, rngs=rngs)
    assert isinstance(prior, OfIntegers)
    return Codes(prior, freeze(coder))


def _prior(config: CodesConfig[Prior]) -> Prior:
    """The prior with what it takes from the codes."""
    (height, width, _), step = config.vqvae.shape, 2**config.vqvae.halvings
    fixed = dict(shape=(height // step, width // step, 1), values=config.vqvae.codes)
    return dataclasses.replace(config.prior, **fixed, likelihood="categorical", embed=True)


def _rules(config: CodesConfig) -> Iterator[Rule]:
    yield from rules.within("vqvae", registry.rules_of(config.vqvae))
    draws = "embed" in config.prior.__dataclass_fields__
    yield Rule("prior.family", config.prior.family, draws, "a family that draws codes (with an option embed)")
    # Any number of codes goes, and not only as many as a byte has values.
    yield from rules.within("prior", registry.rules_of(dataclasses.replace(_prior(config), values=2)))


FAMILY = register(
    Family(
        CodesConfig,
        build,
        task="autoregressive",
        tiny=lambda config: dict(vqvae=registry.tiny(config.vqvae), prior=registry.tiny(config.prior)),
        rules=_rules,
        dynamics=lambda config: registry.dynamics_of(config.prior),
        twin=lambda config: dataclasses.replace(config, prior=registry.static_twin(config.prior)),
        base=lambda config: config.vqvae,
    )
)
