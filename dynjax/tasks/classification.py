"""Classification: one label for each picture.

Labels are class numbers, and -1 for an example that does not count.
Axis letters: B batch, K classes, E exits.
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
from dynjax.show import gallery
from dynjax.tasks import anytime
from dynjax.tasks.objective import Supervised
from dynjax.tasks.task import Batch, Scores, Shown


def cross_entropy(logits: Float[Array, "B K"], label: Int[Array, " B"], smoothing: float = 0.0) -> Float[Array, " B"]:
    """-log softmax(logits)[label] per example, in float32; 0 where the label is -1.

    With `smoothing`, that share of the label is spread over all classes (Szegedy et al. 2016, arXiv:1512.00567,
    section 7). Raises ValueError where the shapes disagree.
    """
    if logits.ndim != 2 or logits.shape[:1] != label.shape:
        raise ValueError(f"logits {logits.shape} are not the labels' shape {label.shape} and one axis of classes")
    # One-hot for what segmentation says of it: -1 is a row of zeros, and there is no gather to differentiate.
    truth = optax.smooth_labels(jax.nn.one_hot(label, logits.shape[-1]), smoothing)
    losses = optax.softmax_cross_entropy(logits.astype(jnp.float32), truth)
    return jnp.where(label >= 0, losses, 0.0)


def confusion_matrix(logits: Float[Array, "B K"], label: Int[Array, " B"]) -> Int[Array, "K K"]:
    """Examples of the class of each row that were given the class of each column, int32; label -1 is in none."""
    classes = logits.shape[-1]
    truth = jax.nn.one_hot(label, classes, dtype=jnp.int32)
    return truth.T @ jax.nn.one_hot(logits.argmax(-1), classes, dtype=jnp.int32)


def scores(confusion: Num[np.ndarray, "K K"]) -> dict[str, Any]:
    """`accuracy` and the list `recall` (the accuracy on each class, nan for one that does not occur); rows are truth.

    Without an example all are nan.
    """
    confusion = np.asarray(confusion, np.float64)
    hits, count = np.diag(confusion), confusion.sum(1)
    recall = np.full(len(confusion), np.nan)
    recall[count > 0] = hits[count > 0] / count[count > 0]
    total = confusion.sum()
    return {"accuracy": float(hits.sum() / total) if total else np.nan, "recall": recall.tolist()}


@dataclasses.dataclass(frozen=True)
class ClassificationTask(Supervised):
    """A label for a picture (see `Task`): batches are {"image" (B, H, W, 3), "label" (B,)}.

    A model with a method `predictions` (exits, PonderNet) trains on all that it gives, others on what they return.
    """

    class_names: tuple[str, ...]
    losses: LossConfig
    budget: BudgetConfig | None = None
    input: str = "image"

    score: ClassVar[str] = "accuracy"
    score_name: ClassVar[str] = "accuracy"
    timed: ClassVar[tuple[int, ...]] = (1, 8, 32)

    def each(self, outputs: Sequence[Array], batch: Batch) -> Float[Array, "B outputs"]:
        """The weighted cross-entropy of every example; 0 where the label is -1."""
        each = [cross_entropy(logits, batch["label"], self.losses.label_smoothing) for logits in outputs]
        return self.losses.cross_entropy * jnp.stack(each, 1)

    def average(self, outputs: Sequence[Array], batch: Batch) -> Float[Array, ""]:
        """Every output counts alike (Huang et al. 2018, section 4); their mean, whatever their number."""
        return self.each(outputs, batch).mean(1).sum() / jnp.maximum(self.valid(batch).sum(), 1)

    def valid(self, batch: Batch) -> Bool[Array, " B"]:
        return batch["label"] >= 0

    def correct(self, output: Float[Array, "B K"], batch: Batch) -> Bool[Array, " B"]:
        return output.argmax(-1) == batch["label"]

    def metrics(self, outputs: Sequence[Array], batch: Batch) -> dict[str, Array]:
        """Accuracy of the last output, and of each where there are several."""
        count = jnp.maximum(self.valid(batch).sum(), 1)
        each = [self.correct(logits, batch).sum() / count for logits in outputs]
        several = {f"accuracy_exit_{number}": accuracy for number, accuracy in enumerate(each)}
        return {"accuracy": each[-1]} | (several if len(each) > 1 else {})

    def counts(self, model: nnx.Module, output: Float[Array, "B K"], batch: Batch) -> Int[Array, "K K"]:
        """`confusion_matrix` of a batch."""
        return confusion_matrix(output, batch["label"])

    def scores(self, counts: Num[np.ndarray, "K K"]) -> Scores:
        """`scores` of the sum of the batches' confusion matrices."""
        return scores(counts)

    def show(self, folder: Path, shown: Shown) -> str:
        """compute_by_class.png, of pictures extremes.png, and of a model with exits what `anytime.show` draws."""
        labels = np.array([int(shown.source[index]["label"]) for index in range(len(shown.source))])
        macs = shown.macs
        gallery.plot_classes(folder / "compute_by_class.png", macs, labels, self.class_names, title=shown.title)
        exits = f" {anytime.show(folder, shown)}" if anytime.find_exits(shown.model) else ""
        if shown.source.spec[self.input].role != "picture":
            return f"compute_by_class.png{exits}"
        number = min(12, len(macs))
        low, high = np.sort(macs)[[number - 1, -number]]
        # Pictures that stop at one exit spend the same: from among equals, those spread over the split.
        rows = {}
        for name, each in (("easiest", np.flatnonzero(macs <= low)), ("hardest", np.flatnonzero(macs >= high))):
            rows[name] = [
                (shown.source[index][self.input], f"{self.class_names[labels[index]]}\n{macs[index] / 1e6:.1f} MMAC")
                for index in each[np.linspace(0, len(each) - 1, number).astype(int)].tolist()
            ]
        gallery.plot_extremes(folder / "extremes.png", rows, title=shown.title)
        return f"compute_by_class.png extremes.png{exits}"
