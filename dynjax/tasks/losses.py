"""Losses of segmentation. Masks hold class numbers, and -1 where a pixel is ignored.

In float32 whatever the logits are, 0 where every pixel is ignored, and ValueError where the shapes disagree. Labels are
compared with the numbers of the classes, which XLA does while it sums: no array of the logits' size is made of labels.
A loss and its gradient take up to three times the memory of the logits in float32, several added up more.
Axis letters: B batch, H W pixels, C classes, N pixels of the batch.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Weights: TypeAlias = Sequence[float] | Float[Array, " C"]
"""One for each class: what a pixel counts whose label it is."""


def cross_entropy(
    logits: Float[Array, "B H W C"],
    mask: Int[Array, "B H W"],
    class_weights: Weights | None = None,
    smoothing: float = 0.0,
    pixel_weights: Float[Array, "B H W"] | None = None,
) -> Float[Array, ""]:
    """Mean over the pixels that count of -log softmax(logits)[label], weighted by class and by pixel.

    With `smoothing`, that share of the label is spread over all classes (Szegedy et al. 2016, arXiv:1512.00567,
    section 7), and the weight stays that of the label. With `pixel_weights` of `boundary_weights` it is that of U-Net
    (Ronneberger et al. 2015, equation 1).
    """
    check_shapes(logits, mask)
    shares = _log_softmax(logits)
    losses = -(1 - smoothing) * _at_label(shares, mask)
    if smoothing:
        losses -= smoothing * shares.mean(-1)
    return _mean(losses, mask, logits.shape[-1], class_weights, pixel_weights)


def focal(
    logits: Float[Array, "B H W C"],
    mask: Int[Array, "B H W"],
    class_weights: Weights | None = None,
    gamma: float = 2.0,
) -> Float[Array, ""]:
    """Mean over the pixels that count of -(1 - p)^gamma log p, p = softmax(logits)[label], weighted by class.

    Lin et al. 2017 (arXiv:1708.02002), equation 4; weights make it equation 5. They have a sigmoid for each class and
    divide by the number of anchors that hold something; here classes exclude each other and pixels are counted.
    `gamma` is 0 or at least 1: between them the gradient is infinite at p = 1.
    """
    # Not optax.sigmoid_focal_loss: its p is a sigmoid's, and it stacks several arrays of the logits' size.
    check_shapes(logits, mask)
    log_share = _at_label(_log_softmax(logits), mask)
    losses = -((-jnp.expm1(log_share)) ** gamma) * log_share
    return _mean(losses, mask, logits.shape[-1], class_weights)


def binary_cross_entropy(
    logits: Float[Array, "B H W C"], mask: Int[Array, "B H W"], class_weights: Weights | None = None
) -> Float[Array, ""]:
    """Mean over the pixels that count, weighted by class, and over classes of -log sigmoid(z), z the logit of the label
    and minus the logit of every other class: one against all.
    """
    # Not optax.sigmoid_binary_cross_entropy: it takes the logarithm of both sides and of labels as large as the logits.
    check_shapes(logits, mask)
    logits = logits.astype(jnp.float32)
    losses = -jax.nn.log_sigmoid(jnp.where(_is_label(logits, mask), logits, -logits)).mean(-1)
    return _mean(losses, mask, logits.shape[-1], class_weights)


def soft_dice(logits: Float[Array, "B H W C"], mask: Int[Array, "B H W"]) -> Float[Array, ""]:
    """1 - mean over the classes in the mask of 2 sum(p t) / (sum(p) + sum(t)), p = softmax(logits), t the one-hot mask.

    Milletari et al. 2016 (V-Net) square p and t in the denominator; this is the plain form, and the sums run over the
    whole batch, since rare classes are absent from most pictures.
    """
    # Not optax.dice_loss: it cannot leave pixels out, and a class absent from the mask counts in its mean.
    check_shapes(logits, mask)
    probability = jnp.where((mask >= 0)[..., None], jax.nn.softmax(logits.astype(jnp.float32)), 0.0)
    truth = _is_label(logits, mask)
    overlap, predicted = (x.sum((0, 1, 2)) for x in (jnp.where(truth, probability, 0.0), probability))
    present = truth.sum((0, 1, 2))
    dice = 2 * overlap / jnp.where(present > 0, predicted + present, 1.0)
    classes = (present > 0).sum()
    return jnp.where(present > 0, 1 - dice, 0.0).sum() / jnp.maximum(classes, 1)


def lovasz_softmax(logits: Float[Array, "B H W C"], mask: Int[Array, "B H W"]) -> Float[Array, ""]:
    """Mean over the classes in the mask of the Lovász extension of 1 - IoU, at the errors |t - p|, p = softmax(logits).

    Berman et al. 2018 (arXiv:1705.08790), over the whole batch and the classes in it. The extension is linear where the
    order of the errors stays: sum of errors times the weights of algorithm 1, which are constants to the gradient, as
    there. Every class in the mask takes a sort of all pixels, one class after the other.
    """
    check_shapes(logits, mask)
    classes, labels = logits.shape[-1], mask.reshape(-1)
    probability = jax.nn.softmax(logits.astype(jnp.float32)).reshape(-1, classes).T
    errors = jnp.where(jnp.arange(classes)[:, None] == labels[None], 1 - probability, probability)

    def weigh(given: tuple[Array, Array]) -> Array:
        number, errors = given
        own = labels == number
        return jax.lax.cond(
            own.any(), lambda: _jaccard_weights(errors, own, labels >= 0), lambda: jnp.zeros_like(errors)
        )

    weights = jax.lax.map(weigh, (jnp.arange(classes), jax.lax.stop_gradient(errors)))
    present = (jnp.arange(classes)[:, None] == labels[None]).any(1).sum()
    return (weights * errors).sum() / jnp.maximum(present, 1)


def tags(logits: Float[Array, "B H W C"], mask: Int[Array, "B H W"], sharpness: float = 5.0) -> Float[Array, ""]:
    """Mean over classes, and over the pictures that have a pixel that counts, of the binary cross-entropy of whether a
    picture has the class; of the mask no more is looked at.

    Its logit is log(mean(exp(r z))) / r over the pixels, between their mean and their largest: Pinheiro & Collobert
    2015 (arXiv:1411.6228), equation 2, with their r = 5. There a picture has one class, here any number.
    """
    check_shapes(logits, mask)
    pixels = mask.shape[1] * mask.shape[2]
    pooled = jax.nn.logsumexp(sharpness * logits.astype(jnp.float32), (1, 2), b=1 / pixels) / sharpness
    present, counts = _is_label(logits, mask).any((1, 2)), (mask >= 0).any((1, 2))
    each = -jax.nn.log_sigmoid(jnp.where(present, pooled, -pooled)).mean(-1)
    return jnp.where(counts, each, 0.0).sum() / jnp.maximum(counts.sum(), 1)


def check_shapes(logits: Any, mask: Any) -> None:
    """Raises ValueError."""
    if logits.ndim != 4 or logits.shape[:-1] != mask.shape:
        raise ValueError(f"logits {logits.shape} are not the mask's shape {mask.shape} and one axis of classes")


def _jaccard_weights(
    errors: Float[Array, " N"], own: Bool[Array, " N"], counts: Bool[Array, " N"]
) -> Float[Array, " N"]:
    """What each error weighs in the Lovász extension of 1 - IoU of a class, whose pixels are `own`: by how much 1 - IoU
    grows when the pixel is taken for wrong after all those of larger errors; 0 for pixels that do not count.

    Algorithm 1 subtracts neighbours of a sequence that grows to 1, which float32 does not resolve over a million
    pixels; the differences are written out here.
    """
    pixels = jnp.arange(len(errors), dtype=jnp.int32)
    # Pixels that do not count come last, where they change nothing of the others.
    _, order = jax.lax.sort((jnp.where(counts, -errors, 1.0), pixels), num_keys=1)
    own = own[order]
    whole = own.sum()
    intersection, union = whole - jnp.cumsum(own), (whole + jnp.cumsum(~own)).astype(jnp.float32)
    grows = jnp.where(own, 1 / union, intersection / (union * jnp.maximum(union - 1, 1)))
    return jnp.where(counts, jnp.zeros_like(errors).at[order].set(grows, unique_indices=True), 0.0)


def _log_softmax(logits: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    return jax.nn.log_softmax(logits.astype(jnp.float32))


def _is_label(logits: Float[Array, "B H W C"], mask: Int[Array, "B H W"]) -> Bool[Array, "B H W C"]:
    """The one-hot mask, to be used where it is made: XLA then makes none of it. -1 has no class."""
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, 3) == mask[..., None]


def _at_label(values: Float[Array, "B H W C"], mask: Int[Array, "B H W"]) -> Float[Array, "B H W"]:
    """The value of each pixel's label; 0 where it is ignored.

    A sum and not a gather, whose gradient is a slow scatter on CPUs.
    """
    return jnp.where(_is_label(values, mask), values, 0.0).sum(-1)


def _mean(
    losses: Float[Array, "B H W"],
    mask: Int[Array, "B H W"],
    classes: int,
    class_weights: Weights | None,
    pixel_weights: Float[Array, "B H W"] | None = None,
) -> Float[Array, ""]:
    """The weighted mean over the pixels that count."""
    weights = jnp.ones(mask.shape) if pixel_weights is None else pixel_weights
    if class_weights is not None:
        if len(class_weights) != classes:
            raise ValueError(f"{len(class_weights)} class weights, but the logits have {classes} classes")
        weights *= jnp.asarray(class_weights, jnp.float32)[jnp.maximum(mask, 0)]
    weights = jnp.where(mask >= 0, weights, 0.0)
    total = weights.sum()
    return (weights * losses).sum() / jnp.where(total > 0, total, 1.0)
