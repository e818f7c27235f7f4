"""Blocks that mix the examples of a batch are refused where only some examples are computed."""

import functools

import blocks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import CHANNELS, RADIUS, image, make, still
from flax import nnx

import dynjax as dj
from dynjax.core.examples import shape_apart


def batch_norm(x):
    """Over a reshaped batch, in a call."""
    flat = x.reshape(-1, x.shape[-1])
    return (flat - jax.jit(functools.partial(jnp.mean, axis=0, keepdims=True))(flat)).reshape(x.shape)


def attends(x):
    flat = x.reshape(len(x), -1)
    return (flat @ flat.T @ flat).reshape(x.shape)


MIXING = {
    "mean": lambda x: x - x.mean(0, keepdims=True),
    "largest": lambda x: x / x.max(),
    "batch normalisation": batch_norm,
    "order": lambda x: jnp.sort(x, 0),
    "sum so far": lambda x: jnp.cumsum(x, 0),
    "first": lambda x: x - x[:1],
    "neighbour": lambda x: x + jnp.roll(x, 1, 0),
    "attention": attends,
    "neighbours by index": lambda x: x.at[jnp.array([0, 2])].add(x[jnp.array([1, 0])]),
    "taken by index": lambda x: x - x[jnp.array([1])],
}


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_examples_is_refused(name):
    with pytest.raises(ValueError, match=r"mixes the examples of a batch \(\w+ over them\)"):
        shape_apart(MIXING[name], image(3, 4, 5, CHANNELS))


def test_what_treats_examples_alone_has_its_shape():
    x = image(3, 4, 5, CHANNELS)
    for kind in RADIUS:
        after = 6 if kind is blocks.Wider else CHANNELS
        assert shape_apart(still(make(kind)), x).shape == (3, 4, 5, after)
    for block in (
        lambda x: x - x.mean((1, 2), keepdims=True),
        lambda x: jnp.where((x > 0).any(), x, -x),  # of truth values: what a loop over the batch asks for its end
        lambda x: jnp.stack([x, x + 1]).max(0),
        lambda x: x.at[jnp.arange(len(x)), 2].set(0),
        lambda x: jnp.take_along_axis(x, (x[:, :1] > 0).astype(int), 1) + x,
        nnx.softmax,
    ):
        assert shape_apart(block, x).shape == x.shape
    assert shape_apart(lambda pair: (pair[0] + 1, pair[1]), (x, x[:, 0]))[1].shape == (3, 5, CHANNELS)


def test_wrappers_of_examples_ask_when_compact():
    x, block = image(3, 4, 5, CHANNELS), MIXING["mean"]
    one_of = np.eye(2)[[0, 1, 0]]
    for model in (
        dj.Skip(block, dj.FixedGate([1, 0, 1])),
        dj.Select([block, jnp.tanh], dj.FixedGate(one_of)),
        dj.Exits([jnp.tanh, block], [lambda x: x.mean((1, 2))] * 2),
        dj.Halt(block, dj.SampleGate(CHANNELS, rngs=nnx.Rngs(0)), 2),
    ):
        with pytest.raises(ValueError, match="mixes the examples of a batch"):
            jax.eval_shape(lambda x, model=model: still(model, "compact")(x), x)


def test_what_nothing_comes_of_does_not_count():
    """A shape looked up on one example, and edges of which no pixel is taken."""
    x = jnp.arange(12.0).reshape(3, 2, 2)

    def block(x):
        assert jax.eval_shape(jnp.sin, x[0]).shape == (2, 2)
        return jnp.pad(x, ((0, 0), (1, 0), (0, 0)), mode="edge")[:, 1:]

    assert shape_apart(block, x).shape == x.shape
