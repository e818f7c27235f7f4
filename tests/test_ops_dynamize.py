"""dynamize puts wrappers into models by path, and leaves the original as it was."""

import inspect

import blocks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import CHANNELS, at, image, make, still
from flax import nnx

import dynjax as dj


class Stage(nnx.Module):
    """The input channels are neither those of the first layer by the alphabet nor the smallest that a layer takes."""

    def __init__(self, rngs, before, after):
        self.expand = nnx.Conv(before, 2, (3, 3), rngs=rngs)
        self.contract = nnx.Linear(2, after, rngs=rngs)

    def __call__(self, x):
        return self.contract(nnx.tanh(self.expand(x)))


class Custom(nnx.Module):
    """Modules in attributes, lists, dicts and tuples, and one that is used twice."""

    def __init__(self, rngs):
        self.stem = Stage(rngs, 3, CHANNELS)
        self.encoder = nnx.List([blocks.Residual(rngs) for _ in range(11)])
        self.named = nnx.Dict(a=blocks.Pointwise(rngs), b=blocks.Bottleneck(rngs))
        self.plain = nnx.data((blocks.Pointwise(rngs), {"last": blocks.Pointwise(rngs)}))
        self.again = self.named["a"]
        self.activation = nnx.relu

    def __call__(self, x):
        x = self.stem(x)
        for block in self.encoder:
            x = block(x)
        x = self.named["b"](self.named["a"](x))
        x = self.plain[1]["last"](self.plain[0](x))
        return self.activation(self.again(x))


@pytest.fixture(scope="module")
def model():
    return make(Custom)


def sequential(rngs):
    inner = nnx.Sequential(blocks.Residual(rngs), nnx.relu, blocks.ConvNeXt(rngs))
    return nnx.Sequential(nnx.Linear(3, CHANNELS, rngs=rngs), inner, blocks.Pointwise(rngs))


def kinds(model):
    return {"/".join(map(str, path)): type(module).__name__ for path, module in nnx.iter_modules(model)}


def assert_close(y, expected):
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))


def open_gates(model):
    return at(-30.0, still(model))


def test_the_whole_path_has_to_match_and_the_outermost_counts(model):
    adaptive = dj.dynamize(model, {"encoder/1.*": dj.Skip, "named/.*|again": dj.Tiles}, rngs=nnx.Rngs(0))
    wrapped = {path for path, kind in kinds(adaptive).items() if kind in ("Skip", "Tiles")}
    assert wrapped == {"again", "encoder/1", "encoder/10", "named/b"}
    # What is in two places is shown by nnx in one, and wrapped in both.
    assert type(adaptive.named["a"]) is dj.Tiles and adaptive.again is adaptive.named["a"]
    assert type(adaptive.encoder) is nnx.List and kinds(adaptive)["encoder/1/block"] == "Residual"


def test_with_everything_kept_nothing_changes_and_the_original_never_does(model):
    x, before = image(2, 9, 8, 3), kinds(model)
    state = jax.tree.map(np.asarray, nnx.state(model))
    expected = still(model)(x)
    wrappers = {
        "encoder/.*": dj.Skip,
        "(again|named|plain).*": lambda block, features, rngs: dj.Tiles(
            block, dj.TileGate(features, size=4, rngs=rngs)
        ),
    }
    adaptive = open_gates(dj.dynamize(model, wrappers, rngs=nnx.Rngs(0)))
    assert type(adaptive.plain[0]) is type(adaptive.plain[1]["last"]) is dj.Tiles
    y, trace = jax.jit(lambda x: dj.traced(adaptive)(x))(x)
    assert_close(y, expected)
    # Eleven blocks, two of the dict, two of the tuple, and the shared one called a second time.
    assert len(trace.decisions) == 11 + 4 + 1
    adaptive.encoder[0].block.conv1.kernel[...] = jnp.zeros((3, 3, CHANNELS, CHANNELS))
    assert kinds(model) == before
    jax.tree.map(np.testing.assert_array_equal, state, jax.tree.map(np.asarray, nnx.state(model)))


def test_sequential():
    model, x = make(sequential), image(2, 9, 8, 3)
    for pattern, paths in [("layers/1/layers/.*", {"layers/1/layers/0", "layers/1/layers/2"}), (".*/1", {"layers/1"})]:
        adaptive = open_gates(dj.dynamize(model, {pattern: dj.Skip}, rngs=nnx.Rngs(0)))
        assert {path for path, kind in kinds(adaptive).items() if kind == "Skip"} == paths
        assert_close(adaptive(x), still(model)(x))


def test_the_first_pattern_counts():
    model = make(sequential)
    wrappers = {"layers/1": dj.Tiles, "layers/[12]": dj.Skip}
    adaptive = dj.dynamize(model, wrappers, rngs=nnx.Rngs(0))
    assert [type(layer) for layer in adaptive.layers] == [nnx.Linear, dj.Tiles, dj.Skip]


def test_features_are_those_of_the_first_layer_made_or_given(model):
    seen = {}

    def wrap(block, features, rngs):
        seen[type(block).__name__] = features
        return dj.Skip(block, dj.FixedGate([1]), otherwise=nnx.Linear(features, CHANNELS, rngs=rngs))

    dj.dynamize(model, {"stem|named/b": wrap}, rngs=nnx.Rngs(0))
    assert seen == {"Stage": 3, "Bottleneck": CHANNELS}
    dj.dynamize(model, {"stem|named/b": wrap}, features=7, rngs=nnx.Rngs(0))
    assert seen == {"Stage": 7, "Bottleneck": 7}
    dj.dynamize(model, {"stem|named/b": wrap}, features=lambda path, block: len(path), rngs=nnx.Rngs(0))
    assert seen == {"Stage": 4, "Bottleneck": 7}


class Parameterless(nnx.Module):
    def __call__(self, x):
        return x


def test_errors(model):
    cases = [
        ({"encodr/0": dj.Skip}, "no module's path matches 'encodr/0'; near: .*encoder/0"),
        ({"encoder/0": dj.Skip, "stm.*": dj.Skip}, "'stm.*'; near: .*stem"),
        ({"zzzz": dj.Skip}, "no module's path matches 'zzzz'; near: activation|again|encoder"),
        ({"encoder": dj.Skip}, "no module's path matches 'encoder'; near: .*encoder/"),
    ]
    for wrappers, message in cases:
        with pytest.raises(ValueError, match=message):
            dj.dynamize(model, wrappers, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"input channels of 'layers/0' \(Parameterless\).*Give example="):
        dj.dynamize(nnx.Sequential(Parameterless()), {"layers/0": dj.Skip}, rngs=nnx.Rngs(0))
    twice = dj.dynamize(nnx.Sequential(Parameterless()), {"layers/0": dj.Skip}, features=1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="dynamic already"):
        dj.dynamize(twice, {"layers/0": dj.Tiles}, features=1, rngs=nnx.Rngs(0))


def test_what_is_no_nnx_module():
    class Linen:
        pass

    plain = inspect.unwrap(dj.dynamize)  # without the tests' type checks
    with pytest.raises(ValueError, match=r"no flax\.nnx\.Module but .*Linen: give the model"):
        plain(Linen(), {".*": dj.Skip}, rngs=nnx.Rngs(0))


def test_a_pattern_of_which_nothing_is_left():
    inner = nnx.Sequential(nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0)))
    model = nnx.Sequential(inner)
    with pytest.raises(ValueError, match="lies inside of a module that another pattern wraps"):
        dj.dynamize(model, {"layers/0": dj.Skip, "layers/0/layers/0": dj.Tiles}, rngs=nnx.Rngs(0), features=4)
