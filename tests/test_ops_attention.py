"""Attention over kernels: its heads against their formulas, temperature, and weights drawn at random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import image, make, still
from flax import nnx

from dynjax.ops.attention import Attention, Temperature

HEADS = [(3, "sigmoid"), (4, "softmax"), (2, "relu")]


def attention(**options):
    model = make(lambda rngs: Attention(5, HEADS, **options, rngs=rngs))
    model.temperature[...] = jnp.float32(2.0)
    return model


def test_heads_are_their_formulas():
    model, x = attention(hidden=6), np.asarray(image(7, 5), np.float64)
    (first, bias), (second, shift) = (
        [np.asarray(v[...]) for v in (layer.kernel, layer.bias)] for layer in (model.hidden, model.out)
    )
    logits = np.maximum(x @ first + bias, 0) @ second + shift
    exp = np.exp(logits[:, 3:7] / 2)
    sigmoid, softmax, relu = model(image(7, 5))
    np.testing.assert_allclose(sigmoid, 1 / (1 + np.exp(-logits[:, :3])), rtol=1e-5)
    np.testing.assert_allclose(softmax, exp / exp.sum(1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(relu, np.maximum(logits[:, 7:], 0), rtol=1e-5, atol=1e-6)


def test_without_a_hidden_layer_heads_are_linear():
    model = attention()
    sigmoid, _, _ = model(image(2, 5))
    logits = image(2, 5) @ model.out.kernel[...][:, :3] + model.out.bias[...][None, :3]
    np.testing.assert_allclose(sigmoid, jax.nn.sigmoid(logits), rtol=1e-5)


def test_attention_is_computed_in_single_precision():
    graphdef, state = nnx.split(attention(hidden=6))
    half = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state))
    assert all(weights.dtype == jnp.float32 for weights in half(image(2, 5).astype(jnp.bfloat16)))


@pytest.mark.parametrize(("progress", "expected"), [(0.0, 30), (0.05, 15.5), (0.1, 1), (0.7, 1)])
def test_the_temperature_falls_in_a_line_and_stays_at_one(progress, expected):
    model = attention()
    model.schedule(progress)
    assert model.temperature[...] == pytest.approx(expected)
    graphdef, state = nnx.split(attention())

    @jax.jit
    def annealed(state, progress):
        model = nnx.merge(graphdef, state, copy=True)
        model.schedule(progress)
        return model.temperature[...]

    assert annealed(state, progress) == pytest.approx(expected)


def test_the_temperature_starts_at_one_and_is_set_under_jit_without_compiling_anew():
    model = Attention(5, HEADS, rngs=nnx.Rngs(0))
    assert model.temperature[...] == 1
    graphdef, state = nnx.split(nnx.List([model, Attention(5, HEADS[:1], rngs=nnx.Rngs(1))]))
    assert len(jax.tree.leaves(nnx.state(nnx.merge(graphdef, state), Temperature))) == 1
    compiled = 0

    @jax.jit
    def run(state, value, x):
        nonlocal compiled
        compiled += 1
        models = nnx.merge(graphdef, state)
        models[0].temperature[...] = value
        return models[0](x)[1]

    cold, hot = (run(state, jnp.float32(value), image(3, 5)) for value in (0.1, 1e6))
    assert compiled == 1
    np.testing.assert_allclose(hot, 1 / 4, rtol=1e-4)
    assert (cold.max(1) > 0.9).any()


def test_random_weights_are_drawn_and_when_evaluated_depend_on_the_example_alone():
    model = attention(random=True)
    assert not jax.tree.leaves(nnx.state(model, nnx.Param))
    x = image(64, 5)
    first, second = model(x), model(x)
    for a, b in zip(first, second, strict=True):
        assert (a != b).all()
    evaluated = still(model)(x)
    for size, weights in zip((3, 4, 2), evaluated, strict=True):
        assert weights.shape == (64, size)
        assert ((weights >= 0) & (weights <= 1)).all()
        assert len(np.unique(np.asarray(weights), axis=0)) == 64
    np.testing.assert_allclose(evaluated[1].sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(evaluated[0].mean(), 0.5, atol=0.1)
    # Whatever else is in the batch, and in whatever order.
    alone = still(model)(x[5:6])
    for weights, one in zip(evaluated, alone, strict=True):
        np.testing.assert_allclose(one, weights[5:6], rtol=1e-4, atol=1e-5)


def test_other_features_are_refused():
    with pytest.raises(ValueError, match="made for 5 features and is given 4"):
        attention()(image(2, 4))
