"""What a trace says about a small model, worked out by hand and held against the MACs of its layers."""

import blocks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import CHANNELS, image, make, still
from flax import nnx
from flax.errors import TraceContextError

import dynjax as dj
from dynjax import cost
from dynjax.ops.kernels import CondConv

LINEAR = CHANNELS**2
KEEP_TILES = np.asarray([[[1, 0, 0], [0, 0, 1]], [[0, 0, 0], [0, 0, 0]]])


class Net(nnx.Module):
    """A static layer, a block per example, a block per tile on half the size, and one of two layers per example."""

    def __init__(self, rngs):
        self.stem = nnx.Linear(3, CHANNELS, rngs=rngs)
        self.skip, self.tiles = blocks.Pointwise(rngs), blocks.Pointwise(rngs)
        self.narrow = nnx.Linear(CHANNELS, CHANNELS, rngs=rngs)
        self.wide = nnx.Sequential(nnx.Linear(CHANNELS, 8, rngs=rngs), nnx.Linear(8, CHANNELS, rngs=rngs))
        self.select = None

    def __call__(self, x):
        x = self.skip(self.stem(x))
        return self.select(self.tiles(x[:, ::2, ::2]))


def net():
    model = make(Net)
    model.skip = dj.Skip(model.skip, dj.FixedGate([1, 0]))
    model.tiles = dj.Tiles(model.tiles, dj.FixedGate(KEEP_TILES, size=2))
    model.select = nnx.data(dj.Select([model.narrow, model.wide], dj.FixedGate([[0, 1], [1, 0]])))
    return model


@pytest.fixture(scope="module")
def trace():
    model, x = net(), image(2, 8, 10, 3)
    y, trace = dj.traced(model)(x)
    np.testing.assert_array_equal(y, model(x))
    return trace


def test_macs_by_hand(trace):
    # 8x10 pixels; 4x5 after the stride, in tiles of 2x2, which cost a whole tile where the border cuts them too.
    static, skip, tile = 80 * 3 * CHANNELS, 80 * LINEAR, 4 * LINEAR
    cheap, dear = 20 * LINEAR, 2 * 20 * CHANNELS * 8
    assert trace.static_macs == static
    assert trace.full_macs == static + skip + 20 * LINEAR + dear
    np.testing.assert_array_equal(trace.macs(), [static + skip + 2 * tile + dear, static + cheap])
    np.testing.assert_allclose(trace.fraction(), trace.macs() / trace.full_macs)


def test_shares_by_hand(trace):
    shares, total = trace.shares(), float(trace.macs().mean())
    assert set(shares) == {"skip", "tiles", "select"}
    assert {path: float(share["kept"]) for path, share in shares.items()} == pytest.approx(
        {"skip": 1 / 2, "tiles": 1 / 6, "select": 1 / 2}
    )
    assert float(shares["skip"]["macs"]) == pytest.approx(40 * LINEAR / total)
    assert float(shares["tiles"]["macs"]) == pytest.approx(4 * LINEAR / total)


def test_heat_map_by_hand(trace):
    heat = np.asarray(trace.heatmap((8, 10)))
    np.testing.assert_allclose(heat.sum((1, 2)), trace.macs(), rtol=1e-5)
    # A tile lies on 4x4 pixels of the picture, of which the last column of tiles has half: the other is spread evenly.
    even = np.asarray(trace.macs() - jnp.asarray([6 * LINEAR, 0])) / 80
    expected = np.zeros((2, 8, 10))
    expected[0, :4, :4] = 4 * LINEAR / 16
    expected[0, 4:, 8:] = 4 * LINEAR / 16
    np.testing.assert_allclose(heat, expected + even[:, None, None], rtol=1e-5)
    for size in ((16, 20), (7, 9), (2, 1)):
        np.testing.assert_allclose(trace.heatmap(size).sum((1, 2)), trace.macs(), rtol=1e-5)


def test_a_trace_passes_through_jit(trace):
    model, x = net(), image(2, 8, 10, 3)
    compiled = jax.jit(lambda x: dj.traced(model)(x)[1])(x)
    assert (compiled.static_macs, compiled.full_macs) == (trace.static_macs, trace.full_macs)
    np.testing.assert_array_equal(compiled.macs(), trace.macs())
    assert jax.tree.structure(compiled) == jax.tree.structure(trace)


