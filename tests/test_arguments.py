"""Blocks with further arguments: handed on, gathered with the examples where they belong to them, counted the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import CHANNELS, image, make, still
from flax import nnx

import dynjax as dj
from dynjax.core.arguments import Examples, bind

KEEP = jnp.array([1.0, 0, 1, 0, 0])


class FiLM(nnx.Module):
    """A convolution, scaled and shifted by what a vector of each example says."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(CHANNELS, CHANNELS, (3, 3), rngs=rngs)
        self.dense = nnx.Linear(3, 2 * CHANNELS, rngs=rngs)

    def __call__(self, x, condition, *, scale=1.0, training=False, rngs=None):
        factor, shift = jnp.split(self.dense(condition)[:, None, None], 2, -1)
        y = x + scale * jax.nn.relu(self.conv(x) * factor + shift)
        return y + jax.random.normal(rngs.dropout(), x.shape) if training else y


class Decoder(nnx.Module):
    """A second map, a mask of pixels, and a table that all examples share."""

    def __init__(self, rngs):
        self.first = nnx.Conv(2 * CHANNELS, CHANNELS, (3, 3), rngs=rngs)
        self.last = nnx.Conv(CHANNELS, CHANNELS, (3, 3), rngs=rngs)

    def __call__(self, x, skipped, mask, table):
        y = self.first(jnp.concatenate([x, skipped], -1)) * mask[..., None]
        return x + self.last(jax.nn.relu(y)) @ table


