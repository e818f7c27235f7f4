"""Mixtures of experts: every token runs a few of many networks.

Letters: B examples, T tokens, N all tokens of a batch, C features, H hidden features, E experts, k experts of a token.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import export, lax
from jaxtyping import Array, Bool, Float, Int

from dynjax.core import cost, execute, gates
from dynjax.core.arguments import Size
from dynjax.core.decision import ONE, Decision, Place, Rule, some
from dynjax.core.devices import spread_over
from dynjax.core.gates import Gate, GateParam, Threshold
from dynjax.core.training import Call
from dynjax.core.wrapper import Wrapper

LARGEST_BLOCK = 128
"""Tokens that the loop computes at once."""


class RouterLoss(nnx.Variable):
    """The z-loss of a router in its last training call: the mean over tokens of (log sum_e exp logit_e)^2, which keeps
    logits small (Zoph et al. 2022, arXiv:2202.08906, eq. 5)."""


# Routing


def route(
    logits: Float[Array, "... E"],
    top: int,
    least: int,
    threshold: Float[Array, ""] | float = 0.0,
    key: jax.Array | None = None,
) -> Float[Array, "... E"]:
    """1 for the experts that a token takes: the `least` largest logits, and of the next up to `top` those not far off.

    Not far off is logit - largest logit + gates.OPEN >= threshold; with `key` it is drawn with that logit. The gradient
    is straight-through, that of the sigmoid, for the optional experts, and none for the others.
    """
    order = lax.top_k(lax.stop_gradient(logits), top)[1]
    taken = jax.nn.one_hot(order, logits.shape[-1], dtype=logits.dtype)
    sure, optional = taken[..., :least, :].sum(-2), taken[..., least:, :].sum(-2)
    near = logits - logits.max(-1, keepdims=True) + gates.OPEN - threshold
    return sure + optional * (gates.threshold(near) if key is None else gates.gumbel_sigmoid(near, key))


def router_z_loss(model: nnx.Module) -> Float[Array, ""]:
    """Mean of the z-losses of all routers of `model` in their last training call; 0 if there are none.

    Call the model first, then add this to the loss within the same gradient. The routers leave it in the model, as
    BatchNorm leaves its statistics: a decision has probabilities, of which the z-loss cannot be computed.
    """
    found = [each[...] for _, each in nnx.iter_graph(model) if isinstance(each, RouterLoss)]
    return jnp.stack(found).mean() if found else jnp.zeros(())


class Router(Gate):
    """Experts of every token: the `top` largest of E linear logits, `probability` their softmax over all E.

    `x` (B, T, features) gives a decision of shape (B, T, E), `x` (B, features) one of shape (B, E). Shazeer et al. 2017
    (arXiv:1701.06538, eq. 3 and 5) and, with `top` = 1, Switch (Fedus et al. 2022, arXiv:2101.03961, eq. 1). Deviation:
    no noise on the logits. With `least` below `top` the number of experts depends on the token: those beyond the first
    `least` are taken where their logit is near the largest, which the threshold moves. Otherwise it moves nothing.
    """

    def __init__(self, features: int, experts: int, *, top: int = 2, least: int | None = None, rngs: nnx.Rngs):
        self.top, self.least = _ascending(experts, top, least)
        init = nnx.initializers.variance_scaling(0.1, "fan_in", "truncated_normal")  # small, as in Switch
        self.kernel = GateParam(init(rngs.params(), (features, experts)))
        self.threshold = Threshold(jnp.zeros(()))
        self.loss = RouterLoss(jnp.zeros(()))
        self.rngs = nnx.Rngs(gate=rngs.params())

    def terms(self, call: Call) -> dict[str, Array]:
        """`router_z`, the z-loss of the last training call."""
        return {"router_z": self.loss[...]}

    def __call__(self, x: Float[Array, "B *T C"]) -> Decision:
        gates.check_features(x, self.kernel.shape[0], self)
        logits = x.astype(jnp.float32) @ self.kernel[...].astype(jnp.float32)
        key = None
        if not self.deterministic:
            self.loss[...] = jnp.square(jax.nn.logsumexp(logits, axis=-1)).mean()
            key = self.rngs.gate() if self.least < self.top else None
        keep = route(logits, self.top, self.least, self.threshold[...], key)
        return Decision(keep, jax.nn.softmax(logits), *_about(x, self.top))


class RandomRouter(Gate):
    """Experts of every token at random: the control of a learned `Router`, whose shapes and threshold it has.

    All experts are as probable. When deterministic the choice is a function of the token's content, so that every
    execution agrees.
    """

    def __init__(self, experts: int, *, top: int = 2, least: int | None = None, rngs: nnx.Rngs):
        self.top, self.least = _ascending(experts, top, least)
        self.experts = experts
        self.threshold = Threshold(jnp.zeros(()))
        self.rngs = nnx.Rngs(gate=rngs.params())

    def __call__(self, x: Float[Array, "B *T C"]) -> Decision:
        shape = (*x.shape[:-1], self.experts)
        if self.deterministic:
            mix = jax.random.normal(jax.random.key(0), (x.shape[-1], self.experts))
            uniform = gates.content_chance(x.astype(jnp.float32) @ mix, turns=7)
        else:
            uniform = jax.random.uniform(self.rngs.gate(), shape)
        keep = route(gates.logistic(uniform), self.top, self.least, self.threshold[...])
        return Decision(keep, jnp.full(shape, 1 / self.experts), *_about(x, self.top))


def _ascending(experts: int, top: int, least: int | None) -> tuple[int, int]:
    least = top if least is None else least
    if not 1 <= least <= top <= experts:
        raise ValueError(f"least={least}, top={top} and experts={experts} must ascend from 1")
    return top, least


def _about(x: jax.Array, top: int) -> tuple[Place, Rule]:
    """The place and rule of a router's decision."""
    return "token" if x.ndim == 3 else "example", ONE if top == 1 else some(top)


