"""Segmentation from pictures without labels too: what a model is sure of in a picture, it is to see in it however the
picture is changed.

FixMatch (Sohn et al. 2020, arXiv:2001.07685), equation 4, for pixels as UniMatch has it (Yang et al. 2023,
arXiv:2208.09910, equation 2), with one strongly changed picture of each and nothing done to features. The teacher is
the averaged model: it is steadier than the parameters themselves, it is what is evaluated, and the training state has
it anyway. A picture as the loader augments it is the weakly changed one.
Axis letters: B batch, H W pixels, C classes.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dynjax.tasks.losses import cross_entropy
from dynjax.tasks.objective import run
from dynjax.tasks.perturb import strong
from dynjax.tasks.segmentation import SegmentationTask
from dynjax.tasks.task import Batch, Player

UNLABELLED = "unlabelled"
"""The key of pictures without labels, as `few.WithUnlabelled` gives them; without it those with labels are taken."""
GUESS = "guess"
"""The key of what the teacher sees in them, -1 where it is not sure."""


def sure(logits: Float[Array, "B H W C"], confidence: float) -> Int[Array, "B H W"]:
    """The class of each pixel, -1 where its probability is less."""
    probability = jax.nn.softmax(logits.astype(jnp.float32)).max(-1)
    return jnp.where(probability >= confidence, logits.argmax(-1), -1)


def consistency(logits: Float[Array, "B H W C"], guess: Int[Array, "B H W"]) -> Float[Array, ""]:
    """Sum over the pixels with a guess of its cross-entropy, divided by the number of all pixels.

    Of all, as in both papers: while few are sure the loss is small, and it needs no schedule.
    """
    return cross_entropy(logits, guess) * (guess >= 0).mean()


@dataclasses.dataclass(frozen=True)
class ConsistentTask(SegmentationTask):
    """Segmentation whose batches also have pictures without masks under "unlabelled"."""

    @property
    def players(self) -> tuple[Player, ...]:
        return (Player("model", self.loss, teach=self.teach),)

    def teach(self, model: nnx.Module, batch: Batch) -> Batch:
        logits = self.infer(model, {self.input: self._bare(batch)})
        return {GUESS: sure(logits, self.losses.confidence)}

    def beside(self, model: nnx.Module, batch: Batch, key: PRNGKeyArray) -> tuple[dict[str, Array], dict[str, Array]]:
        """The weighted loss of the strongly changed pictures, the mean over outputs; their gates learn from it."""
        picture, guess = strong(self._bare(batch), batch[GUESS], jax.random.fold_in(key, 1))
        # Statistics stay those of pictures as they are evaluated.
        before = jax.tree.map(lambda leaf: leaf, nnx.state(model, nnx.BatchStat))
        outputs = run(model, picture)
        nnx.update(model, before)
        losses = jnp.stack([consistency(logits, guess) for logits in outputs])
        return {"consistency": self.losses.consistency * losses.mean()}, {"confident": (guess >= 0).mean()}

    def _bare(self, batch: Batch) -> Array:
        return batch.get(UNLABELLED, batch[self.input])
