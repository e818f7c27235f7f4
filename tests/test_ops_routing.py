"""Select: the chosen module per example or per tile, masked and compact alike."""

import blocks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import CHANNELS, at, image, make, still
from flax import nnx
from test_ops_spatial import Squeeze, assert_same, three_ways

import dynjax as dj


def choices(shape, count):
    """One-hot patterns: each branch alone, and random ones."""
    random = np.random.default_rng(0)
    alone = [np.full(shape, k) for k in range(count)]
    return [jax.nn.one_hot(jnp.asarray(k), count) for k in (*alone, random.integers(0, count, shape))]


@pytest.mark.parametrize("examples", [1, 5])
def test_per_example(examples):
    modules = [make(kind) for kind in (blocks.Pointwise, Squeeze, blocks.Residual)]
    x = image(examples, 7, 6, CHANNELS)
    run = three_ways(lambda x, keep: (dj.Select(modules, dj.FixedGate(keep)), x), x, jnp.zeros((examples, 3)))
    outputs = np.stack([run(x, choice)[0] for choice in choices((examples,), 3)[:3]])
    np.testing.assert_allclose(outputs[1], still(modules[1])(x), rtol=1e-5, atol=1e-6)
    for choice in choices((examples,), 3):
        masked, *compact = run(x, choice)
        np.testing.assert_array_equal(masked, outputs[choice.argmax(-1), np.arange(examples)])
        assert_same(masked, *compact)


@pytest.mark.parametrize("shape", [(2, 13, 9), (1, 3, 3)], ids=str)
def test_per_tile(shape):
    """Branches of several radii, one of which is run on whole windows."""
    modules = [make(kind) for kind in (blocks.Pointwise, blocks.Pooled, blocks.Biased)]
    x, grid = image(*shape, CHANNELS), (shape[0], -(-shape[1] // 4), -(-shape[2] // 4))
    run = three_ways(lambda x, keep: (dj.Select(modules, dj.FixedGate(keep, size=4)), x), x, jnp.zeros((*grid, 3)))
    outputs = np.stack([run(x, choice)[0] for choice in choices(grid, 3)[:3]])
    for choice in choices(grid, 3):
        masked, *compact = run(x, choice)
        pixels = np.asarray(choice.argmax(-1)).repeat(4, 1).repeat(4, 2)[:, : shape[1], : shape[2], None]
        np.testing.assert_array_equal(masked, np.choose(pixels, outputs))
        assert_same(masked, *compact)


def test_a_branch_may_be_a_function_and_change_the_channels():
    wider, plain = make(blocks.Wider), make(lambda rngs: nnx.Linear(CHANNELS, 6, rngs=rngs))
    modules = [lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, 2))), plain, wider]
    x, keep = image(1, 8, 8, CHANNELS), choices((1, 2, 2), 3)[-1]
    model = dj.Select(modules, dj.FixedGate(keep, size=4))
    assert_same(still(model)(x), still(model, "compact")(x))


def selected(rngs, size=4):
    gate = dj.BranchGate(CHANNELS, 2, size=size, rngs=rngs)
    return dj.Select([blocks.Pointwise(rngs), blocks.Residual(rngs)], gate)


def test_the_threshold_moves_the_choice_to_the_first():
    model, x = make(selected), image(2, 13, 9, CHANNELS)

    def run(threshold):
        return dj.traced(at(threshold, still(model)))(x), at(threshold, still(model, "compact"))(x)

    run, spent, taken = jax.jit(run), [], []
    for threshold in (-30.0, 0.0, 0.2, 30.0):
        (masked, trace), compact = run(threshold)
        assert_same(masked, compact)
        spent.append(float(trace.macs().mean()))
        taken.append(float(trace.decisions[""].kept()))
    assert taken == sorted(taken, reverse=True)
    # Between the ends tiles of several branches pay for their borders, so spending need not fall at every step.
    assert spent[-1] < min(spent[:-1])
    assert taken[0] == 1 and taken[-1] == 0
    np.testing.assert_allclose(spent[0], trace.full_macs, rtol=1e-6)


@pytest.mark.parametrize("size", [None, 4])
def test_gradients_reach_gate_and_all_branches(size):
    def loss(model, x):
        return (model(x) ** 2).sum()

    model = make(lambda rngs: selected(rngs, size))
    grads, slope = nnx.jit(nnx.grad(loss, argnums=(0, 1)))(model, image(6, 9, 9, CHANNELS))
    leaves = [np.asarray(leaf) for leaf in (*jax.tree.leaves(grads), slope)]
    assert len(leaves) == 5 + 2 + 6 + 1
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in leaves)


def test_errors():
    x, plain = image(2, 8, 8, CHANNELS), make(blocks.Pointwise)
    with pytest.raises(
        ValueError, match=r"Select needs a decision per branch of shape \(2, 3\).*BranchGate\(channels, 3"
    ):
        dj.Select([plain] * 3, dj.FixedGate(np.ones((1, 2))))(x)
    with pytest.raises(ValueError, match=r"Select needs a decision per tile branch of shape \(2, 2, 2, 2\)"):
        dj.Select([plain] * 2, dj.FixedGate(np.ones((1, 2, 2)), size=4))(x)
    with pytest.raises(ValueError, match=r"gives shape \(2, 8, 8, 6\).*branches"):
        dj.Select([plain, make(blocks.Wider)], dj.FixedGate([[1, 0]]))(x)
    with pytest.raises(ValueError, match="Squeeze cannot be run on tiles"):
        dj.Select([plain, make(Squeeze)], dj.FixedGate(np.ones((1, 2, 2, 2)), size=4))(x)
    with pytest.raises(ValueError, match="Select around a module that is dynamic already"):
        dj.Select([plain, dj.Skip(plain, dj.FixedGate([1]))], dj.FixedGate([[1, 0]]))
    with pytest.raises(ValueError, match="Select needs at least one module"):
        dj.Select([], dj.FixedGate([[1, 0]]))
