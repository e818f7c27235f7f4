"""Classification: one label for each picture; the loss of models with one output, with exits, and with a policy.

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
from dynjax.core import budget, trace, views
from dynjax.core.decision import Decision
from dynjax.models.likelihoods import Predicts
from dynjax.ops.attention import annealed_temperature, set_temperature
from dynjax.ops.halting import geometric_prior, halting_distribution, kl_to_prior
from dynjax.ops.policy import PolicySkip, blockdrop_reward, log_probability, reinforce_loss, set_curriculum
from dynjax.tasks import spending

CURRICULUM = 0.3
"""Share of the training over which a policy comes to decide about all blocks (BlockDrop)."""


USES = frozenset({"loss.cross_entropy", "loss.label_smoothing"})
"""Options of the loss that the task looks at, whatever the model."""


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
class ClassificationTask:
    """What a training loop needs of classification: `loss`, `prepare`, `infer`, `counts` of a batch, `scores` of many.

    A model with a method `predictions` (exits, PonderNet) trains on all that it gives, others on what they return.
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
        count = jnp.maximum((label >= 0).sum(), 1)
        set_temperature(model, annealed_temperature(progress))
        set_curriculum(model, progress / CURRICULUM)
        spent: dict[str, Any] = {"macs_fraction": 1.0}
        more: dict[str, Array] = {}
        budget_loss: Array | float = 0.0
        if isinstance(model, Predicts):
            outputs, decisions = trace.traced(lambda model, image: model.predictions(image))(model, image)
            losses = self._each(outputs, label)
            if decisions.decisions:
                task_loss, more = self._pondered(losses, decisions, label)
            else:
                # Every exit counts alike (Huang et al. 2018, section 4); their mean, whatever their number.
                task_loss = losses.mean(1).sum() / count
        elif self.budget is not None and spending.steers(model):
            logits, decisions, spent, budget_loss = spending.within_budget(
                lambda model, image: model(image), model, image, self.budget, key, progress
            )
            outputs = [logits]
            task_loss = self._each(outputs, label).sum() / count
            more = spending.auxiliary(self.losses, model, decisions)
            if any(isinstance(each, PolicySkip) and not each.straight_through for _, each in nnx.iter_modules(model)):
                more["reinforce"] = self._reinforced(model, image, label, logits, decisions, spent["target"])
                budget_loss = 0.0  # the reward says what blocks are worth
        else:
            outputs = [model(image)]
            task_loss = self._each(outputs, label).sum() / count
        loss = task_loss + budget_loss + sum(more.values(), jnp.float32(0))
        metrics = {"loss": loss, "task_loss": task_loss, "budget_loss": budget_loss, **more, **spent}
        metrics["accuracy"] = (outputs[-1].argmax(-1) == label).sum() / count
        if len(outputs) > 1:
            for number, logits in enumerate(outputs):
                metrics[f"accuracy_exit_{number}"] = (logits.argmax(-1) == label).sum() / count
        return loss, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

    def _each(self, outputs: list[Array], label: Array) -> Float[Array, "B E"]:
        each = [cross_entropy(logits, label, self.losses.label_smoothing) for logits in outputs]
        return self.losses.cross_entropy * jnp.stack(each, 1)

    def _pondered(self, losses: Array, decisions: trace.Trace, label: Array) -> tuple[Array, dict[str, Array]]:
        """PonderNet: the loss expected over where it stops, and the divergence of that from the prior."""
        (decision,) = decisions.decisions.values()
        p, counts = halting_distribution(decision), (label >= 0)
        steps = losses.shape[1]
        target = 0.5 if self.budget is None else self.budget.target
        prior = geometric_prior(min(0.95, 1 / (target * steps)), steps)
        expected = jnp.where(counts, (p * losses).sum(-1), 0).sum() / jnp.maximum(counts.sum(), 1)
        divergence = jnp.where(counts, kl_to_prior(p, prior), 0).sum() / jnp.maximum(counts.sum(), 1)
        return expected, {"ponder": self.losses.ponder * divergence}

    def _reinforced(
        self,
        model: nnx.Module,
        image: Array,
        label: Array,
        logits: Array,
        decisions: trace.Trace,
        target: Array | float,
    ) -> Array:
        """BlockDrop's loss of the policy: what it drew against the reward of what it would do without noise.

        `target` is the budget under which it drew; without noise it decides at the same threshold.
        """
        frozen = views.still(model)
        assert self.budget is not None  # under which it drew
        if self.budget.sampled:
            budget.set_threshold(model, budget.sampled_threshold(target))
        greedy, most_probable = trace.traced(frozen)(image)
        if self.budget.sampled:
            budget.set_threshold(model, budget.sampled_threshold(self.budget.target))

        def reward(logits: Array, decision: Decision) -> Array:
            return blockdrop_reward(logits.argmax(-1) == label, decision.keep.mean(-1), self.losses.wrong)

        (drawn,), (chosen,) = (each.decisions.values() for each in (decisions, most_probable))
        rewards = reward(logits, drawn), reward(greedy, chosen)
        return self.losses.reinforce * reinforce_loss(log_probability(drawn), *rewards)

    def confusion(self, logits: Float[Array, "B K"], label: Int[Array, " B"]) -> Int[Array, "K K"]:
        """`confusion_matrix` of a batch."""
        return confusion_matrix(logits, label)

    def prepare(self, model: nnx.Module, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch as it is."""
        return batch

    def infer(self, model: nnx.Module, batch: dict[str, Any]) -> Float[Array, "B K"]:
        """The logits of a batch."""
        return model(batch["image"])

    def counts(self, model: nnx.Module, logits: Float[Array, "B K"], batch: dict[str, Any]) -> Int[Array, "K K"]:
        """What `scores` takes the sum of: `confusion` of a batch."""
        return self.confusion(logits, batch["label"])

    def scores(self, confusion: Num[np.ndarray, "K K"]) -> dict[str, Any]:
        """`scores` of the sum of the batches' confusion matrices."""
        return scores(confusion)
