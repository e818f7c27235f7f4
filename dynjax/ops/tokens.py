"""Mixture-of-Depths: the tokens that a block is for are gathered, and the block sees only these.

Letters: B examples, T tokens, C features, N tokens that are gathered.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Collection
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from dynjax.core import execute, wrapper
from dynjax.core.arguments import Tree, following, others
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


@runtime_checkable
class Numbers(Protocol):
    """A gate that may keep one number of tokens in every example, so that shapes are static."""

    def number(self, tokens: int, /) -> int | None: ...


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
        batched: as in `Skip`; it is called as `block` is, without the mask. Of what has the examples as its first axis,
            arrays (B, T, ...) are gathered as the tokens are.

    Raises:
        ValueError: if shapes do not agree, or `block` takes no mask or is dynamic itself.
    """

    def __init__(self, block: Callable, gate: Callable, *, batched: Collection[int | str] | None = None):
        wrapper.refuse_nested("MixtureOfDepths", block)
        try:
            inspect.signature(block).bind_partial(None, None)
        except TypeError as error:
            raise ValueError(
                "MixtureOfDepths calls block(x, mask), with mask (B, N) True for the tokens that others may look at; "
                f"{type(block).__name__} takes no such arguments: wrap it in a function that does"
            ) from error
        self.block, self.gate, self.batched = block, gate, batched

    @classmethod
    def around(cls, block: Callable, features: int, rngs: nnx.Rngs) -> "MixtureOfDepths":
        return cls(block, TokenGate(features, rngs=rngs))

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

    def __call__(self, x: Float[Array, "B T C"], *args: Any, **kwargs: Any) -> Float[Array, "B T C"]:
        tokens = x.shape[1]
        _, (block,), given = self.bind([_Masked(self.block)], ((x,), *args), kwargs)
        hint = f"use TokenGate({x.shape[-1]}, capacity=0.125, rngs=rngs), or FixedGate(keep, place='token')"
        decision = self.expect(self.gate(x), "token", EACH, x.shape[:2], hint)
        if self.tracing:
            seen = jax.ShapeDtypeStruct(x.shape[:2], bool)
            whole = wrapper.macs_per_example(block, following(given, (x, seen)))
            self.account(decision, (whole / tokens,), (whole,))
        run = _Tokens(wrapper.ready(block, self.execution), given)
        keep = lax.stop_gradient(decision.keep)
        number = self.gate.number(tokens) if isinstance(self.gate, Numbers) else None
        if number is not None:
            return run.gathered(x, keep, decision.probability, others(given), number)
        if self.execution == "masked":
            return run.mixed(x, keep, decision.probability, others(given))
        return run.compact(x, keep, decision.probability, others(given), self.strategy)


class _Masked(nnx.Module):
    """A block of tokens and a mask as one of both together."""

    def __init__(self, block: Callable):
        self.block = block

    def __call__(self, both: tuple[Array, Array], *args: Any, **kwargs: Any) -> Array:
        return self.block(*both, *args, **kwargs)


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """The block on tokens x (B, T, C), of which `keep` (B, T) are seen and changed, with weight (B, T)."""

    block: Callable
    given: Tree

    def mixed(self, x: jax.Array, keep: jax.Array, weight: jax.Array, others: tuple[jax.Array, ...]) -> jax.Array:
        """All of x through the block."""
        kept = keep > 0.5
        y = self.block(following(self.given, (x, kept), others))
        if y.shape != x.shape:
            raise ValueError(
                f"the block of MixtureOfDepths gives shape {y.shape} for {x.shape}; it must keep the shape"
            )
        # A token left out that may look at no other can come out of attention as no number, also for the gradient of r.
        change = execute.finite(y.astype(x.dtype) - x, unless=kept[..., None])
        return jnp.where(kept[..., None], x + weight.astype(x.dtype)[..., None] * change, x)

    def gathered(
        self, x: jax.Array, keep: jax.Array, weight: jax.Array, others: tuple[jax.Array, ...], number: int
    ) -> jax.Array:
        """As `mixed`, from `number` tokens of each example, among which are all that are kept, in their order."""
        # Of equals top_k takes the first: the kept in their order, then others, which the block must not look at.
        chosen = lax.top_k((keep > 0.5).astype(jnp.float32), number)[1]

        def taken(a: jax.Array) -> jax.Array:
            return jnp.take_along_axis(a, chosen.reshape(*chosen.shape, *(1,) * (a.ndim - 2)), 1)

        others = tuple(taken(each) if each.shape[:2] == x.shape[:2] else each for each in others)
        y = self.mixed(taken(x), taken(keep), taken(weight), others)
        at = x.at[jnp.arange(x.shape[0])[:, None], chosen]
        return at.set(y, unique_indices=True, mode="promise_in_bounds")

    def compact(
        self, x: jax.Array, keep: jax.Array, weight: jax.Array, others: tuple[jax.Array, ...], strategy: str
    ) -> jax.Array:
        def several(x, keep, weight, others):
            """With the smallest capacity that holds what any example keeps."""
            number = (keep > 0.5).sum(1, dtype=jnp.int32).max()
            run = functools.partial(self.gathered, x, keep, weight, others)
            whole = functools.partial(self.mixed, x, keep, weight, others)
            return execute.smallest_bucket(number, x.shape[1], run, whole, lambda: x)

        tree = x, keep, weight, others

        def one_by_one():
            if x.shape[0] == 1:
                return several(*tree)

            def loop():
                return lax.map(lambda each: several(*jax.tree.map(lambda a: a[None], each))[0], tree)

            # Where nearly all are kept, one launch is faster than as many as there are examples.
            nearly_all = (keep > 0.5).sum(dtype=jnp.int32) > execute.BREAK_EVEN_SAMPLES * keep.size
            return lax.cond(nearly_all, lambda: self.mixed(*tree), loop)

        return execute.by_platform(strategy, one_by_one, lambda: several(*tree))
