"""Kernels of the example: parity with the published definitions, both strategies, gradients, MACs, other dynamics.

Letters as in kernels.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import CHANNELS, Residual, image, make, still
from flax import nnx
from test_convolve import one_by_one
from test_ops_tiles import assert_same, three_ways

import dynjax as dj
from dynjax import cost
from dynjax.core.decision import MIXTURE
from dynjax.core.training import schedule
from dynjax.ops.kernels import CondConv, DynamicConv, HyperConv, ODConv, with_kernels

MIXTURES = (CondConv, DynamicConv, ODConv)
KINDS = {"condconv": CondConv, "dyconv": DynamicConv, "odconv": ODConv, "hyper": HyperConv}
# shape of x, features out, kernel size, options
CASES = {
    "plain": ((3, 6, 5, 4), 6, (3, 3), {}),
    "one example, odd sizes": ((1, 7, 3, 2), 3, (2, 3), {}),
    "strides, no bias": ((2, 7, 6, 4), 4, (3, 3), dict(strides=2, use_bias=False)),
    "groups, dilation": ((2, 6, 7, 4), 6, (3, 3), dict(feature_group_count=2, kernel_dilation=2)),
    "no padding": ((2, 6, 7, 4), 2, (3, 1), dict(padding="VALID")),
}


def build(kind, channels=4, outputs=6, size=(3, 3), **options):
    model = make(lambda rngs: kind(channels, outputs, size, **options, rngs=rngs))
    schedule(model, 1.0)
    return model


def both_strategies(conv, run):
    results = []
    for strategy in ("loop", "grouped"):
        way = nnx.view(conv, raise_if_not_found=False)
        way.strategy = strategy
        results.append(run(way))
    return results


def array(variable):
    return np.asarray(variable[...], np.float64)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def linear(layer, x):
    return x @ array(layer.kernel) + array(layer.bias)


def definition(conv, x):
    """Kernels (B, kh, kw, I, D) and biases (B, D) of the examples, by the papers' formulas."""
    mean = np.asarray(x, np.float64).mean((1, 2))
    kernel, biases = array(conv.kernel), array(conv.bias) if conv.bias is not None else np.zeros(conv.out_features)
    attention = conv.attention
    if isinstance(conv, HyperConv):
        code = np.maximum(linear(attention.out, mean), 0)
        left = (code @ array(conv.left.kernel)).reshape(len(x), -1, conv.rank)
        right = (code @ array(conv.right.kernel)).reshape(len(x), conv.rank, -1)
        return kernel + (left @ right).reshape(len(x), *kernel.shape), np.tile(biases, (len(x), 1))
    if isinstance(conv, CondConv):
        weights = sigmoid(linear(attention.out, mean))
        biases = weights @ np.broadcast_to(biases, (kernel.shape[0], conv.out_features))
        return np.einsum("bk,khwid->bhwid", weights, kernel), biases
    logits = linear(attention.out, np.maximum(linear(attention.hidden, mean), 0))
    if isinstance(conv, DynamicConv):
        weights = softmax(logits)
        biases = weights @ np.broadcast_to(biases, (kernel.shape[0], conv.out_features))
        return np.einsum("bk,khwid->bhwid", weights, kernel), biases
    inputs, outputs = conv.in_features, conv.out_features
    taps = kernel.shape[1] * kernel.shape[2]
    c, f, s, p = np.split(logits, np.cumsum([inputs, outputs, taps]), 1)
    c, f, s, p = sigmoid(c), sigmoid(f), sigmoid(s).reshape(len(x), *kernel.shape[1:3]), softmax(p)
    # Of an output channel only the input channels of its own group are in the kernel.
    groups = inputs // kernel.shape[3]
    own = np.repeat(c.reshape(len(x), groups, -1), outputs // groups, 1)
    return np.einsum("bk,bhw,bdi,bd,khwid->bhwid", p, s, own, f, kernel), np.tile(biases, (len(x), 1))


EVERYWHERE = ("plain", "groups, dilation")


@pytest.mark.parametrize(("kind", "name"), [(k, n) for n in CASES for k in KINDS if n in EVERYWHERE or k == "condconv"])
def test_each_is_the_convolution_with_the_kernels_of_its_paper(kind, name):
    shape, outputs, size, options = CASES[name]
    conv, x = build(KINDS[kind], shape[3], outputs, size, **options), image(*shape)
    kernels, biases = definition(conv, x)
    ways = dict(strides=1, kernel_dilation=1, feature_group_count=1, padding="SAME") | options
    expected = one_by_one(
        x,
        jnp.asarray(kernels, jnp.float32),
        ways["strides"],
        ways["padding"],
        ways["kernel_dilation"],
        ways["feature_group_count"],
    )
    expected = expected + biases[:, None, None]
    for y in jax.jit(lambda x: both_strategies(conv, lambda conv: conv(x)))(x):
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_those_of_a_convolution(kind):
    for options in ({}, dict(strides=2), dict(padding=2), dict(padding=((1, 0), (0, 2)), kernel_dilation=(1, 2))):
        shapes = [
            jax.eval_shape(lambda x, o=options, k=k: k(4, 6, (3, 3), **o, rngs=nnx.Rngs(0))(x), image(2, 9, 8, 4)).shape
            for k in (KINDS[kind], nnx.Conv)
        ]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_attention_and_all_kernels(kind):
    conv, x = build(KINDS[kind]), image(3, 5, 4, 4)
    graphdef, params, rest = nnx.split(conv, nnx.Param, ...)

    def run(params, x):
        def loss(way):
            definition, _, others = nnx.split(way, nnx.Param, ...)
            return jax.grad(lambda p, x: (nnx.merge(definition, p, others)(x) ** 3).sum(), (0, 1))(params, x)

        return both_strategies(nnx.merge(graphdef, params, rest), loss)

    loop, grouped = jax.jit(run)(params, x)
    for a, b in zip(jax.tree.leaves(loop), jax.tree.leaves(grouped), strict=True):
        assert np.any(a)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * float(jnp.abs(b).max()))
    if kind != "hyper":
        assert np.asarray(loop[0].kernel[...]).any((1, 2, 3, 4)).all()


