"""One policy for many blocks: a network that sees the input once and says which blocks of a chain run.

Letters: B examples, K blocks that can be skipped.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from dynjax.core.arguments import Tree, examples_of, following
from dynjax.core.decision import EACH, Decision
from dynjax.core.training import Call
from dynjax.core.wrapper import Wrapper

CURRICULUM = 0.3
"""Share of the training over which a policy comes to decide about all blocks."""


class PolicySkip(Wrapper):
    """A chain of modules, of which one gate, before the first runs, decides for each example which to skip.

    BlockDrop (Wu et al. 2018, arXiv:1711.08393, section 3): the policy network is the gate, any modules that end in a
    `ChannelGate`, such as `nnx.Sequential(convolutions, ChannelGate(features, K, rngs=rngs))`. Deviations: it is
    trained by straight-through Gumbel choices, together with the blocks or after them, unless `straight_through` is
    False; a block that is skipped is left out with its shortcut, as in `Skip`.

    Without it the policy is trained as in the paper, by REINFORCE: `terms` has the loss, and `schedule` the curriculum.
    The paper's bound on the probabilities, for exploration, is left out.

    Args:
        blocks: modules run one after the other; they may hold dynamic modules.
        gate: from the chain's input to a decision of shape (B, K).
        skip: which of the blocks, by number, the K decisions are about; the others always run. Default: all.
        otherwise: by a block's number, what to run for the examples that skip it (by default they pass unchanged): a
            cheap module where the block changes the shape. Always run, so its cost is static.
        straight_through: whether the gate is trained through what its blocks do; False leaves that to REINFORCE.
        batched: as in `Skip`; all blocks are called with the same.

    Raises:
        ValueError: if numbers or shapes do not agree.
    """

    by_hand = "it holds a chain: model.layers = dj.PolicySkip(blocks, dj.ChannelGate(features, len(blocks), rngs=rngs))"

    def __init__(
        self,
        blocks: Sequence[Callable],
        gate: Callable,
        *,
        skip: Sequence[int] | None = None,
        otherwise: Mapping[int, Callable] | None = None,
        straight_through: bool = True,
        batched: Collection[int | str] | None = None,
    ):
        skip, otherwise = tuple(range(len(blocks)) if skip is None else skip), otherwise or {}
        if not skip or list(skip) != sorted(set(skip)) or not 0 <= skip[0] <= skip[-1] < len(blocks):
            raise ValueError(f"skip={skip} must be rising numbers of the {len(blocks)} blocks, at least one")
        if not set(otherwise) <= set(skip):
            raise ValueError(f"otherwise is for the blocks {sorted(otherwise)}, and skip={skip} has not all of them")
        self.blocks, self.gate, self.skip = nnx.List(blocks), gate, skip
        self.otherwise = nnx.Dict({str(number): module for number, module in otherwise.items()})
        self.straight_through, self.batched = straight_through, batched
        self.held = Held(jnp.zeros((len(skip),), bool))

    @property
    def nests(self) -> bool:
        return True

    def schedule(self, progress: Float[Array, ""] | float) -> None:
        """Let the policy decide about the last blocks alone, and about all from `CURRICULUM` on."""
        self.held[...] = curriculum_mask(progress / CURRICULUM, self.held.shape[0]) == 0

    def rewarded(self) -> bool:
        """By REINFORCE the reward says what blocks are worth."""
        return not self.straight_through

    def terms(self, call: Call) -> dict[str, Array]:
        """`reinforce`: what was drawn against the reward of what it would do without noise; wrong costs `wrong`."""
        if self.straight_through:
            return {}
        greedy, most_probable = call.again()
        (drawn,), (chosen,) = call.own(), call.own(most_probable)
        rewards = [
            blockdrop_reward(call.correct(output), decision.keep.mean(-1), call.weights["wrong"])
            for output, decision in ((call.outputs[-1], drawn), (greedy, chosen))
        ]
        return {"reinforce": reinforce_loss(log_probability(drawn), *rewards)}

    def __call__(self, *args: Any, **kwargs: Any) -> Tree:
        x, blocks, given = self.bind(self.blocks, args, kwargs)
        hint = f"use ChannelGate(features, {len(self.skip)}, rngs=rngs), or FixedGate(keep, rule=EACH)"
        shape = (examples_of(x), len(self.skip))
        decision = self.expect(self.gate(x), "example", EACH, shape, hint)
        keep, probability = (jnp.where(self.held[...][None], 1, a) for a in (decision.keep, decision.probability))
        decision = dataclasses.replace(decision, keep=keep, probability=probability)
        keep = decision.keep if self.straight_through else jax.lax.stop_gradient(decision.keep)
        inputs = []
        for number, block in enumerate(blocks):
            now = following(given, x)
            if number not in self.skip:
                x = block(now)
                continue
            inputs.append(now)
            which = self.skip.index(number)
            otherwise = self.otherwise.get(str(number))
            x = self.samples(block, now, keep[:, which], otherwise, decision.probability[:, which])
        self.account_blocks(decision, [blocks[number] for number in self.skip], inputs)
        return x


class Held(nnx.Variable):
    """Which blocks run for every example, whatever the policy says; none, unless a curriculum is under way."""


def curriculum_mask(progress: Float[Array, ""] | float, blocks: int) -> Float[Array, " K"]:
    """1 for the last ceil(progress * K) of K = `blocks` blocks, at least one, which the policy decides about; 0 for
    those before, which all run (BlockDrop, section 3: training starts with the last block and adds those before)."""
    free = jnp.clip(jnp.ceil(jnp.asarray(progress, jnp.float32) * blocks - 1e-4), 1, blocks)
    return (jnp.arange(blocks) >= blocks - free).astype(jnp.float32)


def log_probability(decision: Decision) -> Float[Array, " B"]:
    """Log of the probability of what was drawn, all K choices independent (BlockDrop, section 3)."""
    kept, p = jax.lax.stop_gradient(decision.keep), jnp.clip(decision.probability, 1e-6, 1 - 1e-6)
    return jnp.log(kept * p + (1 - kept) * (1 - p)).sum(-1)


def blockdrop_reward(
    correct: Bool[Array, " B"] | Float[Array, " B"], kept: Float[Array, " B"], gamma: float
) -> Float[Array, " B"]:
    """1 - kept^2 for a correct prediction, where `kept` is the share of the blocks that ran; -gamma for a wrong one
    (BlockDrop, section 3); of one that is right to a share, what to expect."""
    return correct * (1 - kept**2) - (1 - correct) * gamma


def reinforce_loss(
    log_probability: Float[Array, " B"], reward: Float[Array, " B"], baseline: Float[Array, " B"]
) -> Float[Array, ""]:
    """Its gradient is that of minus the expected reward (Williams 1992): -mean((reward - baseline) log p).

    BlockDrop is self-critical: the baseline is the reward of the most probable choice, made without noise.
    """
    return -(jax.lax.stop_gradient(reward - baseline) * log_probability).mean()