class Attend(nnx.Module):
    """Tokens (B, T, C) with a mask of tokens, tokens of another kind, and the new tokens with their mean."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(CHANNELS, CHANNELS, rngs=rngs)

    def __call__(self, hidden, mask=None, *, context):
        scores = jnp.where(mask[:, None], self.dense(hidden) @ context.swapaxes(1, 2), -1e9)
        y = hidden + jax.nn.softmax(scores) @ context
        return y, y.mean((1, 2))


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def both(model, *args, **kwargs):
    """Outputs and traces of both executions, the second compiled."""
    masked, trace = dj.traced(still(model))(*args, **kwargs)
    fast = still(model, "compact")
    graphdef, state = nnx.split(fast)

    @jax.jit
    def run(state, leaves):
        args, kwargs = jax.tree.unflatten(tree, [leaves.get(n, leaf) for n, leaf in enumerate(flat)])
        return dj.traced(nnx.merge(graphdef, state, copy=True))(*args, **kwargs)

    flat, tree = jax.tree.flatten((args, kwargs))
    compact, again = run(state, {n: leaf for n, leaf in enumerate(flat) if hasattr(leaf, "shape")})
    jax.tree.map(close, masked, compact)
    close(trace.macs(), again.macs())
    return masked, trace


def vectors(examples=5):
    return jnp.linspace(-1, 1, examples * 3).reshape(examples, 3)


@pytest.mark.parametrize("keep", [KEEP, jnp.zeros(5), jnp.ones(5)], ids=["some", "none", "all"])
def test_skip_gathers_what_belongs_to_the_examples(keep):
    model, x = dj.Skip(make(FiLM), dj.FixedGate(keep)), image(5, 6, 6, CHANNELS)
    y, trace = both(model, x, vectors(), scale=0.5)
    expected = jnp.where(keep[:, None, None, None] > 0, model.block(x, vectors(), scale=0.5), x)
    close(y, expected)
    macs = (3 * 6 - 2) ** 2 * CHANNELS**2 + 3 * 2 * CHANNELS
    close(trace.macs(), keep * macs)


def test_one_example_and_the_input_by_its_name():
    model = dj.Skip(make(FiLM), dj.FixedGate(jnp.ones(1)))
    y, _ = both(model, x=image(1, 6, 6, CHANNELS), condition=vectors(1))
    close(y, model.block(image(1, 6, 6, CHANNELS), vectors(1)))
    with pytest.raises(ValueError, match="FiLM was called without its input"):
        model(condition=vectors(1))


@pytest.mark.parametrize("size", [(8, 12), (7, 9)], ids=["fitting", "odd"])
def test_tiles_go_with_the_vector_of_their_example(size):
    keep = jnp.asarray(np.random.default_rng(0).integers(0, 2, (2, -(-size[0] // 4), -(-size[1] // 4))), jnp.float32)
    model, x = dj.Tiles(make(FiLM), dj.FixedGate(keep, size=4)), image(2, *size, CHANNELS)
    model.strategy = "buckets" if size == (7, 9) else "loop"
    y, trace = both(model, x, vectors(2), scale=0.5)
    fine = jnp.repeat(jnp.repeat(keep, 4, 1), 4, 2)[:, : size[0], : size[1], None]
    close(y, jnp.where(fine > 0, model.block(x, vectors(2), scale=0.5), x))
    whole = trace.full_macs
    # Four rows of six columns, of which the outer two read padding; and the vector's layer, once for each tile.
    unit = 4 * 3 * (3 * 6 - 2) * CHANNELS**2 + 3 * 2 * CHANNELS
    close(trace.macs(), jnp.minimum(keep.sum((1, 2)) * unit, whole))


def test_tiles_cut_other_maps_as_their_own():
    keep = jnp.array([[[1.0, 0, 0], [0, 0, 1]], [[0, 0, 0], [0, 1, 0]]])
    model, x = dj.Tiles(make(Decoder), dj.FixedGate(keep, size=4)), image(2, 7, 12, CHANNELS)
    skipped, mask = image(2, 7, 12, CHANNELS, seed=1), image(2, 7, 12, seed=2) > 0
    table = jnp.eye(CHANNELS) * 2
    y, _ = both(model, x, skipped, mask, table=table)
    fine = jnp.repeat(jnp.repeat(keep, 4, 1), 4, 2)[:, :7, :, None]
    close(y, jnp.where(fine > 0, model.block(x, skipped, mask, table), x))


def test_trees_come_out_and_a_context_by_name_goes_in():
    x, mask = image(5, 3, CHANNELS), jnp.arange(15).reshape(5, 3) % 4 > 0

    def otherwise(x):
        return x, jnp.zeros(x.shape[0])

    model = dj.Skip(make(Attend), dj.FixedGate(KEEP), otherwise=otherwise)
    (y, mean), _ = both(model, x, mask, context=image(5, 3, CHANNELS, seed=3))
    close(mean[1], 0)
    close(y[1], x[1])
    without = dj.Skip(make(Attend), dj.FixedGate(KEEP))
    with pytest.raises(ValueError, match="give an `otherwise`"):
        without(x, mask, context=x)


def test_batched_overrides_the_guess():
    """A table with as many rows as there are examples belongs to all of them."""
    x, table = image(4, 4, CHANNELS), image(4, 4, seed=1)

    class Mixing(nnx.Module):
        def __call__(self, x, table):
            return x + table @ x

    gate = dj.FixedGate(KEEP[:4])
    y, _ = both(dj.Skip(Mixing(), gate, batched=()), x, table)
    close(y[0], x[0] + table @ x[0])
    with pytest.raises(ValueError, match="batched= names mask"):
        dj.Skip(Mixing(), gate, batched=("mask",))(x, table)
    with pytest.raises(ValueError, match=r"argument 1 has the examples as its first axis, but its shape is \(4, 4\)"):
        dj.Skip(Mixing(), dj.FixedGate(KEEP), batched=(1,))(image(5, 4, CHANNELS), table)


def test_the_other_wrappers_hand_on():
    x, condition = image(5, 6, 6, CHANNELS), vectors()
    choice = jax.nn.one_hot(jnp.array([0, 1, 1, 0, 1]), 2)
    blocks = [make(FiLM), make(FiLM, 1)]
    y, _ = both(dj.Select(blocks, dj.FixedGate(choice)), x, condition)
    close(y[1], blocks[1](x, condition)[1])
    policy = dj.PolicySkip(blocks, dj.FixedGate(jnp.stack([KEEP, 1 - KEEP], 1), rule=dj.core.decision.EACH))
    y, _ = both(policy, x, condition)
    close(y[0], blocks[0](x, condition)[0])
    close(y[1], blocks[1](x, condition)[1])
    tiles = dj.Select(blocks, dj.FixedGate(jax.nn.one_hot(jnp.arange(20).reshape(5, 2, 2) % 2, 2), size=3))
    y, _ = both(tiles, x, condition)
    close(y[0, :3, :3], blocks[0](x, condition)[0, :3, :3])


def test_loops_and_exits_hand_on():
    x, condition = image(3, 6, 6, CHANNELS), vectors(3)
    halt = make(lambda rngs: dj.Halt(FiLM(rngs), dj.SampleGate(CHANNELS, rngs=rngs), 3, kind="hard"))
    both(halt, x, condition)
    heads = [
        make(lambda rngs: nnx.Linear(CHANNELS, 3, rngs=rngs)),
        make(lambda rngs: nnx.Linear(CHANNELS, 3, rngs=rngs)),
    ]
    stages = [make(FiLM), make(FiLM, 1)]
    y, _ = both(dj.Exits(stages, [lambda x, h=h: h(x.mean((1, 2))) for h in heads], at=0.4), x, condition)
    assert y.shape == (3, 3)
    outs = dj.Exits(stages, heads, at=0.4).predictions(x, condition=condition)
    close(outs[1], heads[1](stages[1](stages[0](x, condition), condition)))


def test_tokens_are_gathered_with_what_belongs_to_them():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(CHANNELS, CHANNELS, rngs=rngs)

        def __call__(self, x, mask, positions, condition):
            return x + self.dense(x + positions) * condition[:, None, :1] * mask[..., None]

    keep = jnp.asarray(np.random.default_rng(0).integers(0, 2, (3, 8)), jnp.float32)
    model, x = dj.MixtureOfDepths(make(Block), dj.FixedGate(keep, place="token")), image(3, 8, CHANNELS)
    y, trace = both(model, x, image(3, 8, CHANNELS, seed=1), condition=vectors(3))
    whole = model.block(x, keep > 0, image(3, 8, CHANNELS, seed=1), vectors(3))
    close(y, jnp.where(keep[..., None] > 0, whole, x))
    close(trace.macs(), keep.sum(1) * CHANNELS**2)


def test_flags_and_random_numbers_are_passed_on_as_they_are():
    model, x = dj.Skip(make(FiLM), dj.FixedGate(KEEP)), image(5, 6, 6, CHANNELS)
    rngs = nnx.Rngs(dropout=0)
    y, _ = dj.traced(model)(x, vectors(), training=True, rngs=rngs)
    assert int(rngs.dropout.count[...]) == 1, "drawn from once: what is only looked at draws from copies"
    assert float(jnp.abs(y - model(x, vectors())).max()) > 0.1
    with pytest.raises(ValueError, match="compact execution cannot train: FiLM was called with training=True"):
        still(model, "compact")(x, vectors(), training=True, rngs=rngs)


def test_what_has_no_examples_cannot_be_skipped():
    def summed(x, condition):
        return x, condition.sum()

    model = dj.Skip(summed, dj.FixedGate(KEEP), otherwise=lambda x: (x, jnp.zeros(())))
    with pytest.raises(ValueError, match="all that a skipped block gives must have the examples as its first axis"):
        model(image(5, 4), vectors())


def test_a_call_without_more_is_left_alone():
    block = make(FiLM)
    assert bind(block, jnp.ones((2, 3)), (), {}) == (block, pytest.approx(np.ones((2, 3))))
    bound, given = bind(block, jnp.ones((2, 3)), (None,), dict(flag=True, at=jnp.ones(2)))
    assert isinstance(given, Examples) and len(given.others) == 1
    assert bound.arguments(given.others)[1].keys() == {"flag", "at"}