def test_macs_worked_by_hand():
    x = jax.ShapeDtypeStruct((1, 8, 6, 4), jnp.float32)
    static = (3 * 8 - 2) * (3 * 6 - 2) * 4 * 6
    kernel = 9 * 4 * 6
    count = lambda kind, **o: cost.macs(build(kind, **o), x)  # noqa: E731
    assert count(CondConv, kernels=3) == static + 3 * (kernel + 6) + 4 * 3
    assert count(DynamicConv, kernels=5, reduction=2) == static + 5 * (kernel + 6) + 4 * 2 + 2 * 5
    assert count(ODConv, kernels=2) == static + 2 * kernel + 16 * (4 + 4 + 6 + 9 + 2)
    assert count(HyperConv, rank=2, hidden=5) == static + kernel * 2 + 5 * (4 + 9 * 4 * 2 + 2 * 6)


@pytest.mark.parametrize("kind", MIXTURES)
def test_attention_is_in_the_trace_and_costs_nothing(kind):
    conv, x = build(kind, kernels=3), image(2, 5, 4, 4)
    y, trace, plain = jax.jit(lambda x: (*dj.traced(conv)(x), conv(x)))(x)
    np.testing.assert_allclose(y, plain, rtol=1e-5, atol=1e-5)
    (decision,) = trace.decisions.values()
    assert decision.rule == MIXTURE
    np.testing.assert_array_equal(decision.keep, np.ones((2, 3)))
    np.testing.assert_allclose(decision.probability, conv.attention(x.mean((1, 2)))[-1], rtol=1e-5)
    assert trace.full_macs == trace.static_macs == cost.macs(conv, x) / 2
    np.testing.assert_allclose(trace.macs(), trace.full_macs)
    assert all(np.isfinite(value) for value in dj.budget.statistics(trace).values())
    assert dj.budget_loss(trace, 0.5) == pytest.approx(0.25)


