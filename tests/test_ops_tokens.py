"""Mixture-of-Depths: the block sees the kept tokens alone, in every execution, and nothing else is run."""

import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import Pointwise, at, call, image, make, still
from flax import nnx
from test_ops_tiles import assert_same, three_ways

import dynjax as dj
from dynjax import cost, execute
from dynjax.core import training
from dynjax.core.decision import Decision
from dynjax.core.trace import Trace

FEATURES = 4


class Attention(nnx.Module):
    """Attention to the tokens of `mask` up to each token, then a layer for each token, both with shortcuts."""

    def __init__(self, rngs):
        self.queries, self.keys, self.values, self.out = (
            nnx.Linear(FEATURES, FEATURES, use_bias=False, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x, mask):
        scores = jnp.einsum("bqc,bkc->bqk", self.queries(x), self.keys(x))
        seen = mask[:, None] & jnp.tril(jnp.ones(scores.shape[1:], bool))[None]
        x = x + jnp.einsum("bqk,bkc->bqc", nnx.softmax(jnp.where(seen, scores, -jnp.inf)), self.values(x))
        return x + jnp.tanh(self.out(x))


class Weighted(nnx.Module):
    """A gate of given weights, of which 0 is left out."""

    def __init__(self, weights):
        self.weights = nnx.Variable(weights)

    def __call__(self, x):
        weights = self.weights[...]
        return Decision((weights > 0).astype(jnp.float32), weights, "token")


def depths(rngs, capacity=0.4):
    return dj.MixtureOfDepths(Attention(rngs), dj.TokenGate(FEATURES, capacity=capacity, rngs=rngs))


def alone(block, x, weights):
    """Equation 1 in NumPy, each example's kept tokens by themselves."""
    queries, keys, values, last = (
        np.asarray(layer.kernel[...], np.float64) for layer in (block.queries, block.keys, block.values, block.out)
    )
    out = np.array(x, np.float64)
    for example, row in enumerate(weights):
        (kept,) = np.nonzero(row)
        x = out[example, kept]
        attention = np.tril(np.exp(x @ queries @ (x @ keys).T))
        y = x + attention / attention.sum(1, keepdims=True) @ (x @ values)
        out[example, kept] += row[kept, None] * (y + np.tanh(y @ last) - x)
    return out


def patterns(examples, tokens):
    random = np.random.default_rng(0)
    shape = (examples, tokens)
    last = np.arange(tokens)[None] == tokens - 1
    uneven = random.random(shape) < np.linspace(0, 1, examples)[:, None]
    opens = [np.zeros(shape), np.ones(shape), np.broadcast_to(last, shape), uneven, random.random(shape) < 0.5]
    return [(each * random.uniform(0.1, 1, shape)).astype(np.float32) for each in opens]


@pytest.mark.parametrize("shape", [(5, 7), (1, 9)], ids=str)
def test_kept_tokens_see_each_other_alone(shape):
    block, x = make(Attention), image(*shape, FEATURES)
    run = three_ways(lambda x, weights: (dj.MixtureOfDepths(block, Weighted(weights)), x), x, jnp.zeros(shape))
    for weights in patterns(*shape):
        masked, *compact = run(x, jnp.asarray(weights))
        np.testing.assert_allclose(masked, alone(block, x, weights), rtol=1e-4, atol=1e-5)
        assert_same(masked, *compact)
        np.testing.assert_array_equal(np.asarray(masked)[weights == 0], np.asarray(x)[weights == 0])


def test_training_gathers_the_top_k_of_each_example():
    model, x = make(depths), image(3, 7, FEATURES)
    out, trace = jax.jit(lambda x: dj.traced(model)(x))(x)
    gate = model.gate
    unit = np.asarray(x) / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
    logits = (unit @ np.asarray(gate.weight[...]))[..., 0] + float(gate.bias[0])
    weights = (logits >= np.sort(logits)[:, [-3]]) / (1 + np.exp(-logits))
    assert math.ceil(0.4 * 7) == 3 and ((weights > 0).sum(1) == 3).all()
    np.testing.assert_allclose(trace.decisions[""].keep, weights > 0)
    np.testing.assert_allclose(out, alone(model.block, x, weights), rtol=1e-4, atol=1e-5)
    # What is run while training is the router and the block on three tokens.
    three = cost.macs(model.block, x[:, :3], jnp.ones((3, 3), bool))
    assert cost.macs(model, x) == 3 * 7 * FEATURES + three < cost.macs(still(model), x)


def test_compact_execution_gathers_no_more_than_the_capacity_that_holds_the_kept():
    block, sizes = make(Attention), []

    def counted(x, mask):
        jax.experimental.io_callback(lambda: sizes.append(x.shape[1]), None)
        return block(x, mask)

    def compact(x, weights):
        return still(dj.MixtureOfDepths(counted, Weighted(weights)), "compact", strategy="loop")(x)

    x, weights = image(6, 8, FEATURES), np.zeros((6, 8), np.float32)
    for example, number in enumerate([0, 1, 2, 4, 5, 8]):
        weights[example, :number] = 0.5
    with mock.patch.object(execute, "CAPACITIES", (1 / 8, 1 / 2)):
        jax.block_until_ready(jax.jit(compact)(x, jnp.asarray(weights)))
    jax.effects_barrier()
    assert sorted(sizes) == [1, 4, 4, 8, 8]


def test_macs_are_those_of_all_tokens_in_proportion():
    block, x, weights = make(Attention), image(5, 7, FEATURES), patterns(5, 7)[3]
    trace = dj.traced(still(dj.MixtureOfDepths(block, Weighted(jnp.asarray(weights)))))(x)[1]
    whole = cost.macs(block, x[:1], jnp.ones((1, 7), bool))
    np.testing.assert_allclose(trace.macs(), (weights > 0).sum(1) * whole / 7, rtol=1e-6)
    assert trace.full_macs == whole and trace.static_macs == 0
    # Never less than what is run: attention among fewer tokens costs less than its share.
    for number in range(1, 7):
        assert cost.macs(block, x[:1, :number], jnp.ones((1, number), bool)) <= number * whole / 7


def test_the_threshold_moves_the_number_of_tokens():
    model, x = make(depths), image(3, 7, FEATURES)
    run = jax.jit(lambda t: (dj.traced(at(t, still(model)))(x), at(t, still(model, "compact"))(x)))
    spent = []
    for threshold in (-30.0, -0.3, 0.0, 0.3, 30.0):
        (masked, trace), compact = run(threshold)
        assert_same(masked, compact)
        spent.append(float(trace.macs().mean()))
    assert spent == sorted(spent, reverse=True) and len(set(spent)) > 3
    np.testing.assert_allclose(spent[0], trace.full_macs, rtol=1e-6)
    np.testing.assert_allclose(spent[-1], trace.static_macs, rtol=1e-6)
    np.testing.assert_array_equal(masked, x)


def test_gradients_reach_router_and_block():
    def loss(model, x):
        return (model(x) ** 2).sum()

    grads, slope = nnx.jit(nnx.grad(loss, argnums=(0, 1)))(make(depths), image(3, 7, FEATURES))
    leaves = [np.asarray(leaf) for leaf in (*jax.tree.leaves(grads), slope)]
    assert len(leaves) == 2 + 4 + 1
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in leaves)


