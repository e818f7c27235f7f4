"""Segmentation: weights of classes, scores, and the task that a training loop runs.

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
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Num

from dynjax.config import BudgetConfig, LossConfig
from dynjax.core.decision import ONE, Decision
from dynjax.data.source import Source, read
from dynjax.show import kernels, report
from dynjax.tasks.borders import boundary_counts, boundary_scores, boundary_weights, kept_at_borders
from dynjax.tasks.losses import (
    binary_cross_entropy,
    check_shapes,
    cross_entropy,
    focal,
    lovasz_softmax,
    soft_dice,
    tags,
)
from dynjax.tasks.objective import Supervised
from dynjax.tasks.task import Batch, Scores, Shown

LARGEST_CLASS_WEIGHT = 10.0
"""A class's weight stops here, in units of the average pixel's, so that a few pixels do not rule a step's gradient."""

LOOKED_AT = 64
"""Pictures, spread evenly over a split, on which tiles with and without borders are compared."""

POWERS = {"sqrt": -0.5, "inverse": -1.0}
"""Of a class's frequency: its weight, but for the scale and the cap."""


def confusion_matrix(logits: Float[Array, "B H W C"], mask: Int[Array, "B H W"]) -> Int[Array, "C C"]:
    """Pixels of the class of each row that were given the class of each column, int32; ignored pixels are in none.

    Add the matrices of many batches up in int64 (`np.int64`): an int32 holds 2^31 pixels. ValueError where the shapes
    disagree.
    """
    check_shapes(logits, mask)
    classes = logits.shape[-1]
    cell = jnp.where(mask >= 0, mask * classes + logits.argmax(-1), classes**2)  # one cell more for the ignored
    return jnp.zeros(classes**2 + 1, jnp.int32).at[cell.reshape(-1)].add(1)[:-1].reshape(classes, classes)


def scores(confusion: Num[np.ndarray, "C C"]) -> dict[str, Any]:
    """`miou`, `dice`, `pixel_accuracy` and the lists `iou` and `class_dice` (one a class) of a confusion matrix, rows
    truth.

    A class absent from both truth and prediction has IoU and Dice nan and is left out of the means; without a pixel,
    all are nan.
    """
    confusion = np.asarray(confusion, np.float64)
    hits, both = np.diag(confusion), confusion.sum(0) + confusion.sum(1)
    seen = both > 0
    iou, dice = np.full((2, len(confusion)), np.nan)
    iou[seen] = hits[seen] / (both - hits)[seen]
    dice[seen] = 2 * hits[seen] / both[seen]
    pixels = confusion.sum()
    return {
        "miou": float(iou[seen].mean()) if pixels else np.nan,
        "dice": float(dice[seen].mean()) if pixels else np.nan,
        "pixel_accuracy": float(hits.sum() / pixels) if pixels else np.nan,
        "iou": iou.tolist(),
        "class_dice": dice.tolist(),
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
        """The weighted sum of the losses whose weight is not 0."""
        weights, smoothing, of = self.class_weights, self.losses.label_smoothing, self.losses
        terms = (
            (of.cross_entropy, lambda: cross_entropy(logits, mask, weights, smoothing)),
            (of.boundary, lambda: cross_entropy(logits, mask, weights, smoothing, boundary_weights(mask))),
            (of.focal, lambda: focal(logits, mask, weights)),
            (of.one_vs_all, lambda: binary_cross_entropy(logits, mask, weights)),
            (of.dice, lambda: soft_dice(logits, mask)),
            (of.lovasz, lambda: lovasz_softmax(logits, mask)),
            (of.tags, lambda: tags(logits, mask)),
        )
        return sum((weight * term() for weight, term in terms if weight), jnp.float32(0))

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

    def present(self, batch: Batch) -> Bool[Array, "B C"]:
        mask, classes = batch["mask"], len(self.class_names)
        pixels = jnp.where(mask >= 0, mask, classes).reshape(len(mask), -1)  # one class more for the ignored
        return jax.vmap(lambda own: jnp.zeros(classes + 1, bool).at[own].set(True)[:-1])(pixels)

    def metrics(self, outputs: Sequence[Array], batch: Batch) -> dict[str, Array]:
        # Of tags no pixel is known.
        return {} if self.losses.tags else {"pixel_accuracy": _pixel_accuracy(outputs[-1], batch["mask"])}

    def counts(self, model: nnx.Module, output: Float[Array, "B H W C"], batch: Batch) -> Int[Array, "C C+4"]:
        """`confusion_matrix` and `boundary_counts` of a batch, side by side."""
        mask = batch["mask"]
        found = boundary_counts(output.argmax(-1), mask, output.shape[-1])
        return jnp.concatenate([confusion_matrix(output, mask), found], 1)

    def scores(self, counts: Num[np.ndarray, "C C+4"]) -> Scores:
        """`scores` and `boundary_scores` of the sum of the batches' counts."""
        return scores(counts[:, :-4]) | boundary_scores(counts[:, -4:])

    def show(self, folder: Path, shown: Shown) -> str:
        """heatmaps.png, and as examples/*.png its pictures: the fewest, the median and the most MACs; where tiles are
        decided about, borders.csv and perhaps kinds.png."""
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
        return f"heatmaps.png examples/{self._show_tiles(folder, shown, chosen)}"

    def _show_tiles(self, folder: Path, shown: Shown, chosen: dict[str, np.integer]) -> str:
        """borders.csv, what was kept of tiles with a border of classes and of the others, and where tiles take one of
        several kinds of work, kinds.png of the layer that chooses most evenly."""
        number = min(LOOKED_AT, len(shown.source))
        batch, decisions = shown.decided(np.linspace(0, len(shown.source) - 1, number).astype(int).tolist())
        found = kept_at_borders(batch["mask"], decisions)
        if not found:
            return ""
        report.write_points(folder / "borders.csv", found)
        batch, decisions = shown.decided([int(index) for index in chosen.values()])
        several = {p: d for p, d in decisions.items() if d.place == "tile" and d.rule == ONE}
        if not several:
            return " borders.csv"
        layer, decision = max(several.items(), key=lambda each: _evenness(each[1]))
        pictures = zip(chosen, batch["image"], batch["mask"], decision.keep.argmax(-1), strict=True)
        assert decision.tile is not None
        examples = [kernels.Chosen(*each, decision.tile) for each in pictures]
        kinds, classes = decision.keep.shape[-1], len(self.class_names)
        kernels.plot_kinds(folder / "kinds.png", examples, kinds, classes, title=f"{shown.title}, {layer}")
        return " borders.csv kinds.png"


def _evenness(decision: Decision) -> tuple[float, int]:
    """Entropy of the kinds that were taken, in nats, and the number of tiles of a picture."""
    chosen = np.asarray(decision.units(decision.keep))
    shares = chosen.mean((0, 1))
    return float(-(shares * np.log(np.maximum(shares, 1e-9))).sum()), chosen.shape[1]


def _pixel_accuracy(logits: Float[Array, "... H W C"], mask: Int[Array, "... H W"]) -> Float[Array, ""]:
    """Share of the pixels that count whose class is right; 0 if none counts."""
    return ((logits.argmax(-1) == mask) & (mask >= 0)).sum() / jnp.maximum((mask >= 0).sum(), 1)
