"""Segmentation: losses, metrics and the task that a training loop runs.

Masks hold class numbers, and -1 where a pixel is ignored.
Axis letters: B batch, H W pixels, C classes.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Num

from dynjax.config import BudgetConfig, LossConfig
from dynjax.data.source import Source, read
from dynjax.show import report
from dynjax.tasks.objective import Supervised
from dynjax.tasks.task import Batch, Scores, Shown

LARGEST_CLASS_WEIGHT = 10.0
"""A class's weight stops here, in units of the average pixel's, so that a few pixels do not rule a step's gradient."""

POWERS = {"sqrt": -0.5, "inverse": -1.0}
"""Of a class's frequency: its weight, but for the scale and the cap."""


def cross_entropy(
    logits: Float[Array, "B H W C"],
    mask: Int[Array, "B H W"],
    class_weights: Sequence[float] | Float[Array, " C"] | None = None,
    smoothing: float = 0.0,
) -> Float[Array, ""]:
    """Mean over the pixels that count of -log softmax(logits)[label], weighted by class; 0 if none counts.

    With `smoothing`, that share of the label is spread over all classes (Szegedy et al. 2016, arXiv:1512.00567,
    section 7), and the weight stays that of the label. In float32 whatever the logits are. Raises ValueError where the
    shapes disagree.
    """
    _check_shapes(logits, mask)
    if class_weights is not None and len(class_weights) != logits.shape[-1]:
        raise ValueError(
            f"{len(class_weights)} class weights, but logits {logits.shape} have {logits.shape[-1]} classes"
        )
    # One-hot labels and not optax's integer ones: those are read by a gather, whose gradient is a slow scatter on CPUs,
    # and -1 would read the last class; here it is a row of zeros.
    truth = jax.nn.one_hot(mask, logits.shape[-1])
    losses = optax.softmax_cross_entropy(logits.astype(jnp.float32), optax.smooth_labels(truth, smoothing))
    weights = jnp.ones(mask.shape) if class_weights is None else truth @ jnp.asarray(class_weights, jnp.float32)
    weights = jnp.where(mask >= 0, weights, 0.0)
    total = weights.sum()
    return (weights * losses).sum() / jnp.where(total > 0, total, 1.0)


def soft_dice(logits: Float[Array, "B H W C"], mask: Int[Array, "B H W"]) -> Float[Array, ""]:
    """1 - mean over the classes in the mask of 2 sum(p t) / (sum(p) + sum(t)), p = softmax(logits), t the one-hot mask.

    Milletari et al. 2016 (V-Net) square p and t in the denominator; this is the plain form, and the sums run over the
    whole batch, since rare classes are absent from most pictures. 0 if every pixel is ignored. In float32; ValueError
    where the shapes disagree.
    """
    # Not optax.dice_loss: it cannot leave pixels out, and a class absent from the mask counts in its mean.
    _check_shapes(logits, mask)
    counts = (mask >= 0)[..., None]
    probability = jnp.where(counts, jax.nn.softmax(logits.astype(jnp.float32)), 0.0)
    truth = jax.nn.one_hot(mask, logits.shape[-1])  # -1 has no class: a row of zeros
    overlap, predicted, present = (x.sum((0, 1, 2)) for x in (probability * truth, probability, truth))
    dice = 2 * overlap / jnp.where(present > 0, predicted + present, 1.0)
    classes = (present > 0).sum()
    return jnp.where(present > 0, 1 - dice, 0.0).sum() / jnp.maximum(classes, 1)


def confusion_matrix(logits: Float[Array, "B H W C"], mask: Int[Array, "B H W"]) -> Int[Array, "C C"]:
    """Pixels of the class of each row that were given the class of each column, int32; ignored pixels are in none.

    Add the matrices of many batches up in int64 (`np.int64`): an int32 holds 2^31 pixels. ValueError where the shapes
    disagree.
    """
    _check_shapes(logits, mask)
    classes = logits.shape[-1]
    cell = jnp.where(mask >= 0, mask * classes + logits.argmax(-1), classes**2)  # one cell more for the ignored
    return jnp.zeros(classes**2 + 1, jnp.int32).at[cell.reshape(-1)].add(1)[:-1].reshape(classes, classes)


def scores(confusion: Num[np.ndarray, "C C"]) -> dict[str, Any]:
    """`miou`, `dice`, `pixel_accuracy` and the list `iou` (one a class) of a confusion matrix, rows truth.

    A class absent from both truth and prediction has IoU nan and is left out of the means; without a pixel, all are
    nan.
    """
    confusion = np.asarray(confusion, np.float64)
    hits, both = np.diag(confusion), confusion.sum(0) + confusion.sum(1)
    seen = both > 0
    iou = np.full(len(confusion), np.nan)
    iou[seen] = hits[seen] / (both - hits)[seen]
    pixels = confusion.sum()
    return {
        "miou": float(iou[seen].mean()) if pixels else np.nan,
        "dice": float((2 * hits[seen] / both[seen]).mean()) if pixels else np.nan,
        "pixel_accuracy": float(hits.sum() / pixels) if pixels else np.nan,
        "iou": iou.tolist(),
    }


def class_frequencies(source: Source, examples: int = 500) -> Float[np.ndarray, " C"]:
    """Share of each class among the pixels that count, over at most so many examples, spread evenly over a data source.

    ValueError for a label outside the classes and for a source without a pixel that counts.
    """
    classes = len(source.classes)
    counts = np.zeros(classes, np.int64)
    for i in np.unique(np.linspace(0, len(source) - 1, min(examples, len(source))).astype(int)):
        labels = read(source, int(i))["mask"]
        labels = labels[labels != -1]
        if labels.size and not 0 <= labels.min() <= labels.max() < classes:
            raise ValueError(
                f"mask {i} has labels {labels.min()} to {labels.max()}; the classes are 0 to {classes - 1}"
            )
        counts += np.bincount(labels, minlength=classes)
    if not counts.any():
        raise ValueError("every pixel of the masks is ignored: there are no class frequencies")
    return counts / counts.sum()