def selection(model, trace):
    return training.terms(model, call(trace)).get("selection")


def test_the_selection_loss_is_the_cross_entropy_of_what_was_chosen():
    keep, p = jnp.array([[1.0, 0, 0]]), jnp.array([[0.9, 0.2, 0.5]])
    decisions = {"": Decision(keep, p, "token"), "other": Decision(keep, p, "example")}
    expected = -(np.log(0.9) + np.log(0.8) + np.log(0.5)) / 3
    model, x = make(depths), image(2, 7, FEATURES)
    np.testing.assert_allclose(selection(model, Trace(decisions, 0.0, 1.0, 1)), expected, rtol=1e-6)
    assert selection(model, Trace({}, 0.0, 1.0, 1)) is None

    def loss(model, x):
        trace = dj.traced(model)(x)[1]
        return selection(model, trace), trace

    # Its slope takes the logits of the chosen up and the others down.
    grads, trace = nnx.jit(nnx.grad(loss, has_aux=True))(model, x)
    decision = trace.decisions[""]
    np.testing.assert_allclose(grads.gate.bias[...], [(decision.probability - decision.keep).mean()], rtol=1e-5)


def test_errors():
    x, block = image(2, 5, FEATURES), make(Attention)
    with pytest.raises(ValueError, match=r"calls block\(x, mask\).*Pointwise takes no such arguments"):
        dj.MixtureOfDepths(make(Pointwise), Weighted(x))
    hint = r"MixtureOfDepths needs a decision per token \(rule: each\) of shape \(2, 5\).*TokenGate\(4,"
    with pytest.raises(ValueError, match=hint):
        dj.MixtureOfDepths(block, dj.FixedGate(np.ones((1, 4))))(x)
    with pytest.raises(ValueError, match=r"gives shape \(2, 5, 2\) for \(2, 5, 4\); it must keep the shape"):
        dj.MixtureOfDepths(lambda x, mask: x[..., :2], dj.FixedGate(np.ones((1, 5)), place="token"))(x)
    with pytest.raises(ValueError, match=r"capacity=0 must be in \(0, 1\]"):
        make(lambda rngs: dj.TokenGate(FEATURES, capacity=0, rngs=rngs))
    with pytest.raises(ValueError, match=r"features=4, but its input has shape \(2, 5, 3\): give it features=3"):
        make(lambda rngs: dj.TokenGate(FEATURES, rngs=rngs))(x[..., :3])
