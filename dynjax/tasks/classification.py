"""Classification: one label for each picture; the loss of models with one output, with exits, and with steps.

Labels are class numbers, and -1 for an example that does not count.
Axis letters: B batch, K classes, E exits.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray

from dynjax.config import BudgetConfig, LossConfig
from dynjax.tasks import spending


def cross_entropy(logits: Float[Array, "B K"], label: Int[Array, "B"], smoothing: float = 0.0) -> Float[Array, "B"]:
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


def confusion_matrix(logits: Float[Array, "B K"], label: Int[Array, "B"]) -> Int[Array, "K K"]:
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
class ClassificationTask:
    """What a training loop needs of classification: `loss` and `confusion` of a batch, `scores` of many.

    A model with a method `predictions` (exits) trains on all that it gives; others on what they return.
    """

    class_names: tuple[str, ...]
    losses: LossConfig
    budget: BudgetConfig | None = None
    """What the model may spend; None for a static model, which is not traced."""

    target: ClassVar[str] = "label"
    score: ClassVar[str] = "accuracy"
    score_name: ClassVar[str] = "accuracy"

    def loss(
        self, model: nnx.Module, batch: dict[str, Any], key: PRNGKeyArray, progress: Float[Array, ""] | float
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Loss and metrics of a batch {"image" (B, H, W, 3), "label" (B,)}; `progress` of the training is 0 to 1.

        The model is in its training view, and its statistics and random counts move on; for the budget see
        `spending.within_budget`.
        """
        image, label = batch["image"], batch["label"]
        spent, budget_loss = {"macs_fraction": 1.0}, 0.0
        if hasattr(model, "predictions"):
            outputs = model.predictions(image)
        elif self.budget is not None and spending.steers(model):
            logits, _, spent, budget_loss = spending.within_budget(
                lambda model, image: model(image), model, image, self.budget, key, progress
            )
            outputs = [logits]
        else:
            outputs = [model(image)]
        # Every exit counts alike (Huang et al. 2018, section 4); their mean, so that rates do not depend on the number.
        losses = [cross_entropy(logits, label, self.losses.label_smoothing) for logits in outputs]
        count = jnp.maximum((label >= 0).sum(), 1)
        task_loss = sum(each.sum() for each in losses) / count / len(losses)
        metrics = {"loss": task_loss + budget_loss, "task_loss": task_loss, "budget_loss": budget_loss, **spent}
        metrics["accuracy"] = (outputs[-1].argmax(-1) == label).sum() / count
        if len(outputs) > 1:
            for number, logits in enumerate(outputs):
                metrics[f"accuracy_exit_{number}"] = (logits.argmax(-1) == label).sum() / count
        return metrics["loss"], {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

    def confusion(self, logits: Float[Array, "B K"], label: Int[Array, "B"]) -> Int[Array, "K K"]:
        """`confusion_matrix` of a batch."""
        return confusion_matrix(logits, label)

    def scores(self, confusion: Num[np.ndarray, "K K"]) -> dict[str, Any]:
        """`scores` of the sum of the batches' confusion matrices."""
        return scores(confusion)
