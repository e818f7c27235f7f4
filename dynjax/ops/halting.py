"""Halting: one module applied again and again, to each example or tile until a halting unit says stop.

Letters: B examples, H W pixels, h w tiles, C channels, S steps.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dynjax.core import execute, views, wrapper
from dynjax.core.arguments import Tree, examples_of, first, following, others
from dynjax.core.decision import EACH, PREFIX, Decision, Place
from dynjax.core.devices import spread_over
from dynjax.core.gates import straight_through
from dynjax.core.receptive import receptive_radius, window_macs
from dynjax.core.training import Call
from dynjax.core.wrapper import Wrapper

# Pure functions. A rule takes the halting probability after one step, the mass that no earlier step took, and whether
# no step can follow; it gives the weight of this step (the mass that it takes) and whether to stop after it.


def act_rule(
    halting: Float[Array, "..."], mass: Float[Array, "..."], last: Bool[Array, ""] | bool, epsilon: float = 0.01
) -> tuple[Float[Array, "..."], Bool[Array, "..."]]:
    """Adaptive computation time (Graves 2016, arXiv:1603.08983, section 2): stop once the halting probabilities sum to
    1 - epsilon; the last step takes the remainder."""
    stop = (mass - halting <= epsilon) | last
    return jnp.where(stop, mass, halting), stop


def pondernet_rule(
    halting: Float[Array, "..."], mass: Float[Array, "..."], last: Bool[Array, ""] | bool
) -> tuple[Float[Array, "..."], Bool[Array, "..."]]:
    """PonderNet (Banino et al. 2021, arXiv:2107.05407, section 2): p_n = lambda_n prod_{j<n} (1 - lambda_j).

    Deviation: it stops at the median of p, not by chance, so that every execution agrees and a budget can steer it.
    """
    weight = jnp.where(last, mass, halting * mass)
    return weight, (mass - weight <= 0.5) | last


def weights(halting: Float[Array, "... S"], rule: Callable) -> Float[Array, "... S"]:
    """Weights of S steps from their halting probabilities: the last takes what is left, so that they sum to 1."""
    mass, found = jnp.ones(halting.shape[:-1]), []
    for n in range(halting.shape[-1]):
        found.append(rule(halting[..., n], mass, n == halting.shape[-1] - 1)[0])
        mass = mass - found[-1]
    return jnp.stack(found, -1)


def geometric_prior(rate: float, steps: int) -> Float[Array, " S"]:
    """PonderNet's prior: geometric, 1/`rate` steps in the mean, cut after `steps`.

    Deviation: the last step takes the tail, as in `weights`, so that it is one and the KL can be 0.
    """
    if not 0 < rate < 1:
        raise ValueError(f"rate={rate} must be in (0, 1): the prior probability of stopping after any one step")
    return weights(jnp.full((steps,), rate), pondernet_rule)


def kl_to_prior(p: Float[Array, "... S"], prior: Float[Array, " S"]) -> Float[Array, "..."]:
    """KL(p || prior) in nats, the regulariser of PonderNet (section 2)."""
    prior = prior.reshape((1,) * (p.ndim - 1) + (-1,))
    log_p, log_prior = (jnp.log(jnp.maximum(q, 1e-9)) for q in (p, prior))
    return (p * (log_p - log_prior)).sum(-1)


def halting_distribution(decision: Decision) -> Float[Array, "B ... S"]:
    """Probability of stopping after each step, from the decision of a `Halt`: its weights, in training."""
    running = decision.probability
    return running - jnp.concatenate([running[..., 1:], jnp.zeros_like(running[..., :1])], -1)


# Module


Kind = Literal["act", "pondernet", "hard"]


class Halt(Wrapper):
    """Apply `step` again and again, to each example (or tile) until its halting unit says stop.

    The halting unit is a gate that looks at the state after each step and gives a decision whether to go on; its
    halting probability is one minus the probability to go on. A threshold moves it: higher halts sooner.

    "act": adaptive computation time (Graves 2016, arXiv:1603.08983). The output is the mean of the states, weighted
    by their halting probabilities and the remainder. Per tile (a gate with a `size`, 1 for pixels) it is SACT (Figurnov
    et al. 2017, arXiv:1612.02297): tiles that have halted keep their value for their neighbours. Deviation there: the
    gate reads a tile and the map's mean, not 3x3 pixels.

    "pondernet" (Banino et al. 2021, arXiv:2107.05407), per example: the output is the state of the step at which it
    stops, the median of its distribution. When training (not `deterministic`) nothing stops and the output is the mean
    of the states under the distribution; the paper's loss is that of every one of `predictions(x)`, weighed by
    `halting_distribution` of the traced decision, and `kl_to_prior`.

    "hard": stop once the gate does not keep, with a straight-through gradient; what `RandomGate`, the control, needs.

    Compact is one `while_loop` that ends when all have halted. Examples that have halted leave it before, and so do
    tiles, whose windows the border makes dearer (see `Tiles`): a `size` of 4 or more saves time.

    Args:
        step: (B, ..., C) to the same shape; its parameters are shared by all steps. Per tile of stride 1 and SAME
            padding. A state may be a tree of arrays, per example, if the gate takes it.
        gate: `SampleGate(C, rngs=rngs)`, or `TileGate(C, size=size, rngs=rngs)`. Its cost is counted after every step;
            per tile as if it were run for every step, whatever halts.
        max_steps: S, after which everything stops.
        epsilon: ACT stops once the halting probabilities sum to 1 - epsilon.
        batched: as in `Skip`; every step is called with the same.

    Raises:
        ValueError: if shapes do not agree, `step` is dynamic itself, or "pondernet" is asked for per tile.
    """

    by_hand = (
        "it needs the number of steps: lambda block, features, rngs: "
        "dj.Halt(block, dj.SampleGate(features, rngs=rngs), max_steps=4)"
    )

    def __init__(
        self,
        step: Callable,
        gate: Callable,
        max_steps: int,
        *,
        kind: Kind = "act",
        epsilon: float = 0.01,
        batched: Collection[int | str] | None = None,
    ):
        wrapper.refuse_nested("Halt", step)
        if kind not in get_args(Kind):
            raise ValueError(f"kind={kind!r} must be 'act', 'pondernet' or 'hard'")
        if max_steps < 1:
            raise ValueError(f"max_steps={max_steps} must be at least 1")
        if not 0 < epsilon < 1:
            raise ValueError(f"epsilon={epsilon} must be in (0, 1)")
        self.size = size = wrapper.tile_size(gate)
        self.place: Place = "example" if size is None else "tile"
        if kind == "pondernet" and size is not None:
            raise ValueError(
                f"kind='pondernet' halts whole examples, and the gate has tiles of size={size}: in training no "
                "tile would stay as it is for its neighbours; use kind='act', or a SampleGate"
            )
        self.step, self.gate, self.max_steps, self.kind, self.epsilon = step, gate, max_steps, kind, epsilon
        self.batched = batched

    def __call__(self, *args: Any, **kwargs: Any) -> Tree:
        _, (step,), given = self.bind([self.step], args, kwargs)
        if self.execution == "masked":
            # PonderNet is trained on all of its steps.
            states, keep, mass = self._masked(step, given, freeze=self.kind != "pondernet" or self.deterministic)
            out = states[-1][1]
        else:
            (_, out, _, _), keep, mass = self._compact(step, given)
        self._account(step, given, keep, mass)
        return out

    def predictions(self, *args: Any, **kwargs: Any) -> list[Tree]:
        """The state after each of the steps, whatever halts (tiles that have halted stay), to train on them all."""
        _, (step,), given = self.bind([self.step], args, kwargs)
        states, keep, mass = self._masked(step, given, freeze=self.size is not None)
        self._account(step, given, keep, mass)
        return [state for state, _ in states]

    def weights(self, call: Call) -> Float[Array, "B S"] | None:
        """PonderNet's loss is what to expect over the step at which it stops."""
        return halting_distribution(call.own()[0]) if self.kind == "pondernet" else None

    def terms(self, call: Call) -> dict[str, Array]:
        """`ponder`, of PonderNet: the divergence from the geometric prior whose mean is the budget."""
        if self.kind != "pondernet":
            return {}
        prior = geometric_prior(min(0.95, 1 / (call.target * self.max_steps)), self.max_steps)
        p = halting_distribution(call.own()[0]) if call.shares is None else call.shares
        return {"ponder": call.mean(kl_to_prior(p, prior))}

    def _start(self, step, given):
        """State, output so far, mass left, and what still runs (both per example or tile)."""
        x = first(given)
        shapes = [jax.tree.map(lambda a: a.shape, tree) for tree in (x, execute.shape_of(views.still(step), given))]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"Halt applies a module to what it gave, so it must keep the shape; {type(self.step).__name__} turns "
                f"{shapes[0]} into {shapes[1]}"
            )
        grid = () if self.size is None else wrapper.grid(x, self.size)
        ones = jnp.ones((examples_of(x), *grid), jnp.float32)
        return x, jax.tree.map(jnp.zeros_like, x), ones, ones

    def _advance(self, step, gate, carry, last, freeze):
        """One step: `step(state, run)` gives the next state where `run` is 1."""
        state, out, mass, active = carry
        run = active if freeze else jnp.ones_like(active)
        state = jax.tree.map(lambda new, old: new.astype(old.dtype), step(state, run), state)
        hint = f"use {'SampleGate' if self.size is None else 'TileGate'}"
        decision = self.expect(gate(state), self.place, EACH, run.shape, hint)
        halting = 1 - (decision.keep if self.kind == "hard" else decision.probability)
        rule = functools.partial(act_rule, epsilon=self.epsilon) if self.kind == "act" else pondernet_rule
        weight, stop = rule(halting.astype(jnp.float32), mass, last)
        # Not being trained, PonderNet gives the state of one step.
        counts = run * (stop if self.kind == "pondernet" and freeze else weight)
        out = jax.tree.map(lambda o, s: o + self._weighted(counts, s), out, state)
        return state, out, mass - run * weight, active * (1 - stop)

    def _weighted(self, weight, x):
        """`x` times a weight of examples or tiles."""
        fine = weight if self.size is None else execute.tile_pixels(weight, self.size, x.shape[1:3])
        return execute.weighted(fine, x)

    def _masked(self, step, given, freeze):
        def run_step(state, run):
            now = following(given, state)
            if self.size is None:
                return execute.samples(step, now, run)
            return execute.tiles(step, now, run, size=self.size, radius=receptive_radius(step, now))

        carry = self._start(step, given)
        states, keeps, masses = [], [], []
        for n in range(self.max_steps):
            _, _, mass, active = carry
            keeps.append(active)
            masses.append(mass * active if freeze else mass)
            carry = self._advance(run_step, self.gate, carry, n == self.max_steps - 1, freeze)
            states.append(carry[:2])
        return states, jnp.stack(keeps, -1), jnp.stack(masses, -1)

    def _compact(self, block, given):
        size, strategy, start = self.size, self.strategy, self._start(block, given)
        radius = 0 if size is None else receptive_radius(block, given)
        step, gate = (wrapper.ready(each, "compact") for each in (block, self.gate))
        more = others(given)

        def advance(carry, more, last):
            def run_step(state, run):
                now = following(given, state, more)
                if size is None:
                    return step(now)
                return execute.tiles(step, now, run, size=size, radius=radius, execution="compact", strategy=strategy)

            return self._advance(run_step, gate, carry, last, freeze=True)

        def body(loop):
            n, carry, keeps, masses = loop
            _, _, mass, active = carry
            keeps, masses = keeps.at[n].set(active), masses.at[n].set(mass * active)
            now = functools.partial(advance, last=n == self.max_steps - 1)

            def one_by_one():
                some = active.reshape(active.shape[0], -1).max(1)
                return execute.samples(
                    lambda both: now(*both),
                    (carry, more),
                    some,
                    otherwise=lambda both: both[0],
                    execution="compact",
                    strategy=strategy,
                )

            # A CPU takes the examples one by one, and of each the tiles; others take the tiles of all examples at once.
            new = one_by_one() if size is None else execute.by_platform(strategy, one_by_one, lambda: now(carry, more))
            return n + 1, new, keeps, masses

        def goes_on(loop):
            return (loop[0] < self.max_steps) & (loop[1][3].max() > 0)

        none = jnp.zeros((self.max_steps, *start[2].shape), jnp.float32)
        start, none = spread_over((start, none), over=more)
        _, carry, keeps, masses = jax.lax.while_loop(goes_on, body, (jnp.int32(0), start, none, none))
        return carry, jnp.moveaxis(keeps, 0, -1), jnp.moveaxis(masses, 0, -1)

    def _account(self, step, given, keep, mass):
        if not self.tracing:
            return
        whole, tile = wrapper.macs_per_example(step, given), None
        if self.size is None:
            unit = whole = whole + wrapper.macs_per_example(self.gate, first(given))
        else:
            unit = window_macs(step, given, self.size, receptive_radius(step, given))
            tile = wrapper.tile_of(first(given), self.size)
        decision = Decision(straight_through(keep, mass), mass, self.place, PREFIX)
        self.account(decision, (unit,) * self.max_steps, (whole,) * self.max_steps, tile)
