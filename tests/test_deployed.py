"""How a deployed model is called: as the model was, mapped, and not differentiated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import CHANNELS, Pointwise, image, make, still
from flax import nnx

import dynjax as dj


class Net(nnx.Module):
    """Called with a flag, a mask and a tree; encodes and decodes; keeps flags that nnx has no view for."""

    def __init__(self, rngs):
        self.encoder = dj.Skip(Pointwise(rngs), dj.SampleGate(CHANNELS, rngs=rngs))
        self.head = nnx.Linear(CHANNELS, 3, rngs=rngs)
        self.noisy = Noisy()
        self.width = 7

    def encode(self, x, *, flip=False):
        return self.encoder(self.noisy(x[:, ::-1] if flip else x))

    def __call__(self, batch, mask=None, *, training=True):
        if training:
            raise AssertionError("it was said that it does not train")
        y = self.encode(batch["image"])
        return {"y": self.head(y if mask is None else y * mask[..., None]), "n": batch["extra"][0]}


class Noisy(nnx.Module):
    def __init__(self):
        self.training, self.deterministic, self.use_running_average = True, False, False

    def __call__(self, x):
        return x if not self.training and self.deterministic and self.use_running_average else x * jnp.nan


X = image(6, 4, 4, CHANNELS) * jnp.linspace(0.1, 3, 6)[:, None, None, None]
BATCH = {"image": X, "extra": (jnp.arange(6.0),)}


@pytest.fixture(scope="module")
def model():
    return make(Net)


@pytest.fixture(scope="module")
def fast(model):
    return dj.deploy(model, 0.8, [((BATCH,), {"training": False})])


def test_whole_calls_with_trees_flags_and_masks(model, fast):
    mask = jnp.ones((6, 4, 4)).at[:, 0].set(0)
    assert fast.report.met
    masked = nnx.view(fast, execution="masked")
    for args in ((BATCH,), (BATCH, mask)):
        found, expected = fast(*args, training=False), masked(*args, training=False)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)
        assert np.isfinite(found["y"]).all(), "flags of modules that have no view are turned off as well"
    assert model.noisy.training and not model.noisy.deterministic, "the model itself is as it was"


def test_a_method_and_what_else_the_model_has(model):
    fast = dj.deploy(model, 0.5, [((X,), {"flip": True})], method="encode")
    expected = still(fast.model, "masked").encode(X, flip=True)
    np.testing.assert_allclose(fast(X, flip=True), expected, rtol=1e-5, atol=1e-6)
    assert fast.width == 7 and fast.head is fast.model.head
    np.testing.assert_allclose(fast.encode(X), still(fast.model, "masked").encode(X), rtol=1e-5, atol=1e-6)
    with pytest.raises(AttributeError, match="nothing"):
        _ = fast.nothing


def test_one_tree_as_the_one_argument(model):
    class First(nnx.Module):
        def __init__(self, net):
            self.net = net

        def __call__(self, batch):
            return self.net.encode(batch["image"]) + batch["extra"][0][:, None, None, None]

    fast = dj.deploy(First(model), 0.5, [BATCH])
    assert fast(BATCH).shape == X.shape and fast.report.met


def test_vmap_makes_a_larger_batch(model):
    fast = dj.deploy(model, 0.5, [X], method="encode")
    y = np.asarray(fast(X))
    one = jax.vmap(lambda x: fast(x[None])[0])
    np.testing.assert_allclose(one(X), y, rtol=1e-5, atol=1e-6)
    pairs = X.reshape(3, 2, *X.shape[1:])
    np.testing.assert_allclose(jax.vmap(fast)(pairs).reshape(y.shape), y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(jax.vmap(lambda x: fast(x[None])[0])))(pairs).reshape(y.shape), y, rtol=1e-5
    )
    # A condition that is mapped computes both branches and selects among maps; a loop runs as long as the longest.
    unfolded = still(fast.model, "compact")
    assert selections(jax.vmap(lambda x: unfolded.encode(x[None])[0])) > 0
    assert selections(one) == 0
    loops = [str(jax.make_jaxpr(run)(X)).count("while[") for run in (one, fast)]
    assert loops[0] == loops[1] > 0


def selections(run):
    """How many maps of all examples the mapped `run` selects."""
    lines = str(jax.make_jaxpr(run)(X)).splitlines()
    return sum("select_n" in line and "f32[6,1,4,4" in line for line in lines)


def test_vmap_of_what_has_no_examples_is_a_loop(model):
    """An argument for each call, beside a batch that all of them share."""

    class Scaled(nnx.Module):
        def __init__(self, net):
            self.net = net

        def __call__(self, x, scale):
            return self.net.encode(x * scale)

    fast = dj.deploy(Scaled(model), 0.5, [((X, jnp.float32(2)), {})])
    scales = jnp.array([1.0, 2.0, 0.5])
    found = jax.vmap(fast, in_axes=(None, 0))(X, scales)
    for each, scale in zip(found, scales, strict=True):
        np.testing.assert_allclose(each, fast(X, scale), rtol=1e-5, atol=1e-6)
    shared = jax.vmap(lambda x, y: fast(x[None], jnp.float32(1))[0] + y)(X, jnp.ones(6))
    np.testing.assert_allclose(shared, fast(X, jnp.float32(1)) + 1, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", ["loop", "buckets"])
def test_a_derivative_of_compact_execution_is_one_sentence(model, strategy):
    fast = dj.deploy(model, 0.5, [X], method="encode")
    fast = nnx.view(fast, strategy=strategy)
    for derivative in (jax.grad(lambda x: fast(x).sum()), jax.jit(jax.grad(lambda x: fast(x).sum()))):
        with pytest.raises(ValueError, match=r"compact execution has no derivative.*execution='masked'"):
            derivative(X)
    tiles = still(make(lambda rngs: dj.Tiles(Pointwise(rngs), dj.TileGate(CHANNELS, size=2, rngs=rngs))), "compact")
    with pytest.raises(ValueError, match="compact execution has no derivative"):
        jax.grad(lambda x: tiles(x).sum())(X)
    masked = nnx.view(fast, execution="masked")
    assert np.isfinite(jax.grad(lambda x: masked(x).sum())(X)).all()
