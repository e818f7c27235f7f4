"""Gated PixelCNN and transformer over pixels: causality by gradients; windows and caches agree with the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import make
from flax import nnx

from dynjax import budget, cost, models, traced
from dynjax.config import UserError
from dynjax.core.deploy import deploy
from dynjax.models.pixelcnn import PixelCNNConfig
from dynjax.models.pixeltransformer import PixelTransformerConfig

SHAPE = (4, 5, 1)
CONFIGS = {
    "pixelcnn": PixelCNNConfig(shape=SHAPE, values=3, features=6, layers=2),
    "pixelcnn of codes": PixelCNNConfig(shape=SHAPE, values=3, features=6, layers=2, embed=True),
    "pixelcnn in colour": PixelCNNConfig(shape=(4, 5, 3), values=256, likelihood="logistic", features=6, layers=2),
    "pixelcnn by label": PixelCNNConfig(shape=SHAPE, features=6, layers=2, conditional=True),
    "transformer": PixelTransformerConfig(shape=SHAPE, values=3, features=8, layers=2, heads=2),
    "transformer of codes": PixelTransformerConfig(shape=SHAPE, values=3, features=8, layers=2, heads=2, embed=True),
    "transformer with exits": PixelTransformerConfig(
        shape=SHAPE, values=3, features=8, layers=3, heads=2, dynamics="exits"
    ),
    "transformer by label": PixelTransformerConfig(shape=SHAPE, features=8, layers=2, heads=2, conditional=True),
}


def build(name):
    config = CONFIGS[name]
    model = make(lambda rngs: models.build(config, 10, rngs=rngs))
    budget.set_threshold(model, 2.5)  # of exits: some pixels leave and some do not
    return model


def pictures(model, number=2, seed=0):
    random = np.random.default_rng(seed)
    return jnp.asarray(random.integers(0, model.likelihood.values, (number, *model.shape)), jnp.int32)


def labels(model):
    return jnp.array([3, -1]) if model.classes else None


@pytest.mark.parametrize("name", [name for name in CONFIGS if "codes" not in name])
def test_no_gradient_from_a_pixel_to_itself_or_one_before(name, monkeypatch):
    """And one to each next pixel of a row, and to the one below."""
    model = build(name)
    height, width, _ = model.shape
    pixels, x, label = height * width, pictures(model, 1), jnp.array([3]) if model.classes else None
    enter = type(model)._enter

    def params(values):
        # Integers have no gradient, so it is taken to something added to their features.
        def shifted(model, x):
            entered = enter(model, x)
            return entered + values.reshape(*entered.shape[:-1], 1)

        monkeypatch.setattr(type(model), "_enter", shifted)
        # A weight for each parameter, so that they do not cancel: a softmax's do where a norm has centred features.
        out = model(x, label)
        return (out * jnp.arange(1.0, out.shape[-1] + 1)[None, None, None]).sum(-1).reshape(-1)

    seen = np.asarray(jax.jit(jax.jacobian(params))(jax.random.normal(jax.random.key(0), (pixels,)))) != 0
    assert not np.triu(seen).any(), "a pixel sees itself or one after it"
    if name.startswith("pixelcnn"):  # the first norm of the transformer takes out what is added to all features
        number = np.arange(pixels)
        assert seen[number[number % width > 0], number[number % width > 0] - 1].all(), "not the one to its left"
        assert seen[number[width:], number[width:] - width].all(), "not the one above"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_later_value_changes_nothing_before(name):
    """By values, which have no gradient: the pixel and all after it may be anything."""
    model = build(name)
    x, other = pictures(model), pictures(model, seed=1)
    height, width, _ = model.shape
    run = jax.jit(lambda x: model(x, labels(model)))
    whole = np.asarray(run(x)).reshape(2, height * width, -1)
    for number in (0, width - 1, width, height * width - 1):
        after = (jnp.arange(height * width) >= number).reshape(1, height, width, 1)
        changed = np.asarray(run(jnp.where(after, other, x))).reshape(2, height * width, -1)
        np.testing.assert_array_equal(changed[:, : number + 1], whole[:, : number + 1])


@pytest.mark.parametrize(
    "name", ["pixelcnn by label", "pixelcnn in colour", "transformer by label", "transformer with exits"]
)
def test_windows_after_a_cache_agree_with_the_whole(name):
    """Two windows, the second of each example starting elsewhere."""
    model = build(name)
    x, (units, size) = pictures(model), model.units
    first, window = jnp.array([1, 2]), 2

    @jax.jit
    def both(x):
        whole = model(x, labels(model)).reshape(2, units, size, -1)
        flat = x.reshape(2, units, size, -1)
        _, trail = model.window(flat[:, :window], model.start(2, window), jnp.zeros(2, jnp.int32), labels(model))
        cache = model.advance(model.start(2, window), trail, first)
        pick = lambda a: jnp.stack([a[0, 1:3], a[1, 2:4]])  # noqa: E731
        params, _ = model.window(pick(flat), cache, first, labels(model))
        return params, pick(whole)

    found, wanted = both(x)
    np.testing.assert_allclose(found, wanted, atol=2e-6)


@pytest.mark.parametrize("name", ["pixelcnn by label", "transformer by label"])
def test_the_label_matters(name):
    model = build(name)
    run = jax.jit(lambda label: model(pictures(model), label))
    found = [np.asarray(run(jnp.full(2, label))) for label in (-1, 0, 1)]
    assert np.abs(found[1] - found[2]).min(-1).max() > 0 and np.abs(found[0] - found[1]).max() > 0


# Exits


def blocks_of(model, x, threshold):
    """Parameters, blocks that every pixel took (B, H, W), and the trace, of a copy under `threshold`."""
    model = nnx.clone(model)
    budget.set_threshold(model, threshold)
    params, trace = nnx.jit(lambda model, x: traced(model)(x))(model, x)
    (decision,) = trace.decisions.values()
    return params, decision.keep.sum(-1), trace


def test_a_pixel_has_the_prediction_of_the_block_where_it_left_if_all_do():
    model = build("transformer with exits")
    x = pictures(model)
    every = jax.jit(model.predictions)(x)
    assert len(every) == 3
    for threshold, level in ((-30.0, 2), (30.0, 0)):
        params, taken, trace = blocks_of(model, x, threshold)
        np.testing.assert_allclose(params, every[level], atol=1e-6)
        assert (np.asarray(taken) == level + 1).all()
    assert float(trace.macs()[0]) < trace.full_macs


def test_exits_take_what_a_budget_allows_and_are_counted():
    model = build("transformer with exits")
    x = pictures(model, 8)
    _, taken, trace = blocks_of(model, x, 2.5)
    assert set(np.unique(taken)) == {1, 2, 3}
    blocks = cost.macs(
        lambda h: model.blocks[0].look(h, *[jnp.zeros((1, 20, 2, 4))] * 2, jnp.zeros(1, jnp.int32)),
        jax.ShapeDtypeStruct((1, 20, 8), jnp.float32),
    )
    spent = trace.full_macs - (3 - np.asarray(taken)).sum((1, 2)) / 20 * blocks
    np.testing.assert_allclose(trace.macs(), spent, rtol=1e-5)
    assert deploy(model, 0.9, [x]).report.met


def test_fewer_than_two_blocks_have_no_exit():
    with pytest.raises(UserError, match=r"--model\.layers is 1"):
        models.build(PixelTransformerConfig(layers=1, dynamics="exits"), 10, rngs=nnx.Rngs(0))


def test_features_that_no_head_can_share():
    with pytest.raises(UserError, match=r"--model\.features is 6"):
        make(lambda rngs: models.build(PixelTransformerConfig(features=6, heads=4), 10, rngs=rngs))