# Experts


class Experts(Wrapper):
    """A mixture of MLPs: y = sum_e g_e (act(x up_e + b_e) down_e + c_e) over the experts that the token takes.

    g is the probability of the experts taken, divided by its sum where a token can take several: the softmax over the
    top logits (Shazeer et al. 2017, arXiv:1701.06538, eq. 2 to 5), and for one the router's probability itself (Switch,
    Fedus et al. 2022, arXiv:2101.03961, eq. 2). No token is dropped: there is no capacity. Masked execution runs all
    experts on all tokens; compact execution gathers the tokens expert by expert, and multiplies blocks of them ("loop")
    or all of them in one grouped product ("buckets", `ragged_dot`, which a CPU multiplies by every expert). With
    "buckets" compact execution can train too.

    Train with `budget.load_balance(trace)` and `router_z_loss(model)`, with small weights.

    Args:
        features: C of the tokens, (B, T, C), or of the examples, (B, C).
        hidden: H of every expert.
        experts: E.
        top: experts of a token, if there is no `gate`.
        gate: gives a decision of shape (B, T, E) or (B, E) about some of the experts, or one;
            `Router(features, experts, top=top, rngs=rngs)` if left out.
        activation: a function of the hidden features.

    Raises:
        ValueError: if shapes do not agree.
    """

    by_hand = "it makes its own layers: lambda block, features, rngs: dj.Experts(features, hidden, experts, rngs=rngs)"

    def __init__(
        self,
        features: int,
        hidden: int,
        experts: int = 8,
        top: int = 2,
        gate: Callable | None = None,
        *,
        activation: Callable = nnx.gelu,
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.lecun_normal(batch_axis=0)
        self.up = nnx.Param(init(rngs.params(), (experts, features, hidden)))
        self.up_bias = nnx.Param(jnp.zeros((experts, hidden)))
        self.down = nnx.Param(init(rngs.params(), (experts, hidden, features)))
        self.down_bias = nnx.Param(jnp.zeros((experts, features)))
        self.gate = Router(features, experts, top=top, rngs=rngs) if gate is None else gate
        self.experts, self.activation = experts, activation

    def __call__(self, x: Float[Array, "B *T C"]) -> Float[Array, "B *T C"]:
        if x.ndim not in (2, 3) or x.shape[-1] != self.up.shape[1]:
            raise ValueError(f"Experts needs (B, T, {self.up.shape[1]}) or (B, {self.up.shape[1]}), not {x.shape}")
        place: Place = "example" if x.ndim == 2 else "token"
        hint = f"use Router({x.shape[-1]}, {self.experts}, rngs=rngs)"
        several, shape = some(self.experts), (*x.shape[:-1], self.experts)
        decision = self.expect(self.gate(x), place, (several, ONE), shape, hint)
        if self.tracing:
            token = jax.ShapeDtypeStruct((1, x.shape[-1]), x.dtype)
            unit = cost.macs(lambda token: self._expert(token, 0), token)
            tokens = 1 if x.ndim == 2 else x.shape[1]
            self.account(decision, (unit,) * self.experts, (unit * tokens,) * self.experts)
        most = decision.rule.most or self.experts
        weight = decision.keep * decision.probability
        if most > 1:
            total = weight.sum(-1, keepdims=True)
            weight = weight / jnp.where(total > 0, total, 1)
        flat, keep, weight = (a.reshape(-1, a.shape[-1]) for a in (x, decision.keep, weight))
        y = self._masked(flat, weight) if self.execution == "masked" else self._compact(flat, keep, weight, most)
        return y.reshape(x.shape)

    def _expert(self, tokens: Float[Array, "n C"], expert: Int[Array, ""] | int) -> Float[Array, "n C"]:
        """One expert on some tokens."""
        up, up_bias, down, down_bias = (
            lax.dynamic_index_in_dim(p[...], expert, keepdims=False)
            for p in (self.up, self.up_bias, self.down, self.down_bias)
        )
        hidden = self.activation(tokens @ up + up_bias[None])
        return hidden @ down + down_bias[None]

    def _masked(self, x: Float[Array, "N C"], weight: Float[Array, "N E"]) -> Float[Array, "N C"]:
        hidden = self.activation(jnp.einsum("nc,ech->enh", x, self.up[...]) + self.up_bias[...][:, None])
        y = jnp.einsum("enh,ehc->enc", hidden, self.down[...]) + self.down_bias[...][:, None]
        return execute.weighted(weight.T, y).sum(0)

    def _compact(self, x, keep, weight, most):
        chosen, taken, place, sizes = places(keep, most)
        rows = chosen.size

        def loop():
            share = 16 if export.is_symbolic_dim(rows) else rows // self.experts
            block = min(LARGEST_BLOCK, max(8, 1 << share.bit_length()))
            # A block may reach past its expert's last token. What it writes there the next expert writes anew.
            return self._blocks(gathered(x, place, rows + block), sizes, block)

        def buckets():
            tokens = gathered(x, place, rows)
            owner = jnp.repeat(jnp.arange(self.experts), sizes, total_repeat_length=rows)
            hidden = lax.ragged_dot(tokens, self.up[...], sizes) + self.up_bias[...][owner]
            return lax.ragged_dot(self.activation(hidden), self.down[...], sizes) + self.down_bias[...][owner]

        y = execute.by_platform(self.strategy, loop, buckets).at[place].get(mode="clip")
        weight = jnp.where(taken, jnp.take_along_axis(weight, chosen, 1), 0)
        return jnp.where(taken[..., None], y * weight[..., None].astype(y.dtype), 0).sum(1)

    def _blocks(self, tokens: Float[Array, "n C"], sizes: Int[Array, " E"], block: int) -> Float[Array, "n C"]:
        """Every expert on its own rows of `tokens`, `block` rows at a time; as many blocks as are needed."""
        start, blocks = jnp.cumsum(sizes) - sizes, -(-sizes // block)
        last = jnp.cumsum(blocks)

        def body(i, out):
            expert = (last <= i).sum(dtype=jnp.int32)
            at = start[expert] + (i - (last[expert] - blocks[expert])) * block
            y = self._expert(lax.dynamic_slice_in_dim(tokens, at, block), expert)
            return lax.dynamic_update_slice_in_dim(out, y, at, 0)

        spec = execute.shape_of(lambda tokens: self._expert(tokens, 0), tokens)
        return lax.fori_loop(0, last[-1], body, spread_over(jnp.zeros(spec.shape, spec.dtype), over=(tokens, sizes)))


def places(
    keep: Float[Array, "N E"], most: int
) -> tuple[Int[Array, "N k"], Bool[Array, "N k"], Int[Array, "N k"], Int[Array, " E"]]:
    """Where the pairs (token, expert) that are kept lie when they are ordered by expert, then by token.

    For each token `most` experts, which of them it takes, their places (N * most where it does not), and for each
    expert the number of its tokens.
    """
    kept = keep > 0.5
    sizes = kept.sum(0, dtype=jnp.int32)
    place = (jnp.cumsum(sizes) - sizes)[None] + jnp.cumsum(kept, axis=0, dtype=jnp.int32) - 1
    chosen = lax.top_k(kept.astype(jnp.float32), most)[1]
    taken = jnp.take_along_axis(kept, chosen, 1)
    return chosen, taken, jnp.where(taken, jnp.take_along_axis(place, chosen, 1), chosen.size), sizes


def gathered(x: Float[Array, "N C"], place: Int[Array, "N k"], rows: Size) -> Float[Array, "rows C"]:
    """The tokens in their places; in places that nobody has, any token."""
    # Numbers are scattered and rows are gathered: on a CPU a scatter of rows is slower.
    token = jnp.broadcast_to(jnp.arange(x.shape[0], dtype=jnp.int32)[:, None], place.shape)
    return x[jnp.zeros(rows, jnp.int32).at[place.reshape(-1)].set(token.reshape(-1), mode="drop")]
