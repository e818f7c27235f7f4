"""Early exits: stages that examples, or tiles, need not reach.

Letters: B examples, H W pixels, h w tiles, C channels, K classes, S stages.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynjax.core import execute, views, wrapper
from dynjax.core.arguments import Tree, first, following
from dynjax.core.decision import PREFIX, Decision
from dynjax.core.gates import Threshold, threshold
from dynjax.core.receptive import receptive_radius, window_macs
from dynjax.core.wrapper import Wrapper
from dynjax.ops import confidence


class Exits(Wrapper):
    """Stages with a head after each; an example (or a tile) that a head is sure about runs no further stage.

    Early exits for classification (BranchyNet, Teerapittayanon et al. 2016; MSDNet, Huang et al. 2018) and, with
    `size`, for dense prediction, where tiles stop as pixels do in Deep Layer Cascade (Li et al. 2017). Deviation: whole
    tiles stop, when the mean confidence of their pixels suffices, so that stopping saves time; features of stopped
    tiles stay as they are for their neighbours.

    When training (not `deterministic`) everything is run and the last head's logits are returned; train all heads on
    `predictions(x)`. Compact, the examples that stop leave the batch before the next stage.

    Args:
        stages: modules run one after the other. Per example, what they take and give may be trees of arrays (the scales
            of MSDNet), and they may hold dynamic modules. With `size`, stages after the first must keep height and
            width and have stride 1.
        heads: one for each stage, from what it gives to logits (B, K), or (B, H, W, K), which `size` needs.
        confidence: "max_prob" is the largest class probability, "entropy" is one minus the entropy over its maximum; of
            several pixels, their mean. "patience" counts heads that agree, per example. "random", the control at the
            same cost, is uniform over (0, 1), a function of the logits.
        at: confidence in (0, 1) at which to stop when the threshold is 0; a budget moves the threshold.
        patience: stop once so many heads in a row have agreed with the one before them (PABEE, Zhou et al. 2020,
            arXiv:2006.04152). Deviation: the threshold is taken off the patience, and the largest class probability
            counts as a part of one agreement, which orders examples between whole thresholds and changes nothing at 0.
        size: side of a tile in pixels of the stages' map; None decides per example.
        batched: as in `Skip`; all stages are called with the same, heads with what the stages give.

    Raises:
        ValueError: if numbers of stages and heads differ, or shapes do not agree.
    """

    by_hand = "it needs stages with a head for each: dj.Exits(stages, heads), of the model's own modules"

    def __init__(
        self,
        stages: Sequence[Callable],
        heads: Sequence[Callable],
        *,
        confidence: Literal["max_prob", "entropy", "patience", "random"] = "max_prob",
        at: float = 0.9,
        patience: int = 1,
        size: int | None = None,
        batched: Collection[int | str] | None = None,
    ):
        if len(stages) != len(heads) or not stages:
            raise ValueError(
                f"Exits needs one head for each stage; there are {len(stages)} stages and {len(heads)} heads"
            )
        if confidence not in ("max_prob", "entropy", "patience", "random"):
            raise ValueError(f"confidence={confidence!r} must be 'max_prob', 'entropy', 'patience' or 'random'")
        if not 0 < at < 1:
            raise ValueError(f"at={at} must be a confidence in (0, 1)")
        if not 1 <= patience <= max(len(stages) - 1, 1):
            raise ValueError(f"patience={patience} must be at least 1 and less than the number of heads, {len(heads)}")
        if size is not None and size < 1:
            raise ValueError(f"size={size} must be at least 1 pixel, or None to decide per example")
        if size is not None and confidence == "patience":
            raise ValueError(f"confidence='patience' decides per example, so size={size} must be None")
        for part in (*stages, *heads) if size is not None else ():
            wrapper.refuse_nested("Exits per tile", part)
        self.stages, self.heads = nnx.List(stages), nnx.List(heads)
        self.confidence, self.at, self.patience, self.size, self.batched = confidence, at, patience, size, batched
        self.threshold = Threshold(jnp.zeros(()))

    @property
    def nests(self) -> bool:
        return self.size is None

    def predictions(self, *args: Any, **kwargs: Any) -> list[Array]:
        """The logits of every head, to train them all; `predictions(x)[k]` under jit runs no stage after the k-th."""
        x, stages, given = self.bind(self.stages, args, kwargs)
        outs = []
        for stage, head in zip(stages, self.heads, strict=True):
            x = stage(following(given, x))
            outs.append(head(x))
        return outs

    def doubt(
        self, logits: Float[Array, "B *pixels K"], agreed: Float[Array, " B"] | None = None
    ) -> Float[Array, " B *tiles"]:
        """How far one head is from stopping: it goes on where this is at least the threshold.

        The logit of one minus the confidence, above that logit at `at`; with "patience" the agreements that are
        missing, where `agreed` heads in a row have agreed so far (default: none).
        """
        if self.confidence != "patience":
            return confidence.doubt(logits, self.confidence, self.at, self.size)
        unsure, sure = (each.reshape(-1) for each in confidence.logarithms(logits, "max_prob"))
        return self.patience - 1 - (jnp.zeros_like(sure) if agreed is None else agreed) + jnp.exp(unsure)

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        _, stages, given = self.bind(self.stages, args, kwargs)
        last = len(stages) - 1
        blocks = [_Stage(stage, self.heads[number], last=number == last) for number, stage in enumerate(stages)]
        inputs, x = [given], stages[0](given)
        out = self.heads[0](x)
        if self.confidence == "patience" and out.ndim != 2:
            raise ValueError(f"confidence='patience' needs logits (B, K) of whole examples; the heads give {out.shape}")
        active = jnp.ones((out.shape[0], *(() if self.size is None else wrapper.grid(x, self.size))), jnp.float32)
        agreed = jnp.zeros((out.shape[0],), jnp.float32)
        keeps, probabilities = [active], [active]
        for block in blocks[1:]:
            inputs.append(following(given, x))
            doubt = self.doubt(out, agreed)
            # What is drawn by chance is no probability: there the one number that all draws are compared with counts.
            chance = jnp.full_like(doubt, jax.scipy.special.logit(self.at)) if self.confidence == "random" else doubt
            probabilities.append(probabilities[-1] * jax.nn.sigmoid(chance - self.threshold[...]))
            active = active * threshold(doubt, self.threshold[...]) if self.deterministic else active
            keeps.append(active)
            x, after = self._step(block, inputs[-1], out, active, probabilities[-1])
            if self.confidence == "patience":
                agreed = (agreed + 1) * (after.argmax(-1) == out.argmax(-1))
            out = after
        if self.tracing:
            self._account(blocks, inputs, x, jnp.stack(keeps, -1), jnp.stack(probabilities, -1))
        return out

    def _step(self, block, x, out, active, probability):
        """One more stage and head where `active`; elsewhere the features pass on if they can, and the logits stay."""
        if self.size is None and block.last:
            return self.samples(block, x, active, lambda _: (None, out), probability)
        spec = execute.shape_of(views.still(block.stage), x)
        shapes = [jax.tree.map(lambda a: a.shape, tree) for tree in (first(x), spec)]
        rest = first(x) if shapes[0] == shapes[1] else jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), spec)
        if self.size is None:
            return self.samples(block, x, active, lambda _: (rest, out), probability)
        x = self.tiles(block.stage, x, active, self.size, receptive_radius(block.stage, x), lambda _: rest)
        return x, self.tiles(block.head, x, active, self.size, receptive_radius(block.head, x), lambda _: out)

    def _account(self, stages, inputs, last, keep, probability):
        if self.size is None:
            self.account_blocks(Decision(keep, probability, "example", PREFIX), stages, inputs)
            return
        whole = [wrapper.macs_per_example(stage, x) for stage, x in zip(stages, inputs, strict=True)]
        unit = [whole[0] / keep[0, ..., 0].size]
        for block, x in zip(stages[1:], inputs[1:], strict=True):
            after = execute.shape_of(views.still(block.stage), x)
            pairs = ((block.stage, x), (block.head, after))
            unit.append(sum(window_macs(b, v, self.size, receptive_radius(b, v)) for b, v in pairs))
        self.account(Decision(keep, probability, "tile", PREFIX), unit, whole, wrapper.tile_of(last, self.size))


class _Stage(nnx.Module):
    """A stage and its head: the features, unless nobody needs them any more, and the logits."""

    def __init__(self, stage: Callable, head: Callable, *, last: bool = False):
        self.stage, self.head, self.last = stage, head, last

    def __call__(self, x: Tree) -> tuple[Tree | None, Array]:
        features = self.stage(x)
        return None if self.last else features, self.head(features)