def test_full_macs_are_those_of_the_model_without_wrappers():
    model, x = make(lambda rngs: nnx.Sequential(*(kind(rngs) for kind in blocks.RADIUS))), image(2, 9, 8, CHANNELS)
    plain = cost.macs(still(model), x) / 2
    for wrapper in (dj.Skip, dj.Tiles):
        kept = dj.FixedGate([1]) if wrapper is dj.Skip else dj.FixedGate(np.ones((1, 2, 1)), size=8)
        wrapped = dj.dynamize(
            model,
            {r"layers/[0-9]": lambda block, features, rngs, wrapper=wrapper, kept=kept: wrapper(block, kept)},
            rngs=nnx.Rngs(0),
        )
        trace = jax.eval_shape(lambda x, wrapped=wrapped: dj.traced(still(wrapped))(x)[1], x)
        assert len(trace.decisions) == 10
        assert trace.full_macs == pytest.approx(plain, rel=1e-9)
        static = cost.macs(still(model.layers[-1]), x) / 2
        assert trace.static_macs == pytest.approx(static, rel=1e-9)


def test_the_cost_of_gates_is_static():
    model = make(lambda rngs: dj.Skip(blocks.Pointwise(rngs), dj.SampleGate(CHANNELS, rngs=rngs)))
    trace = dj.traced(still(model))(image(3, 5, 5, CHANNELS))[1]
    assert trace.static_macs == CHANNELS * 16 + 16
    assert trace.full_macs == 25 * LINEAR + trace.static_macs


def test_a_wrapper_that_is_called_twice_is_counted_twice():
    block = dj.Skip(make(blocks.Pointwise), dj.FixedGate([1, 0]))
    trace = dj.traced(nnx.Sequential(block, block))(image(2, 5, 5, CHANNELS))[1]
    assert list(trace.decisions) == ["layers/0", "layers/0#1"]
    assert (trace.static_macs, trace.full_macs) == (0, 2 * 25 * LINEAR)
    np.testing.assert_array_equal(trace.macs(), [2 * 25 * LINEAR, 0])


def test_a_model_without_decisions():
    model, x = make(blocks.Pointwise), image(2, 5, 5, CHANNELS)
    trace = dj.traced(model)(x)[1]
    assert trace.decisions == {} and trace.static_macs == trace.full_macs == 25 * LINEAR
    np.testing.assert_array_equal(trace.macs(), [25 * LINEAR] * 2)
    np.testing.assert_allclose(trace.heatmap((5, 5)), LINEAR)


def test_functions_and_methods():
    model, x = net(), image(2, 8, 10, 3)

    def fn(model, scale, x):
        return scale * model(x)

    y, trace = dj.traced(fn)(model, 2.0, x=x)
    np.testing.assert_allclose(y, 2 * model(x), rtol=1e-6)
    assert set(trace.decisions) == {"skip", "tiles", "select"} and trace.examples == 2
    y, again = dj.traced(model.__call__)(x)
    assert again.full_macs == trace.full_macs
    with pytest.raises(ValueError, match="a function whose first argument is one"):
        dj.traced(lambda x: x)(x)
    with pytest.raises(ValueError, match="no argument is an array"):
        dj.traced(lambda model: 0)(model)


def gated(rngs):
    inner = nnx.List([dj.Skip(blocks.Residual(rngs), dj.SampleGate(CHANNELS, rngs=rngs)) for _ in range(2)])
    return nnx.Sequential(*inner, dj.Tiles(blocks.Residual(rngs), dj.TileGate(CHANNELS, size=4, rngs=rngs)))


def test_training_under_nnx_jit_and_grad():
    """Noise is drawn anew, statistics move, and the MACs have a gradient that reaches the gates alone."""
    model, x = make(gated), image(4, 9, 8, CHANNELS)

    def loss(model, x):
        _, trace = dj.traced(model)(x)
        return trace.macs().sum(), trace

    step = nnx.jit(nnx.grad(loss, has_aux=True))
    mean = model.layers[0].block.norm1.mean[...]
    grads, trace = step(model, x)
    assert (model.layers[0].block.norm1.mean[...] != mean).any()
    for path, gradient in nnx.to_flat_state(grads):
        if "gate" in path and path[-1] == "bias":
            assert (gradient[...] > 0).all()
        if "block" in path and "layers/2" in "/".join(map(str, path)):
            assert not gradient[...].any()
    assert trace.examples == 4 and len(trace.decisions) == 3
    drawn = [step(model, x)[1] for _ in range(4)]
    assert any((t.decisions["layers/2"].keep != trace.decisions["layers/2"].keep).any() for t in drawn)


@pytest.mark.parametrize("kind", [blocks.Pointwise, blocks.Residual], ids=lambda kind: kind.__name__)
def test_training_in_a_jit_that_closes_over_the_model_says_what_to_do(kind):
    model = make(lambda rngs: dj.Skip(kind(rngs), dj.SampleGate(CHANNELS, rngs=rngs)))
    x = image(2, 5, 5, CHANNELS)
    with pytest.raises(TraceContextError, match=r"traced: .*argument to nnx\.jit"):
        jax.jit(lambda x: dj.traced(model)(x)[1].macs())(x)
    graphdef, state = nnx.split(model)
    jax.jit(lambda state, x: dj.traced(nnx.merge(graphdef, state, copy=True))(x)[1].macs())(state, x)


