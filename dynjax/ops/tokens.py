"""Mixture-of-Depths: the tokens that a block is for are gathered, and the block sees only these.

Letters: B examples, T tokens, C features, N tokens that are gathered.
"""

import functools
import inspect
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from dynjax.core import cost, execute, views, wrapper
from dynjax.core.decision import EACH, Decision
from dynjax.core.gates import Gate, GateParam, Threshold, check_features, threshold, top_k
from dynjax.core.training import Call
from dynjax.core.wrapper import Wrapper


class TokenGate(Gate):
    """Which tokens take part: expert choice, the `capacity` tokens of largest logit of each example.

    `x` (B, T, features) gives a decision of shape (B, T), with sigmoid(logits) as the probability. The router of
    Mixture-of-Depths (Raposo et al. 2024, arXiv:2404.02258), a linear layer. While training, the top
    ceil(capacity * T) take part, whatever the threshold is. When deterministic a token does whose logit is at least the
    threshold, so that it depends on no other token (section 3.5) and a budget can be solved; a term of the loss, from
    `MixtureOfDepths`, teaches the router to put its top k above 0. Deviation: tokens are normalised before the router,
    for what its logit compares with must not depend on how far features have grown.

    Raises:
        ValueError: if `capacity` is not in (0, 1].
    """

    def __init__(self, features: int, *, capacity: float | int = 0.125, rngs: nnx.Rngs):
        if not 0 < capacity <= 1:
            raise ValueError(f"capacity={capacity} must be in (0, 1]: it is the share of the tokens that take part")
        self.weight = GateParam(nnx.initializers.normal(features**-0.5)(rngs.params(), (features, 1)))
        self.bias = GateParam(jnp.zeros((1,)))
        self.threshold = Threshold(jnp.zeros(()))
        self.features, self.capacity = features, capacity

    def number(self, tokens: int) -> int | None:
        """How many of `tokens` tokens take part in every example; None when it depends on the input."""
        return None if self.deterministic else math.ceil(self.capacity * tokens)

    def __call__(self, x: Float[Array, "B T C"]) -> Decision:
        check_features(x, self.features, self)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
        logits = (x @ self.weight[...] + self.bias[...][None, None])[..., 0]
        number = self.number(x.shape[1])
        if number is not None:
            return Decision(top_k(logits, number), jax.nn.sigmoid(logits), "token")
        logits = logits - self.threshold[...]
        return Decision(threshold(logits), jax.nn.sigmoid(logits), "token")


class MixtureOfDepths(Wrapper):
    """Run `block` on the tokens that the gate keeps; the others pass unchanged.

    Mixture-of-Depths (Raposo et al. 2024, arXiv:2404.02258, eq. 1), x + r (block(x) - x) for the kept tokens, which
    alone are seen by one another. Deviations: the block has its shortcuts in it, so block(x) - x is the paper's f(x);
    and r is the gate's probability, not its raw logit, so it is positive and weighs a token near the threshold less.

    Both executions see the same tokens. With a gate that keeps a fixed number (`TokenGate` while training) these are
    gathered in both, since shapes are static: training is as cheap as the decision says. Else masked execution runs the
    block on all tokens with those not kept masked, and compact execution gathers them, in their order, up to a capacity
    (`execute.CAPACITIES`) that holds them all: nothing is dropped.

    MACs are an upper bound: each kept token counts 1/T of the block on all tokens, though the part that is quadratic in
    the number of tokens falls faster.

    Args:
        block: `block(x, mask)` with x (B, N, C) and mask (B, N), True for tokens that others may look at; gives (B, N,
            C). It may depend on the tokens' order (a causal mask), but not on their number and places: positions belong
            into the features.
        gate: gives a decision of shape (B, T), for example `TokenGate(features, capacity=0.125, rngs=rngs)`.

    Raises:
        ValueError: if shapes do not agree, or `block` takes no mask or is dynamic itself.
    """

    def __init__(self, block: Callable, gate: Callable):
        wrapper.refuse_nested("MixtureOfDepths", block)
        try:
            inspect.signature(block).bind(None, None)
        except TypeError as error:
            raise ValueError(
                "MixtureOfDepths calls block(x, mask), with mask (B, N) True for the tokens that others may look at; "
                f"{type(block).__name__} takes no such arguments: wrap it in a function that does"
            ) from error
        self.block, self.gate = block, gate

    def terms(self, call: Call) -> dict[str, Array]:
        """`selection`, the cross-entropy between what the gate chose and what its probability foretold.

        The auxiliary loss of the paper (section 3.5): it moves the top k above a logit of 0 and the others below, so
        that each token can decide alone when deployed.
        """
        losses = []
        for decision in call.own():
            chosen, p = lax.stop_gradient(decision.keep), jnp.clip(decision.probability, 1e-7, 1 - 1e-7)
            losses.append(-(chosen * jnp.log(p) + (1 - chosen) * jnp.log1p(-p)).mean())
        return {"selection": jnp.stack(losses).mean()} if losses else {}

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        tokens = x.shape[1]
        hint = f"use TokenGate({x.shape[-1]}, capacity=0.125, rngs=rngs), or FixedGate(keep, place='token')"
        decision = self.expect(self.gate(x), "token", EACH, x.shape[:2], hint)
        if self.tracing:
            seen = jax.ShapeDtypeStruct((1, tokens), bool)
            whole = cost.macs(views.still(self.block), wrapper.one_example(x), seen)
            self.account(decision, (whole / tokens,), (whole,))
        block = wrapper.ready(self.block, self.execution)
        keep = lax.stop_gradient(decision.keep)
        number = self.gate.number(tokens) if hasattr(self.gate, "number") else None
        if number is not None:
            return _gathered(block, x, keep, decision.probability, number)
        if self.execution == "masked":
            return _mixed(block, x, keep, decision.probability)
        return _compact(block, x, keep, decision.probability, self.strategy)


