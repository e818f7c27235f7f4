"""Likelihoods of pixels: a number of values for each pixel, drawn from fixed noise, so that same noise is same image.

Letters: B examples, H W pixels, C channels, V values of a channel, M components of a mixture, P parameters of a pixel.
"""

import dataclasses
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dynjax.core.gates import log_entropy
from dynjax.models.rules import Depth, Values
from dynjax.ops.sampling import Autoregressive

Noise = dict[str, Array]
"""Arrays whose first axes are those of the pixels."""


@dataclasses.dataclass(frozen=True)
class DrawnConfig:
    """What families that draw pictures have in common: the abstract base of their configurations."""

    shape: tuple[int, int, int] = (28, 28, 1)
    """Height, width and channels (1: grey, 3: colours) of the pictures."""
    values: Values = 2
    """Values of a channel: 2 is black and white, 256 are all bytes."""
    likelihood: Literal["categorical", "logistic"] = "categorical"
    """categorical: a softmax over all values, of one channel; logistic: a mixture of rounded logistic distributions."""
    components: Depth = 5
    """Of the mixture of logistics."""
    conditional: bool = False
    """Pictures can be asked for by their label."""


@dataclasses.dataclass(frozen=True)
class Categorical:
    """A softmax over all values of a pixel's one channel; two values are a binary image.

    Raises:
        ValueError: if there are fewer than two values.
    """

    values: int
    channels: int = 1

    def __post_init__(self) -> None:
        if self.values < 2:
            raise ValueError(f"values={self.values}: a pixel needs at least 2 values to choose from")
        if self.channels != 1:
            raise ValueError(f"channels={self.channels}: Categorical has one channel; use Logistic for colours")

    @property
    def parameters(self) -> int:
        """P, of a pixel."""
        return self.values

    def log_prob(self, params: Float[Array, "*pixels P"], x: Int[Array, "*pixels C"]) -> Float[Array, "*pixels"]:
        """Log-probability of each pixel, in nats."""
        log_p = jax.nn.log_softmax(params.astype(jnp.float32))
        return (log_p * jax.nn.one_hot(x[..., 0], self.values)).sum(-1)

    def noise(self, key: PRNGKeyArray, pixels: tuple[int, ...]) -> Noise:
        """What `draw` needs for so many pixels."""
        return {"value": jax.random.gumbel(key, (*pixels, self.values))}

    def draw(self, params: Float[Array, "*pixels P"], noise: Noise) -> Int[Array, "*pixels C"]:
        """The value whose logit and Gumbel noise have the largest sum."""
        return (params.astype(jnp.float32) + noise["value"]).argmax(-1).astype(jnp.int32)[..., None]

    def entropy(self, params: Float[Array, "*pixels P"]) -> Float[Array, "*pixels"]:
        """Of each pixel, in nats."""
        return jnp.exp(log_entropy(params.astype(jnp.float32)))