@pytest.mark.parametrize("kind", [DynamicConv, ODConv])
def test_a_high_temperature_mixes_evenly(kind):
    conv, x = build(kind), image(2, 4, 4, 4)
    conv.attention.temperature[...] = jnp.float32(1e6)
    trace = jax.jit(lambda x: dj.traced(conv)(x)[1])(x)
    (decision,) = trace.decisions.values()
    np.testing.assert_allclose(decision.probability, 1 / 4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_random_attention_is_a_function_of_the_example_when_evaluated(kind):
    conv, x = build(KINDS[kind], random=True), image(4, 5, 4, 4)
    first, second = nnx.jit(lambda conv, x: (conv(x), conv(x)))(conv, x)
    assert not np.allclose(first, second)
    y, again, one = jax.jit(lambda x: (still(conv)(x), still(conv)(x), still(conv)(x[2:3])))(x)
    np.testing.assert_array_equal(again, y)
    np.testing.assert_allclose(one, y[2:3], rtol=1e-4, atol=1e-5)


def test_half_precision_stays_half():
    for kind in KINDS.values():
        graphdef, state = nnx.split(build(kind))
        half = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state))
        assert (
            jax.eval_shape(lambda x, half=half: half(x), image(2, 5, 4, 4).astype(jnp.bfloat16)).dtype == jnp.bfloat16
        )


# Conditions


def test_a_condition_makes_the_kernel_with_the_input_or_without():
    x, condition = image(3, 5, 4, 4), image(3, 2, seed=1)
    both = build(HyperConv, condition=2)
    alone = build(HyperConv, condition=2, from_input=False)
    assert alone.attention.features == 2

    @jax.jit
    def run(x, condition):
        slopes = jax.grad(lambda condition: (both(x, condition) ** 2).sum())(condition)
        others = both(x, condition), both(x, jnp.roll(condition, 1, 0))
        return slopes, others, [alone(scale * x, condition) for scale in (0.0, 1.0, 2.0)]

    slopes, (own, other), (none, once, twice) = run(x, condition)
    assert slopes.any(1).all() and (own != other).any()
    # From the condition alone the kernel does not change with x, so that the layer is linear.
    np.testing.assert_allclose(twice - once, once - none, atol=1e-4)


# With other dynamics


