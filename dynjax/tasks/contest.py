"""What a generator and a discriminator play for: losses of scores, penalties of gradients, augmentation of both.

Letters: B examples, H W pixels, C channels.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

Contest = Literal["relativistic", "non_saturating", "hinge", "wasserstein"]
Score = Callable[[Float[Array, "B H W C"]], Float[Array, " B"]]
Scores = Float[Array, " B"]


class Losses(NamedTuple):
    """Both losses of scores of real and of drawn pictures, means over the batch."""

    discriminator: Callable[[Scores, Scores], Float[Array, ""]]
    generator: Callable[[Scores, Scores], Float[Array, ""]]


soft, hard = jax.nn.softplus, jax.nn.relu
CONTESTS: dict[str, Losses] = {
    # Relativistic pairing (Jolicoeur-Martineau 2018, arXiv:1807.00734; R3GAN, Huang et al. 2024, arXiv:2501.05441,
    # eq. 2): a drawn picture is to look more real than the real one beside it.
    "relativistic": Losses(lambda r, f: soft(f - r).mean(), lambda r, f: soft(r - f).mean()),
    # Goodfellow et al. 2014, arXiv:1406.2661, section 3.
    "non_saturating": Losses(lambda r, f: soft(-r).mean() + soft(f).mean(), lambda r, f: soft(-f).mean()),
    # Lim & Ye 2017, arXiv:1705.02894.
    "hinge": Losses(lambda r, f: hard(1 - r).mean() + hard(1 + f).mean(), lambda r, f: -f.mean()),
    # Arjovsky et al. 2017, arXiv:1701.07875.
    "wasserstein": Losses(lambda r, f: f.mean() - r.mean(), lambda r, f: -f.mean()),
}


def squared_gradient(score: Score, image: Float[Array, "B H W C"]) -> Float[Array, " B"]:
    """Squared norm of the gradient of each picture's score to the picture; of scores that are each picture's own."""
    return (jax.grad(lambda x: score(x).sum())(image) ** 2).sum((1, 2, 3))


def penalty(
    contest: str, score: Score, real: Float[Array, "B H W C"], drawn: Float[Array, "B H W C"], key: PRNGKeyArray
) -> Float[Array, ""]:
    """What the discriminator pays for steepness, to be weighted.

    relativistic: (R1 + R2) / 2, means of the squared gradient on real and on drawn pictures (Mescheder et al. 2018,
    arXiv:1801.04406, eq. 9 and 10; R3GAN takes both); non_saturating and hinge: R1 / 2; wasserstein: the mean of
    (|gradient| - 1)² between pairs (WGAN-GP, Gulrajani et al. 2017, arXiv:1704.00028, eq. 3).
    """
    if contest == "wasserstein":
        share = jax.random.uniform(key, (len(real), 1, 1, 1), real.dtype)
        square = squared_gradient(score, share * real + (1 - share) * drawn)
        return ((jnp.sqrt(square + 1e-12) - 1) ** 2).mean()
    found = squared_gradient(score, real).mean()
    return (found + squared_gradient(score, drawn).mean()) / 2 if contest == "relativistic" else found / 2


def augmented(image: Float[Array, "B H W C"], strength: float, key: PRNGKeyArray) -> Float[Array, "B H W C"]:
    """Pictures from -1 to 1, shifted, with a square cut out and another brightness, differentiably: what both players'
    pictures go through on the way to the discriminator (DiffAugment, Zhao et al. 2020, arXiv:2006.10738, section 3.2).

    At `strength` 1 as theirs: shifts of up to an eighth of a side, a square of half a side, brightness by up to half of
    the range. Deviation: no contrast and saturation, which grey pictures do not have or digits do not need.
    """
    if not strength:
        return image
    size, keys = image.shape[1:3], jax.random.split(key, 5)
    for axis, (side, one) in enumerate(zip(size, keys, strict=False)):
        # A product with a shifted diagonal: a gather's gradient is slow on CPUs.
        most = round(strength * side / 8)
        shift = jax.random.randint(one, (len(image),), -most, most + 1)
        place = jnp.arange(side)
        move = (place[None, :, None] + shift[:, None, None] == place[None, None]).astype(image.dtype)
        image = jnp.einsum("bij,bjwc->biwc" if axis == 0 else "bij,bhjc->bhic", move, image + 1) - 1
    inside = jnp.ones((len(image), 1, 1, 1), bool)
    for axis, (side, one) in enumerate(zip(size, keys[2:], strict=False)):
        centre = jax.random.randint(one, (len(image), 1), 0, side)
        near = jnp.abs(jnp.arange(side)[None] - centre) < strength * side / 4
        inside = inside & (near[:, :, None, None] if axis == 0 else near[:, None, :, None])
    brightness = strength * (jax.random.uniform(keys[4], (len(image), 1, 1, 1), image.dtype) - 0.5)
    return jnp.where(inside, 0.0, image) + brightness
