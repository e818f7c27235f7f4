"""VQ-VAE: a picture as a small grid of codes (van den Oord et al. 2017, arXiv:1711.00937).

Letters: B examples, H W pixels, h w places of the grid, D numbers of a vector, V vectors of the codebook.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from dynjax.core.gates import straight_through
from dynjax.models import rules
from dynjax.models.blocks import as_bytes, gather_pixels, in_channels, spread_pixels
from dynjax.models.registry import Family, built_by, register
from dynjax.models.rules import WIDEST, Count, Halvings, Range, Rule, Width


@dataclasses.dataclass(frozen=True)
class VQVAEConfig:
    """An autoencoder whose picture in between is one of codes: names of vectors, fewer than there are pixels."""

    family: Literal["vqvae"] = "vqvae"
    shape: tuple[int, int, int] = (28, 28, 1)
    """Height, width and channels (1: grey, 3: colours) of the pictures."""
    halvings: Halvings = 2
    """The grid of codes has 1/2**halvings of the picture's rows and columns."""
    codes: Annotated[int, Range(2, WIDEST)] = 64
    """Vectors in the codebook."""
    code_features: Width = 8
    """Numbers of a vector."""
    features: Width = 32
    blocks: Count = 1
    """Residual blocks of the encoder, and of the decoder, at the grid's resolution."""
    commitment: float = 0.25
    """Weight of the loss that keeps the encoder near the vectors that it chose."""


def nearest(z: Float[Array, "B h w D"], codebook: Float[Array, "V D"]) -> Int[Array, "B h w"]:
    """The number of the vector that is nearest to each of `z` (eq. 1); the first of equals."""
    # |z|^2 is the same for all.
    distance = (codebook**2).sum(-1)[None, None, None] - 2 * z @ codebook.T
    return distance.argmin(-1).astype(jnp.int32)


def unit(x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
    """Vectors at length 1."""
    return x * jax.lax.rsqrt((x**2).sum(-1, keepdims=True) + 1e-6)


class Residual(nnx.Module):
    """A 3x3 and a 1x1 convolution around a shortcut."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(features, features, (3, 3), rngs=rngs)
        self.mix = nnx.Linear(features, features, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return x + self.mix(nnx.relu(self.conv(nnx.relu(x))))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """A picture given back, the codes in between, and the losses (means over all numbers)."""

    image: Float[Array, "B H W C"]
    """From 0 to 1, but for what the decoder is off."""
    codes: Int[Array, "B h w"]
    codebook: Float[Array, ""]
    """Squared distance of the chosen vectors from what the encoder gave: moves the vectors."""
    commitment: Float[Array, ""]
    """The same; moves the encoder."""


class VQVAE(nnx.Module):
    """Encoder, codebook, decoder; every resolution is left by taking 2x2 pixels as one.

    The codebook learns by its loss (eq. 3). Deviation: vectors, and what the encoder gives, have length 1 (Yu et al.
    2022, arXiv:2110.04627, section 3.2), so that all vectors come into use.
    """

    def __init__(self, config: VQVAEConfig, classes: int = 0, *, rngs: nnx.Rngs):
        (height, width, channels), f, d = config.shape, config.features, config.code_features
        step = 2**config.halvings
        self.shape, self.grid = config.shape, (height // step, width // step)
        self.enter = nnx.Conv(channels, f, (3, 3), rngs=rngs)
        self.down = nnx.List([nnx.Linear(4 * f, f, rngs=rngs) for _ in range(config.halvings)])
        self.encode_blocks = nnx.List([Residual(f, rngs=rngs) for _ in range(config.blocks)])
        self.to_code = nnx.Linear(f, d, rngs=rngs)
        self.codebook = nnx.Param(jax.random.normal(rngs.params(), (config.codes, d)))
        self.from_code = nnx.Conv(d, f, (3, 3), rngs=rngs)
        self.decode_blocks = nnx.List([Residual(f, rngs=rngs) for _ in range(config.blocks)])
        self.up = nnx.List([nnx.Linear(f, 4 * f, rngs=rngs) for _ in range(config.halvings)])
        self.leave = nnx.Conv(f, channels, (3, 3), rngs=rngs)

    def pixels(self, image: UInt8[Array, "B H W 3"]) -> Float[Array, "B H W C"]:
        """Bytes as numbers from 0 to 1; grey is the mean of the colours."""
        return in_channels(image.astype(self.enter.kernel.dtype) / 255, self.shape[2])

    def _vectors(self, x: Array) -> Array:
        x = self.enter(2 * x - 1)
        for down in self.down:
            x = down(gather_pixels(nnx.relu(x)))
        for block in self.encode_blocks:
            x = block(x)
        return unit(self.to_code(nnx.relu(x)))

    def _picture(self, z: Array) -> Array:
        x = self.from_code(z)
        for block in self.decode_blocks:
            x = block(x)
        for up in self.up:
            x = spread_pixels(up(nnx.relu(x)), 2)
        return self.leave(nnx.relu(x)) + 0.5

    def __call__(self, image: UInt8[Array, "B H W 3"]) -> Reconstruction:
        z, vectors = self._vectors(self.pixels(image)), unit(self.codebook[...])
        codes = nearest(z, vectors)
        # One-hot and not a gather, whose gradient is slow on CPUs.
        chosen = jax.nn.one_hot(codes, len(vectors), dtype=z.dtype) @ vectors
        stop = jax.lax.stop_gradient
        return Reconstruction(
            self._picture(straight_through(chosen, z)),
            codes,
            ((stop(z) - chosen) ** 2).mean(),
            ((z - stop(chosen)) ** 2).mean(),
        )

    def encode(self, image: UInt8[Array, "B H W 3"]) -> Int[Array, "B h w"]:
        """The codes of pictures."""
        return nearest(self._vectors(self.pixels(image)), unit(self.codebook[...]))

    def decode(self, codes: Int[Array, "B h w"]) -> UInt8[Array, "B H W 3"]:
        """Pictures of codes."""
        return as_bytes(self._picture(unit(self.codebook[...])[codes]))


def _rules(config: VQVAEConfig) -> Iterator[Rule]:
    yield from rules.picture(config.shape)
    (height, width, _), step = config.shape, 2**config.halvings
    whole = height % step == 0 and width % step == 0
    yield Rule("halvings", config.halvings, whole, f"such that {height}x{width} pixels can be halved so often")
    yield Rule("commitment", config.commitment, 0 <= config.commitment < math.inf, "0 or more")


FAMILY = register(
    Family(
        VQVAEConfig,
        built_by(VQVAE),
        task="reconstruction",
        tiny=dict(shape=(8, 8, 1), halvings=1, codes=4, code_features=2, features=4, blocks=0),
        rules=_rules,
    )
)
