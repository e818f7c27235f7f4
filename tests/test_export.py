"""Compact programs exported for any batch: they answer as the masked model does, and skip."""

import functools

import blocks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import CHANNELS, at, image, make, still
from flax import nnx
from jax import export
from jax.extend import core as jex

import dynjax as dj
from dynjax.core import tiles
from dynjax.core.cost import jaxprs_in


class Head(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(CHANNELS, 3, rngs=rngs)

    def __call__(self, x):
        return self.linear(x.mean((1, 2)))


class Mixed(nnx.Module):
    """Tokens see one another."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(CHANNELS, CHANNELS, rngs=rngs)

    def __call__(self, x, mask):
        return x + jnp.tanh(self.linear(x)) + (mask.astype(x.dtype)[..., None] * x).sum(1, keepdims=True)


def gate(rngs):
    return dj.SampleGate(CHANNELS, rngs=rngs)


def tile_gate(rngs):
    return dj.TileGate(CHANNELS, size=4, rngs=rngs)


def select(rngs, size=None):
    branches = [blocks.Pointwise(rngs), blocks.Bottleneck(rngs)]
    return dj.Select(branches, dj.BranchGate(CHANNELS, 2, size=size, rngs=rngs))


def exits(rngs, head=Head, size=None):
    return dj.Exits([blocks.Bottleneck(rngs) for _ in range(2)], [head(rngs) for _ in range(2)], size=size)


def logits(rngs):
    return nnx.Linear(CHANNELS, 3, rngs=rngs)


def groups(rngs):
    return dj.ChannelGate(CHANNELS, 3, rngs=rngs)


def router(rngs):
    return dj.Router(CHANNELS, 4, least=1, rngs=rngs)


KINDS = {
    "skip": (lambda rngs: dj.Skip(blocks.Bottleneck(rngs), gate(rngs)), 0),
    "select": (select, 0.25),
    "exits": (exits, 2.6),
    "halt": (lambda rngs: dj.Halt(blocks.Bottleneck(rngs), gate(rngs), 3), 2.5),
    "tiles": (lambda rngs: dj.Tiles(blocks.Bottleneck(rngs), tile_gate(rngs)), 2),
    "select_tiles": (functools.partial(select, size=4), -2),
    "exits_tiles": (functools.partial(exits, head=logits, size=4), 2),
    "halt_tiles": (lambda rngs: dj.Halt(blocks.Bottleneck(rngs), tile_gate(rngs), 3), -2),
    "tokens": (lambda rngs: dj.MixtureOfDepths(Mixed(rngs), dj.TokenGate(CHANNELS, rngs=rngs)), -0.5),
    "channels": (lambda rngs: dj.Channels(logits(rngs), nnx.Linear(3, CHANNELS, rngs=rngs), groups(rngs)), 0),
    "experts": (lambda rngs: dj.Experts(CHANNELS, 8, 4, gate=router(rngs), rngs=rngs), 0),
}
"""Each with a threshold at which some of what `some` gives is kept."""
TOKENS = (9, CHANNELS)
MAP = (12, 10, CHANNELS)  # whose border cuts the last tiles


def spec(shape):
    return jax.ShapeDtypeStruct(export.symbolic_shape(", ".join(["b", *map(str, shape)])), jnp.float32)


def some(number, shape):
    return image(number, *shape, seed=3) * jnp.linspace(0.2, 2, number).reshape(-1, *(1,) * len(shape))


def exported(model, shape):
    return export.export(jax.jit(lambda x: model(x)))(spec(shape))


def work(jaxpr, within=()):
    """Products and convolutions of a jaxpr, each with the conditions and loops that it lies in."""
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in ("dot_general", "conv_general_dilated"):
            yield name, within
        for inner in jaxprs_in(eqn.params):
            yield from work(getattr(inner, "jaxpr", inner), (*within, name) if name in ("cond", "while") else within)


def work_of(fn, shape):
    return list(work(jax.make_jaxpr(fn)(spec(shape)).jaxpr))


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_for_any_batch_answers_as_the_masked_model_and_skips(kind):
    build, threshold = KINDS[kind]
    model, shape = at(float(threshold), make(build)), TOKENS if kind in ("tokens", "experts") else MAP
    x = some(8, shape)
    expected, trace = jax.jit(lambda x: dj.traced(still(model))(x))(x)
    (decision,) = trace.decisions.values()
    # At one half, or two thirds, nothing may depend on the example: one of two stages, two of three steps.
    assert 0.2 < decision.kept() < 0.95 and decision.kept() not in (0.5, 2 / 3)
    compact = still(model, "compact", strategy="loop")
    program = exported(compact, shape)
    assert "stablehlo.while" in program.mlir_module()
    for number in (1, 3, 8):
        np.testing.assert_allclose(program.call(x[:number]), expected[:number], rtol=1e-4, atol=1e-5)
    always = [name for name, within in work_of(lambda x: compact(x), shape) if not within]
    # Blocks of maps are convolutions, and their gates are not; the first stage of exits is run for all.
    assert always.count("conv_general_dilated") == (3 if kind.startswith("exits") else 0)
    assert kind != "tokens" or always == ["dot_general"]


@pytest.mark.parametrize("place", ["example", "tile"])
def test_a_loop_that_may_be_compiled_for_one_unit_is_not_entered_for_none(place):
    """XLA moves the block out of a loop of one trip at most: it must not be where nothing is kept."""
    if place == "example":
        run, shape, units = dj.execute.samples, (6, 2), ()
    else:
        run, shape, units = functools.partial(dj.execute.tiles, size=2, radius=0), (2, 2, 2), (1, 1)

    def call(x):
        keep = x.mean(range(1, x.ndim)).reshape(-1, *units)
        return run(lambda x: jnp.tanh(x @ jnp.ones((2, 2))), x, keep, execution="compact", strategy="loop")

    assert {within for _, within in work_of(call, shape)} == {("cond",), ("cond", "cond", "while")}


def test_buckets_need_units_of_a_known_number():
    for kind, number in (("skip", "b"), ("tiles", r"9\*b")):
        model = still(make(KINDS[kind][0]), "compact", strategy="buckets")
        with pytest.raises(ValueError, match=f"how many units there are, and here there are {number}: .*'loop'"):
            exported(model, MAP)
    # The capacities of tokens are shares of one example's.
    model, x = at(-0.5, make(KINDS["tokens"][0])), some(3, TOKENS)
    program = exported(still(model, "compact", strategy="buckets"), TOKENS)
    np.testing.assert_allclose(program.call(x), jax.jit(still(model))(x), rtol=1e-4, atol=1e-5)


def test_a_deployed_model_is_exported_saved_and_read_back():
    pytest.importorskip("flatbuffers", reason="JAX saves programs with flatbuffers, which is no dependency of it")
    model, x = make(KINDS["skip"][0]), some(5, MAP)
    fast = dj.deploy(model, 0.6, [x])
    program = export.deserialize(export.export(jax.jit(fast))(spec(MAP)).serialize())
    for number in (2, 5):
        np.testing.assert_allclose(program.call(x[:number]), fast(x[:number]), rtol=1e-5, atol=1e-6)


def test_the_order_of_units_is_the_same_where_their_number_is_free():
    program = export.export(jax.jit(tiles.kept_first))(jax.ShapeDtypeStruct(export.symbolic_shape("n"), bool))
    for kept in (jnp.zeros(5, bool), jnp.ones(5, bool), jnp.arange(5) % 3 == 1):
        (order, number), (free, same) = tiles.kept_first(kept), program.call(kept)
        assert number == same == kept.sum() and order.dtype == free.dtype and order.shape == free.shape
        np.testing.assert_array_equal(free[:number], order[:number])
        assert (free < 5).all()


@pytest.mark.parametrize("kind", ["skip", "tiles", "tokens"])
def test_onnx(kind):
    """Through the jaxpr. jax2onnx puts its own in the place of layers and loops while it traces, and then fails."""
    jax2onnx = pytest.importorskip("jax2onnx", reason="jax2onnx is no dependency of dynjax")
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is no dependency of dynjax")
    build, threshold = KINDS[kind]
    # A map without cut tiles: jax2onnx cannot pad an array of a free size.
    model, shape = at(float(threshold), make(build)), TOKENS if kind == "tokens" else (12, 8, CHANNELS)
    compact, x = still(model, "compact", strategy="loop"), some(3, shape)
    any_batch = spec(shape)  # one for both, for a symbol is equal to itself only
    run = jex.jaxpr_as_fun(jax.make_jaxpr(lambda x: compact(x))(any_batch))
    program = jax2onnx.to_onnx(lambda x: run(x)[0], [any_batch])
    session = onnxruntime.InferenceSession(program.SerializeToString(), providers=["CPUExecutionProvider"])
    for number in (1, 3):
        (y,) = session.run(None, {session.get_inputs()[0].name: np.asarray(x[:number])})
        np.testing.assert_allclose(y, still(model)(x[:number]), rtol=1e-4, atol=1e-5)
    nodes = {node.op_type for node in program.graph.node}
    assert "If" in nodes and "Conv" not in nodes, "blocks of maps are convolutions, and all of them are in conditions"
