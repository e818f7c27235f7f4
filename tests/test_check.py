"""A deployed model is compared with itself, wrapper by wrapper, and timed; what gives something else is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import CHANNELS, Pointwise, image, make, still
from flax import nnx

import dynjax as dj
from dynjax.core import check
from dynjax.core.check import Times


def scaled(examples=6, **ways):
    """Examples of which each is louder than the one before, so that gates tell them apart."""
    return image(examples, 8, 8, CHANNELS, **ways) * jnp.linspace(0.1, 3, examples)[:, None, None, None]


class Wrong(nnx.Module):
    """Blocks that no look at the jaxpr or at a few pixels finds out."""

    def __init__(self, rngs, kind):
        self.conv, self.kind = nnx.Conv(CHANNELS, CHANNELS, (1, 1), rngs=rngs), kind

    def __call__(self, x, table=None):
        if self.kind == "batch":  # the shape is seen from outside of the trace, and the mean goes by a matrix
            size = x.shape[0]
            return self.conv(x) - (jnp.full((1, size), 1 / size) @ x.reshape(size, -1)).reshape(1, *x.shape[1:])
        if self.kind == "size":
            return self.conv(x) * x.shape[0]
        if self.kind == "table":
            return self.conv(x) + jax.nn.softmax(x @ table.T) @ table
        return self.conv(x) + jax.random.normal(jax.random.key(0), x.shape)


class Host(nnx.Module):
    def __init__(self, rngs, kind):
        self.first = dj.Skip(Pointwise(rngs), dj.SampleGate(CHANNELS, rngs=rngs))
        self.last = dj.Skip(Wrong(rngs, kind), dj.SampleGate(CHANNELS, rngs=rngs))

    def __call__(self, x, *args):
        return self.last(self.first(x), *args)


@pytest.mark.parametrize("kind", ["size", "noise"])
def test_what_gives_something_else_when_it_skips_is_named(kind):
    model = make(lambda rngs: Host(rngs, kind))
    with pytest.raises(ValueError, match=r"Skip at 'last' gives something else when it skips.*Wrong must treat each"):
        dj.deploy(model, 0.5, [scaled()])
    assert dj.deploy(model, 0.5, [scaled()], check=False).report.met


def test_an_argument_taken_for_one_of_the_examples_is_found():
    """A table with as many rows as the batch has examples."""
    model, table = make(lambda rngs: Host(rngs, "table")), image(6, CHANNELS, seed=3)
    with pytest.raises(ValueError, match=r"Wrong mixes the examples.*or say batched="):
        dj.deploy(model, 0.5, [((scaled(), table), {})])
    model.last.batched = ()
    assert dj.deploy(model, 0.5, [((scaled(), table), {})]).report.met


def test_a_model_that_is_a_wrapper_and_one_that_holds_some():
    skip = make(lambda rngs: dj.Skip(Wrong(rngs, "noise"), dj.SampleGate(CHANNELS, rngs=rngs)))
    with pytest.raises(ValueError, match="Skip at 'the top' gives something else"):
        dj.deploy(skip, 0.5, [scaled()])
    outer = make(lambda rngs: dj.Skip(Host(rngs, "size"), dj.SampleGate(CHANNELS, rngs=rngs)))
    with pytest.raises(ValueError, match="Skip at 'the top' gives something else"):
        dj.deploy(outer, 0.5, [scaled()])


def test_rounding_and_ties_are_no_errors():
    """Behind a decision that fell to the other side by rounding the outputs differ by right; by more it is wrong."""
    decide = lambda keep, probability: {"gate": dj.Decision(jnp.array(keep), jnp.array(probability), "example")}  # noqa: E731
    first = decide([1.0, 0.0, 1.0], [0.5, 0.2, 0.9])
    tied, wrong = check._flipped(first, decide([0.0, 0.0, 0.0], [0.5 - 1e-5, 0.2, 0.3]), 3)
    assert tied.tolist() == [True, False, False] and wrong.tolist() == [False, False, True]
    y = jnp.array([[1.0, 2.0], [3.0, jnp.nan], [jnp.inf, 4.0], [0.0, 0.0]])
    z = y.at[0, 0].add(1e-4).at[3, 1].add(0.1)
    errors = check._error(y, z)
    assert errors[0] < 1 and errors[1] == errors[2] == 0 and errors[3] > 1
    assert check._error(y, y.at[1, 1].set(0))[1] == jnp.inf
    assert check._error(jnp.array([[1, 2]]), jnp.array([[1, 3]]))[0] > 1
    half = y[:1].astype(jnp.bfloat16)
    assert check._error(half, half * 1.01)[0] < 1 < check._error(half, half * 1.2)[0]


def test_times_are_told_and_where_skipping_costs_time():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.tiles = dj.Tiles(
                nnx.Conv(CHANNELS, CHANNELS, (3, 3), rngs=rngs), dj.TileGate(CHANNELS, size=4, rngs=rngs)
            )
            self.skip = dj.Skip(Pointwise(rngs), dj.SampleGate(CHANNELS, rngs=rngs))
            self.choice = dj.Select([Pointwise(rngs), Pointwise(rngs)], dj.BranchGate(CHANNELS, 2, rngs=rngs))

        def __call__(self, x):
            return self.choice(self.skip(self.tiles(x)))

    fast = dj.deploy(make(Net), 0.6, [scaled(4)], measure=True)
    times = fast.report.times
    assert times.examples == 4 and times.static > 0 < times.compact
    assert [path for path, *_ in times.wrappers] == ["skip", "tiles"]
    assert f"static {times.static:.2f} ms, compact" in str(fast.report)


def test_what_costs_time_is_named():
    times = Times(8, 4.0, 3.0, (("a", 1.0, 0.5), ("b", 1.0, 1.25)))
    assert times.slower == (("b", 1.0, 1.25),)
    assert str(times) == (
        "static 4.00 ms, compact 3.00 ms for 8 examples (1.33x); "
        "skipping costs time, so leave whole: b (1.00 ms whole, 1.25)"
    )


def test_without_gates_a_model_is_its_blocks():
    model = still(make(lambda rngs: Host(rngs, "none of them")))
    plain = check._without_gates(nnx.clone(model))
    x = image(2, 4, 4, CHANNELS)
    np.testing.assert_array_equal(plain(x), model.last.block(model.first.block(x)))


def test_a_model_that_asks_what_its_blocks_are_is_found():
    """A wrapped block is no instance of the block's class: the host calls it in another way."""

    class Timed(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(CHANNELS, CHANNELS, rngs=rngs)

        def __call__(self, x, time=None):
            return self.linear(x) + (0 if time is None else time)

    class Asking(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([Timed(rngs), Timed(rngs)])

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x, 1.0) if isinstance(layer, Timed) else layer(x)
            return x

    model = dj.dynamize(make(Asking), {"layers/0": dj.Skip}, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"with everything kept Asking gives something else .*layers/0.*isinstance"):
        dj.deploy(model, 0.9, [scaled()])
    assert dj.deploy(model, 0.9, [scaled()], check=False).report.met