def _mixed(block: Callable, x: jax.Array, keep: jax.Array, weight: jax.Array) -> jax.Array:
    """All of x through the block, of which only the kept tokens are seen and changed."""
    kept = keep > 0.5
    y = block(x, kept)
    if y.shape != x.shape:
        raise ValueError(f"the block of MixtureOfDepths gives shape {y.shape} for {x.shape}; it must keep the shape")
    # A token left out that may look at no other can come out of attention as no number, also for the gradient of r.
    change = execute.finite(y.astype(x.dtype) - x, unless=kept[..., None])
    return jnp.where(kept[..., None], x + weight.astype(x.dtype)[..., None] * change, x)


def _gathered(block: Callable, x: jax.Array, keep: jax.Array, weight: jax.Array, number: int) -> jax.Array:
    """As `_mixed`, from `number` tokens of each example, among which are all that are kept, in their order."""
    # Of equals top_k takes the first: the kept in their order, then others, which the block must not look at.
    chosen = lax.top_k((keep > 0.5).astype(jnp.float32), number)[1]
    keep, weight = (jnp.take_along_axis(a, chosen, 1) for a in (keep, weight))
    y = _mixed(block, jnp.take_along_axis(x, chosen[..., None], 1), keep, weight)
    at = x.at[jnp.arange(x.shape[0])[:, None], chosen]
    return at.set(y, unique_indices=True, mode="promise_in_bounds")


def _compact(block: Callable, x: jax.Array, keep: jax.Array, weight: jax.Array, strategy: str) -> jax.Array:
    def several(x, keep, weight):
        """With the smallest capacity that holds what any example keeps."""
        number = (keep > 0.5).sum(1, dtype=jnp.int32).max()
        run = functools.partial(_gathered, block, x, keep, weight)
        return execute.smallest_bucket(number, x.shape[1], run, lambda: _mixed(block, x, keep, weight), x)

    def one_by_one():
        if x.shape[0] == 1:
            return several(x, keep, weight)

        def loop():
            return lax.map(lambda each: several(*(a[None] for a in each))[0], (x, keep, weight))

        # Where nearly all are kept, one launch is faster than as many as there are examples.
        nearly_all = (keep > 0.5).sum(dtype=jnp.int32) > execute.BREAK_EVEN_SAMPLES * keep.size
        return lax.cond(nearly_all, lambda: _mixed(block, x, keep, weight), loop)

    return execute.by_platform(strategy, one_by_one, lambda: several(x, keep, weight))