@dataclasses.dataclass(frozen=True)
class Logistic:
    """A mixture of logistic distributions over the V values of a channel, rounded (PixelCNN++, Salimans et al. 2017,
    arXiv:1701.05517, section 2.1 and eq. 3).

    The mean of a colour is a linear function of the colours before it in the pixel. The first and the last value take
    the tails. Values are 2 v / (V - 1) - 1, from -1 to 1. Deviation: any number of channels.
    """

    values: int = 256
    channels: int = 3
    components: int = 5

    @property
    def parameters(self) -> int:
        """P, of a pixel: logits of the components, and of each mean, log scale and coefficient."""
        c = self.channels
        return self.components * (1 + 2 * c + c * (c - 1) // 2)

    def _split(self, params: Array) -> tuple[Array, Array, Array, Array]:
        """Logits (..., M), means and log scales (..., C, M), coefficients (..., C (C - 1) / 2, M)."""
        c, m = self.channels, self.components
        params = params.astype(jnp.float32)
        logits, means, scales, mix = jnp.split(params, [m, m * (1 + c), m * (1 + 2 * c)], -1)
        each = [a.reshape(*a.shape[:-1], -1, m) for a in (means, scales, mix)]
        return logits, each[0], jnp.maximum(each[1], -7.0), jnp.tanh(each[2])

    def _mean(self, means: Array, mix: Array, before: Array, channel: int) -> Array:
        """Of one channel (..., M), where `before` (..., channel) are the values of the channels before it."""
        first = channel * (channel - 1) // 2
        mean = means[..., channel, :]
        for other in range(channel):
            mean = mean + mix[..., first + other, :] * before[..., other, None]
        return mean

    def log_prob(self, params: Float[Array, "*pixels P"], x: Int[Array, "*pixels C"]) -> Float[Array, "*pixels"]:
        """Log-probability of each pixel, all its channels together, in nats."""
        logits, means, log_scales, mix = self._split(params)
        scaled = 2 * x.astype(jnp.float32) / (self.values - 1) - 1
        half, total = 1 / (self.values - 1), jax.nn.log_softmax(logits)
        for channel in range(self.channels):
            centred = scaled[..., channel, None] - self._mean(means, mix, scaled, channel)
            inverse = jnp.exp(-log_scales[..., channel, :])
            above, below = inverse * (centred + half), inverse * (centred - half)
            # log(sigmoid(a) - sigmoid(b)) without the difference of two numbers near 1, or of two large ones: the width
            # of a value in scales, a - b, does not depend on the mean.
            log_width = np.log(2 * half) - log_scales[..., channel, :]
            width = jnp.exp(log_width)
            share = jnp.where(log_width < -7, log_width - width / 2, jnp.log(-jnp.expm1(-jnp.maximum(width, 1e-4))))
            inside = jax.nn.log_sigmoid(above) + jax.nn.log_sigmoid(-below) + share
            value = x[..., channel, None]
            total += jnp.where(
                value == 0,
                jax.nn.log_sigmoid(above),
                jnp.where(value == self.values - 1, jax.nn.log_sigmoid(-below), inside),
            )
        return jax.nn.logsumexp(total, -1)

    def entropy(self, params: Float[Array, "*pixels P"]) -> Float[Array, "*pixels"]:
        """Of each pixel, in nats, roughly: for each channel that of a logistic distribution of the mixture's variance,
        2 + log(scale) in units of a value, between 0 and log(V)."""
        logits, means, log_scales, _ = self._split(params)
        weight = jax.nn.softmax(logits)[..., None, :]
        mean = (weight * means).sum(-1, keepdims=True)
        variance = (weight * ((means - mean) ** 2 + jnp.exp(2 * log_scales) * np.pi**2 / 3)).sum(-1)
        log_scale = 0.5 * jnp.log(3 * variance / np.pi**2) + np.log((self.values - 1) / 2)
        return jnp.clip(2 + log_scale, 0, np.log(self.values)).sum(-1)

    def noise(self, key: PRNGKeyArray, pixels: tuple[int, ...]) -> Noise:
        """What `draw` needs for so many pixels."""
        first, second = jax.random.split(key)
        return {
            "component": jax.random.gumbel(first, (*pixels, self.components)),
            "value": jax.random.logistic(second, (*pixels, self.channels)),
        }

    def draw(self, params: Float[Array, "*pixels P"], noise: Noise) -> Int[Array, "*pixels C"]:
        """A component by its Gumbel noise, then channel after channel its mean and scaled logistic noise, rounded."""
        logits, means, log_scales, mix = self._split(params)
        chosen = jax.nn.one_hot((logits + noise["component"]).argmax(-1), self.components)
        drawn: list[Array] = []
        scaled: list[Array] = []
        for channel in range(self.channels):
            before = jnp.stack(scaled, -1) if scaled else jnp.zeros((*chosen.shape[:-1], 0))
            mean = (self._mean(means, mix, before, channel) * chosen).sum(-1)
            scale = jnp.exp((log_scales[..., channel, :] * chosen).sum(-1))
            value = jnp.round((mean + scale * noise["value"][..., channel] + 1) / 2 * (self.values - 1))
            drawn.append(jnp.clip(value, 0, self.values - 1).astype(jnp.int32))
            scaled.append(2 * drawn[-1].astype(jnp.float32) / (self.values - 1) - 1)
        return jnp.stack(drawn, -1)


Likelihood = Categorical | Logistic


@runtime_checkable
class OfIntegers(Autoregressive, Protocol):
    """A model whose likelihood says how probable integers are."""

    @property
    def likelihood(self) -> Likelihood: ...

    @property
    def classes(self) -> int: ...


@runtime_checkable
class Encodes(Protocol):
    """A model of codes of pictures, which samplers draw from its `prior`."""

    prior: OfIntegers

    def encode(self, image: Array, /) -> Array: ...

    def decode(self, x: Array, /) -> Array: ...


def make_likelihood(kind: str, values: int, channels: int, components: int = 5) -> Likelihood:
    """`kind` is "categorical" or "logistic". Raises ValueError for another one."""
    if kind == "categorical":
        return Categorical(values, channels)
    if kind == "logistic":
        return Logistic(values, channels, components)
    raise ValueError(f"likelihood={kind!r} must be 'categorical' or 'logistic'")


def quantise(image: Array, values: int, channels: int) -> Int[Array, "B H W C"]:
    """Bytes (B, H, W, 3) as integers below `values`, of all three colours or of their mean (`channels` 1).

    Two values are a threshold at half brightness, the same for every picture and always ("fixed binarisation").
    """
    x = image.astype(jnp.int32)
    x = x if channels == 3 else (x.sum(-1, keepdims=True) + 1) // 3
    return x * values // 256


def to_bytes(x: Int[Array, "B H W C"], values: int) -> Array:
    """Pictures (B, H, W, 3), uint8, of integers: 0 is black and the last value white."""
    grey = jnp.round(x.astype(jnp.float32) * (255 / (values - 1))).astype(jnp.uint8)
    return jnp.broadcast_to(grey, (*grey.shape[:-1], 3))