# Decisions that JAX's transformations would lose


class Looped(nnx.Module):
    """A skipped block, called by a function that transforms it."""

    def __init__(self, call, mixed=False):
        self.skip, self.call = make(lambda rngs: conv(rngs) if mixed else gated_block(rngs)), call

    def __call__(self, x):
        return self.call(self.skip, x)


def gated_block(rngs):
    return dj.Skip(blocks.Pointwise(rngs), dj.SampleGate(CHANNELS, rngs=rngs))


def conv(rngs):
    return CondConv(CHANNELS, CHANNELS, (1, 1), kernels=2, rngs=rngs)


def once(module, x):
    return module(x)


@nnx.scan(in_axes=(nnx.Carry, None), out_axes=nnx.Carry, length=2)
def _scanned(x, module):  # one function, which JAX need not trace again for a second call
    return module(x)


LOSE = {
    "scan": lambda m, x: jax.lax.scan(lambda x, _: (m(x), None), x, None, length=2)[0],
    "fori_loop": lambda m, x: jax.lax.fori_loop(0, 2, lambda _, x: m(x), x),
    "while_loop": lambda m, x: jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, m(c[1])), (0, x))[1],
    "map": lambda m, x: jax.lax.map(lambda x: m(x[None])[0], x),
    "vmap": lambda m, x: jax.vmap(lambda x: m(x[None])[0])(x),
    "cond": lambda m, x: jax.lax.cond(x.sum() > 0, m, lambda x: x, x),
    "checkpoint": lambda m, x: jax.checkpoint(lambda x: m(x))(x),
    "jit": lambda m, x: jax.jit(lambda x: m(x))(x),
    "nnx.scan": lambda m, x: _scanned(x, m),
    "nnx.fori_loop": lambda m, x: nnx.fori_loop(0, 2, lambda _, c: (c[0], c[0](c[1])), (m, x))[1],
    "nnx.vmap": lambda m, x: nnx.vmap(lambda m, x: m(x[None])[0], in_axes=(None, 0))(m, x),
    "nnx.cond": lambda m, x: nnx.cond(x.sum() > 0, once, lambda m, x: x, m, x),
}


@pytest.mark.parametrize("mixed", [False, True], ids=["skip", "kernels"])
@pytest.mark.parametrize("name", LOSE)
def test_a_decision_that_would_be_lost_in_a_loop_of_the_users_is_refused_aloud(name, mixed):
    model, x = still(Looped(LOSE[name], mixed)), image(2, 3, 3, CHANNELS)
    for _ in range(2):
        with pytest.raises(
            ValueError,
            match=r"(at 'skip'|a module) decides inside a function that JAX transforms.*nnx\.remat or nnx\.jit",
        ):
            dj.traced(model)(x)


def test_deploy_refuses_what_it_cannot_see_and_a_call_without_a_trace_goes_on():
    model, x = Looped(LOSE["fori_loop"]), image(2, 3, 3, CHANNELS)
    with pytest.raises(ValueError, match="Skip at 'skip' decides inside a function that JAX transforms"):
        dj.deploy(model, 0.5, [x])
    masked, compact = (jax.jit(still(model, way))(x) for way in ("masked", "compact"))
    np.testing.assert_allclose(masked, compact, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(masked, still(model).skip(still(model).skip(x)), rtol=1e-5, atol=1e-6)


@nnx.jit
def _jitted(module, x):
    return module(x)


@pytest.mark.parametrize("call", [lambda m, x: nnx.remat(once)(m, x), _jitted], ids=["remat", "jit"])
def test_remat_and_jit_of_nnx_carry_decisions_out_with_their_gradients(call):
    model, x = still(Looped(call)), image(3, 3, 3, CHANNELS)
    plain = still(Looped(once))

    @nnx.jit
    def both(models, x):
        def spent(model):
            trace = dj.traced(model)(x)[1]
            return trace.macs().sum() + dj.budget_loss(trace, 0.5), trace

        train = [nnx.view(model, deterministic=False) for model in models]
        return [spent(model) for model in models], [nnx.grad(spent, has_aux=True)(model)[0] for model in train]

    ((a, trace), (b, expected)), grads = both([model, plain], x)
    assert a == b and list(trace.decisions) == list(expected.decisions) == ["skip"]
    assert (trace.static_macs, trace.full_macs) == (expected.static_macs, expected.full_macs)
    for each in grads:
        assert np.asarray(each["skip"]["gate"]["logits"]["bias"][...]).any()
    found = dj.deploy(model, 1.0, [x])
    assert found.report.full == expected.full_macs