class Mixed(nnx.Module):
    """A residual block with a kernel of the example."""

    def __init__(self, rngs):
        self.conv = CondConv(CHANNELS, CHANNELS, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(CHANNELS, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(x + self.norm(self.conv(x)))


def test_skip_around_a_kernel_of_the_example():
    block, x = make(Mixed), image(5, 6, 7, CHANNELS)
    run = three_ways(lambda x, keep: (dj.Skip(block, dj.FixedGate(keep)), x), x, jnp.zeros(5))
    for keep in (np.zeros(5), np.ones(5), np.asarray([0, 1, 0, 0, 1])):
        masked, *compact = run(x, jnp.asarray(keep, jnp.float32))
        np.testing.assert_array_equal(masked[keep == 0], x[keep == 0])
        assert_same(masked, *compact)


def test_skip_and_attention_are_both_traced():
    block, x = make(Mixed), image(3, 6, 7, CHANNELS)
    model = dj.Skip(block, dj.FixedGate([1, 0, 1]))
    whole = cost.macs(still(block), x) / 3
    for execution in ("masked", "compact"):
        _, trace = jax.jit(lambda x, way=execution: dj.traced(still(model, way))(x))(x)
        np.testing.assert_allclose(trace.macs(), [whole, 0, whole])
        # What is attended to inside a loop over the examples kept does not leave it.
        assert ("block/conv" in trace.decisions) == (execution == "masked")


def test_tiles_around_a_kernel_of_the_example_are_refused():
    model = dj.Tiles(make(Mixed), dj.FixedGate(np.ones((1, 2, 2)), size=4))
    for execution in ("masked", "compact"):
        with pytest.raises(ValueError, match="Mixed cannot be run on tiles: it mixes the whole map"):
            jax.eval_shape(lambda x, way=execution: still(model, way)(x), image(1, 8, 8, CHANNELS))


# From a static model


@pytest.mark.parametrize("kind", ["condconv", "odconv", "hyper"])  # test_dynamicconvnet.py has the other one
def test_a_model_starts_from_its_static_kernels(kind):
    model, x = make(Residual), image(2, 6, 5, CHANNELS)
    model.conv2 = make(lambda rngs: nnx.Conv(CHANNELS, CHANNELS, (3, 3), feature_group_count=2, rngs=rngs))
    # Compiled at once, rather than an initialiser after the other; of keys given inside XLA would fold all numbers.
    dynamic = nnx.jit(lambda model, rngs: with_kernels(model, {"conv2": kind}, rngs=rngs))(model, nnx.Rngs(0))
    assert isinstance(model.conv2, nnx.Conv) and isinstance(dynamic.conv1, nnx.Conv)
    assert isinstance(dynamic.conv2, KINDS[kind])
    if kind not in ("hyper", "condconv"):
        # None of the few hidden units is dead.
        dynamic.conv2.attention.hidden.bias[...] += 5

    @nnx.jit
    def run(model, dynamic, x):
        grads = nnx.grad(lambda dynamic: (still(dynamic)(x) ** 2).mean())(dynamic)
        return still(model)(x), still(dynamic)(x), grads

    expected, y, grads = run(model, dynamic, x)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))
    if kind != "hyper":
        kernels = np.asarray(dynamic.conv2.kernel[...])
        assert kernels.shape[0] == 4 and all((kernels[0] != other).any() for other in kernels[1:])
    # Attention starts even, yet learns at once, since the kernels differ; what is generated starts at 0.
    learns = grads.conv2.right.kernel if kind == "hyper" else grads.conv2.attention.out.kernel
    assert np.asarray(learns[...]).any()


def test_what_cannot_be_given_kernels_is_named():
    model, rngs = make(Residual), nnx.Rngs(0)
    with pytest.raises(ValueError, match="kind 'involution' must be one of condconv"):
        with_kernels(model, {"conv1": "involution"}, rngs=rngs)
    with pytest.raises(ValueError, match="BatchNorm cannot be given kernels"):
        with_kernels(model, {"norm1": "condconv"}, rngs=rngs)
    with pytest.raises(ValueError, match="no module's path matches 'conv7'"):
        with_kernels(model, {"conv7": "condconv"}, rngs=rngs)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="in_features=4 and out_features=5 must be multiples of feature_group_count=2"):
        build(CondConv, 4, 5, feature_group_count=2)
    with pytest.raises(ValueError, match="kernels=0 must be at least 1"):
        build(DynamicConv, kernels=0)
    with pytest.raises(ValueError, match="reduction=8 has no meaning for CondConv"):
        build(CondConv, reduction=8)
    with pytest.raises(ValueError, match="from_input=False needs condition="):
        build(HyperConv, from_input=False)
    x = image(2, 4, 4, 4)
    with pytest.raises(ValueError, match="made with condition=3 and none is given"):
        build(HyperConv, condition=3)(x)
    with pytest.raises(ValueError, match=r"condition has shape \(2, 4\); it must be \(2, 3\)"):
        build(HyperConv, condition=3)(x, x.mean((1, 2)))
    with pytest.raises(ValueError, match="made for 4 features and is given 3"):
        build(CondConv)(image(1, 4, 4, 3))
