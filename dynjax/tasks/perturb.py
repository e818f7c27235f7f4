"""Strong changes of pictures, on the device: colours, grey, blur, and boxes of other pictures of the batch.

Those of UniMatch (Yang et al. 2023, arXiv:2208.09910), as its code draws them. Deviations: the hue stays, the blur is
in proportion to the picture, and boxes come from the next picture of the batch. A key decides of everything.
Letters: B examples, H W pixels.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

Pictures = Float[Array, "B H W 3"]
"""From 0 to 255."""

JITTERED, GREYED, BLURRED, CUT = 0.8, 0.2, 0.5, 0.5
"""Share of the pictures that a change happens to."""
JITTER = 0.5
"""Largest relative change of brightness, contrast and saturation."""
BLUR = 2 / 321
"""Largest standard deviation of the blur, of the shorter side: 2 pixels of crops of 321."""
AREA, RATIO = (0.02, 0.4), (0.3, 1 / 0.3)
"""Least and largest share of the picture that a box has, and of its sides' ratio."""
LUMA = (0.299, 0.587, 0.114)


def strong(
    image: UInt8[Array, "B H W 3"], labels: Int[Array, "B H W"], key: PRNGKeyArray
) -> tuple[UInt8[Array, "B H W 3"], Int[Array, "B H W"]]:
    """Pictures after all of it, and labels with the same boxes of others."""
    keys = jax.random.split(key, 4)
    changed = blurred(greyed(jittered(image.astype(jnp.float32), keys[0]), keys[1]), keys[2])
    inside = boxes(keys[3], *labels.shape)
    return mixed(jnp.round(changed).astype(jnp.uint8), inside), mixed(labels, inside)


def jittered(image: Pictures, key: PRNGKeyArray) -> Pictures:
    """Brightness, contrast and saturation, one after the other, each times a factor around 1."""
    which, how = jax.random.split(key)
    factors = jax.random.uniform(how, (3, len(image), 1, 1, 1), minval=1 - JITTER, maxval=1 + JITTER)
    factors = jnp.where(_some(which, len(image), JITTERED)[None], factors, 1.0)
    image = _clip(image * factors[0])
    mean = _grey(image).mean((1, 2), keepdims=True)
    image = _clip(mean + (image - mean) * factors[1])
    grey = _grey(image)
    return _clip(grey + (image - grey) * factors[2])


def greyed(image: Pictures, key: PRNGKeyArray) -> Pictures:
    """Some of the pictures without colours."""
    return jnp.where(_some(key, len(image), GREYED), _grey(image), image)


def blurred(image: Pictures, key: PRNGKeyArray) -> Pictures:
    """Some of the pictures under a Gaussian, whose weights add up to 1 at the picture's border too."""
    which, how = jax.random.split(key)
    largest = BLUR * min(image.shape[1:3])
    deviation = jax.random.uniform(how, (len(image), 1, 1), minval=0.05 * largest, maxval=largest)
    some = _some(which, len(image), BLURRED)[..., 0]
    for axis, equation in ((1, "bij,bjwc->biwc"), (2, "bij,bhjc->bhic")):
        # A product with a matrix of weights: it stays with each picture, however far its own Gaussian reaches.
        places = jnp.arange(image.shape[axis], dtype=jnp.float32)
        steps = (places[:, None] - places[None])[None]
        weights = jnp.where(some, jnp.exp(-0.5 * (steps / deviation) ** 2), steps == 0)
        image = jnp.einsum(equation, weights / weights.sum(2, keepdims=True), image)
    return _clip(image)


def boxes(key: PRNGKeyArray, count: int, height: int, width: int) -> Bool[Array, "B H W"]:
    """Which pixels lie in a picture's box; some pictures have none."""
    keys = jax.random.split(key, 4)
    area = jax.random.uniform(keys[0], (count,), minval=AREA[0], maxval=AREA[1])
    ratio = jax.random.uniform(keys[1], (count,), minval=RATIO[0], maxval=RATIO[1])
    shares = jnp.minimum(jnp.stack([jnp.sqrt(area * ratio), jnp.sqrt(area / ratio)]), 1.0)
    starts = jax.random.uniform(keys[2], (2, count)) * (1 - shares)
    inside = []
    for side, start, share in zip((height, width), starts[..., None], shares[..., None], strict=True):
        place = ((jnp.arange(side) + 0.5) / side)[None]
        inside.append((place >= start) & (place < start + share))
    rows, columns = inside
    return rows[:, :, None] & columns[:, None] & _some(keys[3], count, CUT)[..., 0]


def mixed(array: Any, inside: Bool[Array, "B H W"]) -> Any:
    """Pictures or labels (B, H, W, ...) that have, inside the boxes, what the next one of the batch has there."""
    inside = inside.reshape(*inside.shape, *(1 for _ in array.shape[3:]))
    return jnp.where(inside, jnp.roll(array, -1, 0), array)


def _some(key: PRNGKeyArray, count: int, share: float) -> Bool[Array, "B 1 1 1"]:
    return jax.random.uniform(key, (count, 1, 1, 1)) < share


def _grey(image: Pictures) -> Float[Array, "B H W 1"]:
    return (image * jnp.asarray(LUMA)[None, None, None]).sum(-1, keepdims=True)


def _clip(image: Pictures) -> Pictures:
    return jnp.clip(image, 0.0, 255.0)