def class_weights(kind: str, frequencies: Float[np.ndarray, " C"]) -> tuple[float, ...] | None:
    """Weights of classes, 1 on average over pixels: "none" (None), "sqrt" (1/sqrt(frequency)), "inverse" (1/frequency).

    Weights stop at LARGEST_CLASS_WEIGHT, which is also what a class never seen gets; the others are all the larger, in
    their proportion, so that the average stays 1. ValueError for another kind.
    """
    if kind == "none":
        return None
    if kind not in POWERS:
        raise ValueError(f"class weights are none, sqrt or inverse, not {kind!r}")
    capped = frequencies == 0
    weights = np.where(capped, LARGEST_CLASS_WEIGHT, np.where(capped, 1.0, frequencies) ** POWERS[kind])
    # What the capped classes leave of the average is the others', which may lift one of them to the cap: at most all.
    for _ in frequencies:
        left = 1 - LARGEST_CLASS_WEIGHT * frequencies[capped].sum()
        weights[~capped] *= left / (frequencies[~capped] @ weights[~capped])
        if not (weights[~capped] > LARGEST_CLASS_WEIGHT).any():
            break
        capped |= weights > LARGEST_CLASS_WEIGHT
        weights[capped] = LARGEST_CLASS_WEIGHT
    return tuple(weights.tolist())


@dataclasses.dataclass(frozen=True)
class SegmentationTask(Supervised):
    """A class for every pixel (see `Task`): batches are {"image" (B, H, W, 3), "mask" (B, H, W)}."""

    class_names: tuple[str, ...]
    losses: LossConfig
    class_weights: tuple[float, ...] | None = None
    budget: BudgetConfig | None = None
    input: str = "image"

    score: ClassVar[str] = "miou"
    score_name: ClassVar[str] = "mIoU"
    timed: ClassVar[tuple[int, ...]] = (1,)

    def task_loss(self, logits: Float[Array, "B H W C"], mask: Int[Array, "B H W"]) -> Float[Array, ""]:
        """The weighted sum of cross-entropy and soft Dice."""
        loss = jnp.float32(0)
        if weight := self.losses.cross_entropy:
            loss += weight * cross_entropy(logits, mask, self.class_weights, self.losses.label_smoothing)
        if weight := self.losses.dice:
            loss += weight * soft_dice(logits, mask)
        return loss

    def average(self, outputs: Sequence[Array], batch: Batch) -> Float[Array, ""]:
        """`task_loss` of the whole batch, the mean over outputs."""
        first, *others = [self.task_loss(logits, batch["mask"]) for logits in outputs]
        return sum(others, first) / len(outputs)

    def each(self, outputs: Sequence[Array], batch: Batch) -> Float[Array, "B outputs"]:
        """`task_loss` of every picture by itself."""
        alone = jax.vmap(lambda logits, mask: self.task_loss(logits[None], mask[None]))
        return jnp.stack([alone(logits, batch["mask"]) for logits in outputs], 1)

    def valid(self, batch: Batch) -> Bool[Array, " B"]:
        return (batch["mask"] >= 0).any((1, 2))

    def correct(self, output: Float[Array, "B H W C"], batch: Batch) -> Float[Array, " B"]:
        return jax.vmap(_pixel_accuracy)(output, batch["mask"])

    def metrics(self, outputs: Sequence[Array], batch: Batch) -> dict[str, Array]:
        return {"pixel_accuracy": _pixel_accuracy(outputs[-1], batch["mask"])}

    def counts(self, model: nnx.Module, output: Float[Array, "B H W C"], batch: Batch) -> Int[Array, "C C"]:
        """`confusion_matrix` of a batch."""
        return confusion_matrix(output, batch["mask"])

    def scores(self, counts: Num[np.ndarray, "C C"]) -> Scores:
        """`scores` of the sum of the batches' confusion matrices."""
        return scores(counts)

    def show(self, folder: Path, shown: Shown) -> str:
        """heatmaps.png, and as examples/*.png its pictures: the fewest, the median and the most MACs."""
        order = np.argsort(shown.macs, kind="stable")
        chosen = {"easiest": order[0], "median": order[len(order) // 2], "hardest": order[-1]}
        batch, logits, heat = shown.examine([int(index) for index in chosen.values()])
        found = zip(batch["image"], batch["mask"], logits.argmax(-1), heat, strict=True)
        examples = [
            report.Example(name, float(shown.macs[index]), *map(np.asarray, each))
            for (name, index), each in zip(chosen.items(), found, strict=True)
        ]
        report.plot_heatmaps(folder / "heatmaps.png", examples, class_names=self.class_names, title=shown.title)
        report.save_pictures(folder / "examples", {example.name: example.image for example in examples})
        return "heatmaps.png examples/"


def _check_shapes(logits: Any, mask: Any) -> None:
    if logits.ndim != 4 or logits.shape[:-1] != mask.shape:
        raise ValueError(f"logits {logits.shape} are not the mask's shape {mask.shape} and one axis of classes")


def _pixel_accuracy(logits: Float[Array, "... H W C"], mask: Int[Array, "... H W"]) -> Float[Array, ""]:
    """Share of the pixels that count whose class is right; 0 if none counts."""
    return ((logits.argmax(-1) == mask) & (mask >= 0)).sum() / jnp.maximum((mask >= 0).sum(), 1)
