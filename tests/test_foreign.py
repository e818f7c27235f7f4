"""Models as others write them, met as an outsider meets them: what works, and what is refused with the cure."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import CHANNELS, Pointwise, Residual, Tokens, image, make, still
from flax import linen, nnx

import dynjax as dj
from dynjax.core import cost

dynamize = inspect.unwrap(dj.dynamize)  # without the tests' type checks


class Block(nnx.Module):
    """Layers of two widths, noise by default, and a condition that it cannot do without."""

    def __init__(self, rngs):
        self.wide = nnx.Linear(CHANNELS, 2 * CHANNELS, rngs=rngs)
        self.narrow = nnx.Linear(2 * CHANNELS, CHANNELS, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, condition, *, deterministic=False):
        y = self.narrow(nnx.gelu(self.wide(x)) * condition[:, None])
        return x + self.drop(y, deterministic=deterministic)


class Host(nnx.Module):
    def __init__(self, rngs, kind=Block, number=2):
        self.stem = nnx.Linear(3, CHANNELS, rngs=rngs)
        self.blocks = nnx.List([kind(rngs) for _ in range(number)])

    def __call__(self, x, *args, **kwargs):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, *args, **kwargs)
        return x


TOKENS, CONDITION = image(6, 5, 3) * jnp.linspace(0.1, 3, 6)[:, None, None], image(6, 2 * CHANNELS, seed=1)
CALL = (TOKENS, CONDITION), {"deterministic": True}


def test_blocks_with_a_condition_and_a_flag_are_one_line_each():
    model = make(Host)
    with pytest.raises(ValueError, match=r"has layers of 4, 8 and cannot be run.*missing 1 required .*Give example="):
        dynamize(model, {r"blocks/\d": dj.Skip}, rngs=nnx.Rngs(0))
    adaptive = dj.dynamize(model, {r"blocks/\d": dj.Skip}, example=CALL, rngs=nnx.Rngs(0))
    assert adaptive.blocks[0].gate.logits.features == CHANNELS
    fast = dj.deploy(adaptive, 0.8, [CALL])
    expected = nnx.view(fast, execution="masked")(*CALL[0], **CALL[1])
    np.testing.assert_allclose(fast(*CALL[0], **CALL[1]), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"compact execution cannot train: Block was called with deterministic=False"):
        fast(*CALL[0], deterministic=False)


class Changing(nnx.Module):
    """Blocks that touch themselves when they are called, and layers that nnx.scan or a key in every call runs."""

    def __init__(self, rngs, kind):
        self.kind, self.last = kind, nnx.Variable(jnp.zeros(()))
        self.layers = nnx.vmap(lambda rngs: nnx.Linear(CHANNELS, CHANNELS, rngs=rngs))(rngs.split(2))
        self.rnn = nnx.RNN(nnx.GRUCell(CHANNELS, CHANNELS, rngs=rngs), rngs=rngs)

    def __call__(self, x):
        if self.kind == "variable":
            self.last[...] = jnp.float32(1)
            return x * 2
        if self.kind == "sow":
            self.sow(nnx.Intermediate, "mean", x.mean())
            return x * 2
        if self.kind == "scan":
            return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)
        return self.rnn(x)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow")
@pytest.mark.parametrize("kind", ["variable", "sow", "scan", "rnn"])
def test_blocks_that_change_themselves_are_run_as_copies(kind):
    block = Changing(nnx.Rngs(0), kind)
    model, x = dj.Skip(block, dj.FixedGate([1, 0, 1])), image(3, 5, CHANNELS)
    expected = jnp.where(jnp.array([1, 0, 1])[:, None, None] > 0, block(x), x)
    graphdef, state = nnx.split(still(model, "compact"))
    found = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda x: still(model, "compact")(x))(x), expected, rtol=1e-5, atol=1e-6)


class Bridged(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        y = linen.BatchNorm(use_running_average=not train)(linen.Conv(x.shape[-1], (3, 3))(x))
        return x + linen.Dropout(0.5, deterministic=not train)(linen.relu(y))


def bridged():
    return nnx.bridge.ToNNX(Bridged(), rngs=nnx.Rngs(0)).lazy_init(jnp.zeros((1, 8, 8, CHANNELS)))


@pytest.mark.parametrize("kind", ["Skip", "Tiles"])
def test_bridged_blocks_are_wrapped_and_skip_under_jit(kind):
    class Net(nnx.Module):
        def __init__(self):
            self.first, self.second = bridged(), bridged()

        def __call__(self, x):
            return self.second(self.first(x), train=False)

    x = image(4, 8, 8, CHANNELS) * jnp.linspace(0.1, 3, 4)[:, None, None, None]
    wrapper = dj.Skip if kind == "Skip" else lambda b, c, rngs: dj.Tiles(b, dj.TileGate(c, size=4, rngs=rngs))
    model = dj.dynamize(Net(), {"first|second": wrapper}, example=x, rngs=nnx.Rngs(0))
    trace = dj.traced(still(model))(x)[1]
    assert trace.full_macs - trace.static_macs == 2 * cost.macs(still(bridged()), x[:1])
    fast = dj.deploy(model, 0.6, [x])
    np.testing.assert_allclose(fast(x), nnx.view(fast, execution="masked")(x), rtol=1e-5, atol=1e-5)


def test_a_bridged_model_is_one_module():
    with pytest.raises(ValueError, match=r"one module: bridge its blocks one by one \(nnx\.bridge\.ToNNX\)"):
        dynamize(bridged(), {"Conv_0": dj.Skip}, rngs=nnx.Rngs(0))


def test_what_the_model_is_instead_is_told_apart():
    class Equinox:
        pass

    Equinox.__module__ = "equinox.nn._mlp"
    cases = [
        (Bridged(), r"test_foreign.Bridged: Linen modules are bridged, block by block"),
        (Equinox(), r"equinox.nn._mlp.*: an Equinox module has no nnx variables"),
        (lambda x: x, r"builtins.function: a function has no modules to find: wrap it as it is"),
        (Residual, r"blocks.Residual: it is a class: make a model of it"),
        ({"kernel": 1}, r"builtins.dict: give the model itself"),
    ]
    for model, message in cases:
        with pytest.raises(ValueError, match=f"the model is no flax.nnx.Module but .*{message}"):
            dynamize(model, {".*": dj.Skip}, rngs=nnx.Rngs(0))


class Stacked(nnx.Module):
    """Layers stacked as the Flax guide shows."""

    def __init__(self, rngs):
        self.layers = nnx.vmap(Pointwise)(rngs.split(3))

    def __call__(self, x):
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


class Unrolled(nnx.Module):
    def __init__(self, layers):
        self.layers = layers

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_stacked_layers_are_refused_and_the_cure_is_one():
    model, x = Stacked(nnx.Rngs(0)), image(3, 4, 4, CHANNELS)
    with pytest.raises(
        ValueError, match=r"'layers' is a stack of 3 layers.*no decision comes out.*Unroll it"
    ) as refused:
        dynamize(model, {"layers": dj.Skip}, rngs=nnx.Rngs(0))
    code = re.search(r"graphdef, state = .*layers = (nnx\.List\(.*\)), and", str(refused.value))
    graphdef, state = nnx.split(model.layers)
    layers = eval(code.group(1), dict(nnx=nnx, jax=jax, graphdef=graphdef, state=state))
    np.testing.assert_allclose(Unrolled(layers)(x), model(x), rtol=1e-5, atol=1e-6)
    adaptive = dj.dynamize(Unrolled(layers), {r"layers/\d": dj.Skip}, rngs=nnx.Rngs(0))
    assert len(dj.traced(still(adaptive))(x)[1].decisions) == 3


def test_what_is_inside_of_something_dynamic_is_refused():
    model = nnx.Sequential(make(Residual), nnx.Sequential(make(Residual)))
    once = dj.dynamize(model, {"layers/0": dj.Tiles, "layers/1": dj.Skip}, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"'layers/0/block/conv1' lies inside of Tiles at 'layers/0', which is dynamic"
    ):
        dynamize(once, {"layers/0/block/conv1": dj.Skip}, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"is a part of the gate of Skip at 'layers/1'"):
        dynamize(once, {"layers/1/gate/logits": dj.Skip}, features=4, rngs=nnx.Rngs(0))
    twice = dj.dynamize(once, {"layers/1/block/layers/0": dj.Tiles}, rngs=nnx.Rngs(0))
    trace = dj.traced(still(twice))(image(2, 16, 16, CHANNELS))[1]
    assert len(trace.decisions) == 3 and trace.static_macs > 0


def test_bare_classes_do_or_say_what_to_write():
    model = dj.dynamize(nnx.Sequential(make(Tokens)), {"layers/0": dj.MixtureOfDepths}, rngs=nnx.Rngs(0))
    assert dj.traced(still(model))(image(2, 5, CHANNELS))[1].decisions["layers/0"].place == "token"
    for kind in (dj.Exits, dj.PolicySkip, dj.Select, dj.Halt, dj.Channels, dj.Slimmable, dj.Experts, dj.Cell):
        with pytest.raises(
            ValueError, match=rf"'layers/0': {kind.__name__} alone does not say enough: .*dj\.{kind.__name__}\("
        ):
            dynamize(model, {"layers/0": kind}, rngs=nnx.Rngs(0))


def test_an_example_that_does_not_reach_a_block():
    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.used, self.unused = Pointwise(rngs), Pointwise(rngs)

        def __call__(self, x):
            return self.used(x)

    with pytest.raises(ValueError, match="with this example the model gives nothing to unused"):
        dynamize(make(Twice), {"used|unused": dj.Skip}, example=image(1, 4, 4, CHANNELS), rngs=nnx.Rngs(0))


class Table(nnx.Module):
    """A block with an array that is no variable."""

    def __init__(self, rngs):
        self.linear, self.table = nnx.Linear(CHANNELS, CHANNELS, rngs=rngs), jnp.arange(1.0, 1 + CHANNELS)

    def __call__(self, x):
        return self.linear(x) * self.table[None, None]


def test_arrays_that_are_no_variables():
    model, x = dj.Skip(Table(nnx.Rngs(0)), dj.FixedGate([1, 0, 1])), image(3, 5, CHANNELS)
    fast = dj.deploy(model, 1.0, [x])
    np.testing.assert_allclose(fast(x), model(x), rtol=1e-5, atol=1e-6)
