"""What modules bring to training (`dynjax.core.training`), for those that do not say it themselves."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynjax.core.decision import Decision
from dynjax.core.training import Call
from dynjax.ops.attention import annealed_temperature, set_temperature
from dynjax.ops.experts import RouterLoss, router_z_loss
from dynjax.ops.halting import Halt, geometric_prior, halting_distribution, kl_to_prior
from dynjax.ops.policy import PolicySkip, blockdrop_reward, log_probability, reinforce_loss, set_curriculum

CURRICULUM = 0.3
"""Share of the training over which a policy comes to decide about all blocks (BlockDrop)."""


@dataclasses.dataclass(frozen=True)
class Schedules:
    model: nnx.Module

    def schedule(self, progress: Float[Array, ""] | float) -> None:
        set_temperature(self.model, annealed_temperature(progress))
        set_curriculum(self.model, progress / CURRICULUM)


@dataclasses.dataclass(frozen=True)
class RouterZ:
    model: nnx.Module

    def terms(self, call: Call) -> dict[str, Float[Array, ""]]:
        return {"router_z": router_z_loss(self.model)}


class Ponder:
    def weights(self, call: Call) -> Float[Array, "B outputs"]:
        (decision,) = call.trace.decisions.values()
        return halting_distribution(decision)

    def terms(self, call: Call) -> dict[str, Float[Array, ""]]:
        p = call.shares
        assert p is not None
        steps = p.shape[1]
        prior = geometric_prior(min(0.95, 1 / (float(call.target) * steps)), steps)
        total = jnp.where(call.valid, kl_to_prior(p, prior), 0).sum()
        return {"ponder": total / jnp.maximum(call.valid.sum(), 1)}


class Reinforce:
    def terms(self, call: Call) -> dict[str, Float[Array, ""]]:
        greedy, most_probable = call.again()

        def reward(output: Array, decision: Decision) -> Array:
            return blockdrop_reward(call.correct(output), decision.keep.mean(-1), call.weights["wrong"])

        (drawn,), (chosen,) = (each.decisions.values() for each in (call.trace, most_probable))
        rewards = reward(call.outputs[-1], drawn), reward(greedy, chosen)
        return {"reinforce": reinforce_loss(log_probability(drawn), *rewards)}


def adapters(model: nnx.Module, ops: list[nnx.Module]) -> list:
    found: list = [Schedules(model)]
    if any(isinstance(each, RouterLoss) for _, each in nnx.iter_graph(model)):
        found.append(RouterZ(model))
    if any(isinstance(op, Halt) and op.kind == "pondernet" for op in ops):
        found.append(Ponder())
    if any(isinstance(op, PolicySkip) and not op.straight_through for op in ops):
        found.append(Reinforce())
    return found
