"""A batch spread over four devices: each computes its own examples, and nothing is gathered, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import CHANNELS, Pointwise, Tokens, image, make, still
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import dynjax as dj
from dynjax.core import convolve, deployed


class Net(nnx.Module):
    def __init__(self, rngs):
        self.tiles = dj.Tiles(nnx.Conv(CHANNELS, CHANNELS, (3, 3), rngs=rngs), dj.TileGate(CHANNELS, size=4, rngs=rngs))
        self.skip = dj.Skip(Pointwise(rngs), dj.SampleGate(CHANNELS, rngs=rngs))
        self.head = nnx.Linear(CHANNELS, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.skip(self.tiles(x)).mean((1, 2)))


KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
X = image(8, 8, 8, CHANNELS) * jnp.linspace(0.1, 3, 8)[:, None, None, None]


@pytest.fixture(scope="module")
def fast():
    return dj.deploy(make(Net), 0.6, [X])


@pytest.fixture(scope="module")
def expected(fast):
    return np.asarray(fast(X))


def mesh_of(kind, shape=(4,), names=("data",)):
    return jax.make_mesh(shape, names, axis_types=(KINDS[kind],) * len(shape), devices=jax.devices()[: np.prod(shape)])


def close(found, expected):
    np.testing.assert_allclose(np.asarray(jax.device_get(found)), expected, rtol=1e-5, atol=1e-6)


def program(fast, *args):
    """The compiled program of a call by itself."""
    fixed, arrays = deployed.apart(args, {})
    graphdef, state = nnx.split(fast.model)
    key = graphdef, fast.method, fixed, *deployed._batch(arrays, fast.axis), True
    return deployed._compiled.lower(key, state, arrays).compile().as_text()


@pytest.mark.parametrize("kind", KINDS)
def test_each_device_computes_its_own_examples(fast, expected, kind):
    x = jax.device_put(X, NamedSharding(mesh_of(kind), P("data")))
    y = fast(x)
    close(y, expected)
    assert y.sharding.spec[0] == "data"
    text = program(fast, x)
    assert "all-gather" not in text and "all-to-all" not in text and "while" in text


@pytest.mark.parametrize("kind", KINDS)
def test_inside_of_jit(fast, expected, kind):
    """Explicit axes are seen there; Auto axes have to be named."""
    mesh = mesh_of(kind)
    x = jax.device_put(X, NamedSharding(mesh, P("data")))
    fast = dj.Deployed(fast.model, axis="data" if kind == "auto" else None)
    with jax.set_mesh(mesh):
        run = jax.jit(lambda x: fast(x))
        close(run(x), expected)
        assert "all-gather" not in run.lower(x).compile().as_text()


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_may_be_sharded_too(expected, kind):
    mesh = mesh_of(kind, (2, 2), ("data", "model"))

    def place(a):
        wide = a.ndim > 1 and a.shape[-1] % 2 == 0
        return jax.device_put(a, NamedSharding(mesh, P(*[None] * (a.ndim - 1), "model") if wide else P()))

    graphdef, state = nnx.split(make(Net))
    spread = jax.device_put(X, NamedSharding(mesh, P("data")))
    for calibration in (X, spread):
        fast = dj.deploy(nnx.merge(graphdef, jax.tree.map(place, state)), 0.6, [calibration])
    close(fast(spread), expected)


def test_training_on_explicit_axes_traces_what_one_device_traces(fast):
    x = jax.device_put(X, NamedSharding(mesh_of("explicit"), P("data")))
    masked = still(nnx.view(fast.model, execution="masked"))
    one, four = (jax.jit(lambda x: dj.traced(masked)(x)[1])(each) for each in (X, x))
    close(four.macs(), np.asarray(one.macs()))
    assert (four.examples, four.full_macs) == (8, one.full_macs)


def test_a_trace_of_a_spread_batch_is_that_of_all_examples(fast):
    x = jax.device_put(X, NamedSharding(mesh_of("auto"), P("data")))
    trace = dj.traced(fast)(x)[1]
    close(trace.macs(), np.asarray(dj.traced(fast)(X)[1].macs()))


class Pool(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(CHANNELS, 3, rngs=rngs)

    def __call__(self, x):
        return self.dense(x.mean((1, 2)))


def conv(rngs, size=3):
    return nnx.Conv(CHANNELS, CHANNELS, (size, size), rngs=rngs)


WRAPPERS = {
    "Tiles": lambda r: dj.Tiles(conv(r), dj.TileGate(CHANNELS, size=4, rngs=r)),
    "Skip": lambda r: dj.Skip(conv(r), dj.SampleGate(CHANNELS, rngs=r)),
    "Select": lambda r: dj.Select([conv(r, 1), conv(r)], dj.BranchGate(CHANNELS, 2, rngs=r)),
    "Select per tile": lambda r: dj.Select([conv(r, 1), conv(r)], dj.BranchGate(CHANNELS, 2, size=4, rngs=r)),
    "Exits": lambda r: dj.Exits([conv(r), conv(r)], [Pool(r), Pool(r)], at=0.4),
    "Halt": lambda r: dj.Halt(conv(r), dj.SampleGate(CHANNELS, rngs=r), 2),
    "Halt per tile": lambda r: dj.Halt(conv(r), dj.TileGate(CHANNELS, size=4, rngs=r), 2),
    "PolicySkip": lambda r: dj.PolicySkip([conv(r), conv(r)], dj.ChannelGate(CHANNELS, 2, rngs=r)),
    "MixtureOfDepths": lambda r: dj.MixtureOfDepths(Tokens(r), dj.TokenGate(CHANNELS, rngs=r)),
    "Experts": lambda r: dj.Experts(CHANNELS, 4, 2, rngs=r),
    "Channels": lambda r: dj.Channels(conv(r), conv(r), dj.ChannelGate(CHANNELS, 2, rngs=r)),
    "Slimmable": lambda r: dj.Slimmable(conv(r), conv(r), dj.BranchGate(CHANNELS, 2, rngs=r), widths=(0.5, 1)),
}


@pytest.mark.parametrize("strategy", ["loop", "buckets"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_in_a_shard_map_of_the_users(name, strategy):
    """With JAX's check of what differs between devices, which is on by default."""
    model, x = make(WRAPPERS[name]), image(4, 8, 8, CHANNELS)
    x = {"MixtureOfDepths": x[:, 0], "Experts": x[:, 0, 0]}.get(name, x)
    mesh = mesh_of("auto", (2,))
    compact = still(model, "compact", strategy=strategy)
    run = jax.shard_map(lambda x: compact(x), mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    close(jax.jit(run)(x), np.asarray(jax.jit(lambda x: still(model)(x))(x)))


def test_what_has_no_examples_cannot_be_spread(fast):
    class Mean(nnx.Module):
        def __init__(self, model):
            self.model = model

        def __call__(self, x):
            return self.model(x).mean()

    x = jax.device_put(X, NamedSharding(mesh_of("auto"), P("data")))
    with pytest.raises(ValueError, match=r"a batch of 8 examples is spread over devices, and an output has shape \(\)"):
        dj.Deployed(Mean(fast.model))(x)


def of_depthwise(x, kernel):
    return jax.grad(lambda x, k: (convolve.depthwise(x, k, strategy="shifted") ** 2).sum(), (0, 1))(x, kernel)


def of_product(x, kernel):
    return jax.grad(lambda x, k: (convolve.product(x, k) ** 2).sum(), (0, 1))(x, kernel)


GRADIENTS = {"depthwise": (of_depthwise, (3, 3, 1, CHANNELS)), "product": (of_product, (CHANNELS, 5))}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_as_a_cpu_wants_them_gather_no_examples(name, kind):
    gradients, shape = GRADIENTS[name]
    kernel = jax.random.normal(jax.random.key(0), shape)
    wanted = jax.jit(gradients)(X, kernel)
    mesh = mesh_of(kind)
    x, kernel = jax.device_put(X, NamedSharding(mesh, P("data"))), jax.device_put(kernel, NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        found = jax.jit(gradients)(x, kernel)
        text = jax.jit(gradients).lower(x, kernel).compile().as_text()
    assert found[0].sharding.spec[0] == "data" and "all-gather" not in text and "all-to-all" not in text
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(jax.device_get(one)), other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_as_a_cpu_wants_them_in_a_shard_map_of_the_users(name):
    gradients, shape = GRADIENTS[name]
    kernel, mesh = jax.random.normal(jax.random.key(0), shape), mesh_of("auto", (2,))

    def summed(x, kernel):
        to_x, to_kernel = gradients(x, jax.lax.pcast(kernel, "data", to="varying"))
        return to_x, jax.lax.psum(to_kernel, "data")

    run = jax.shard_map(summed, mesh=mesh, in_specs=(P("data"), P()), out_specs=(P("data"), P()))
    for one, other in zip(jax.jit(run)(X, kernel), jax.jit(gradients)(X, kernel), strict=True):
        np.testing.assert_allclose(np.asarray(jax.device_get(one)), other, rtol=1e-4, atol=1e-3)
