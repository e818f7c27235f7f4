"""Convolutions with kernels of the input: both strategies, their gradients, and per-pixel kernels, against plain loops.

Letters as in convolve.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import image
from flax import nnx
from jax import lax

import dynjax as dj
from dynjax import cost
from dynjax.core import convolve

STRATEGIES = ("loop", "grouped")
# x, kernel (kh, kw, I, D), options
CASES = {
    "plain": ((3, 7, 5, 4), (3, 3, 4, 6), {}),
    "one example": ((1, 6, 6, 2), (3, 3, 2, 2), {}),
    "one tap": ((2, 5, 4, 3), (1, 1, 3, 2), {}),
    "strides": ((2, 9, 8, 2), (3, 3, 2, 3), dict(strides=2)),
    "strides that leave rows": ((2, 8, 11, 2), (3, 2, 2, 3), dict(strides=(3, 2), padding="VALID")),
    "dilation": ((2, 9, 7, 2), (3, 3, 2, 2), dict(dilation=2)),
    "even sides": ((2, 6, 7, 2), (2, 4, 2, 2), {}),
    "groups": ((2, 6, 5, 6), (3, 3, 2, 9), dict(groups=3)),
    "depthwise": ((2, 6, 5, 4), (3, 3, 1, 4), dict(groups=4)),
    "strided groups": ((2, 7, 6, 4), (3, 3, 2, 4), dict(groups=2, strides=2, dilation=(1, 2))),
    "pixels of padding": ((2, 6, 5, 2), (3, 3, 2, 2), dict(padding=1, strides=(1, 2))),
    "wide padding": ((2, 4, 5, 2), (2, 2, 2, 2), dict(padding=((3, 0), (1, 2)))),
}


def one_by_one(x, kernels, strides=1, padding="SAME", dilation=1, groups=1):
    """The definition: a convolution for each example."""
    strides, dilation = np.broadcast_to(strides, 2), np.broadcast_to(dilation, 2)
    if not isinstance(padding, str):
        # Padded beforehand: XLA's own gradient on CPUs is wrong where the padding is as wide as the kernel.
        pads = np.broadcast_to(padding, (2, 2)).tolist()
        x, padding = jnp.pad(x, ((0, 0), *pads, (0, 0))), "VALID"
    convolve_one = lambda a, k: lax.conv_general_dilated(  # noqa: E731
        a[None],
        k,
        tuple(strides.tolist()),
        padding,
        rhs_dilation=tuple(dilation.tolist()),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    return jnp.concatenate([convolve_one(a, k) for a, k in zip(x, kernels, strict=True)])


def per_example(x, kernels, **options):
    """Example b convolved with kernels[b]."""
    return convolve.generated(x, kernels, (), lambda code, shared: code, **options)


@pytest.mark.parametrize("name", CASES)
def test_both_strategies_are_the_convolution_of_each_example_and_so_are_their_gradients(name):
    shape, kernel, options = CASES[name]
    x, kernels = image(*shape), image(shape[0], *kernel, seed=1)

    @jax.jit
    def run(x, kernels):
        definition = one_by_one(x, kernels, **options)
        slopes = image(*definition.shape, seed=2)
        ways = [lambda *a: one_by_one(*a, **options)]
        strategies = STRATEGIES[: 1 if name == "wide padding" else 2]
        ways += [lambda *a, s=s: per_example(*a, **options, strategy=s) for s in strategies]
        return [(lambda y, back: (y, *back(slopes)))(*jax.vjp(way, x, kernels)) for way in ways]

    expected, *found = run(x, kernels)
    for way in found:
        for y, e in zip(way, expected, strict=True):
            assert y.shape == e.shape
            np.testing.assert_allclose(y, e, rtol=0, atol=1e-5 * float(jnp.abs(e).max()))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_mixture_is_mixed_before_and_its_gradients_reach_weights_and_kernels(strategy):
    x, weights, kernels = image(3, 5, 6, 2), image(3, 4, seed=1), image(4, 3, 3, 2, 3, seed=2)

    def mixed(x, weights, kernels):
        return convolve.generated(x, weights, kernels, convolve.mixture, strategy=strategy)

    def definition(x, weights, kernels):
        return one_by_one(x, jnp.einsum("bk,khwcd->bhwcd", weights, kernels))

    def both(*args):
        return [(f(*args), jax.grad(lambda a, f=f: (f(*a) ** 3).sum())(args)) for f in (mixed, definition)]

    found, expected = jax.jit(both)(x, weights, kernels)
    for y, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(y, e, rtol=0, atol=1e-5 * float(jnp.abs(e).max()))


def test_half_precision_and_types_that_differ():
    x, kernels = image(2, 5, 5, 2), image(2, 3, 3, 2, 2, seed=1)
    whole = per_example(x, kernels)
    for strategy in STRATEGIES:
        half = per_example(x.astype(jnp.bfloat16), kernels.astype(jnp.bfloat16), strategy=strategy)
        assert half.dtype == jnp.bfloat16
        np.testing.assert_allclose(half.astype(jnp.float32), whole, atol=0.2)
        loss = lambda x, k, s=strategy: per_example(x, k, strategy=s).sum()  # noqa: E731
        dx, dk = jax.grad(loss, (0, 1))(x, kernels.astype(jnp.bfloat16))
        assert (dx.dtype, dk.dtype) == (jnp.float32, jnp.bfloat16)


def test_macs_are_those_of_the_static_convolution_and_of_the_mixture():
    x, weights, kernels = image(5, 6, 6, 4), image(5, 3, seed=1), image(3, 3, 3, 4, 8, seed=2)
    taps = (3 * 6 - 2) ** 2  # those on the padding are not counted
    for strategy in STRATEGIES:
        macs = cost.macs(
            lambda x, w, k, s=strategy: convolve.generated(x, w, k, convolve.mixture, strategy=s), x, weights, kernels
        )
        assert macs == 5 * (taps * 4 * 8 + 3 * 9 * 4 * 8)


def test_mistakes_are_named():
    x, kernels = image(2, 5, 5, 4), image(2, 3, 3, 4, 6)
    with pytest.raises(ValueError, match=r"\(3, 3, 4, 6\) do not fit 4 channels in groups=2"):
        per_example(x, kernels, groups=2)
    with pytest.raises(ValueError, match=r"do not fit 4 channels in groups=4"):
        per_example(x, kernels[:, :, :, :1], groups=4)
    with pytest.raises(ValueError, match=r"2 examples and kernels for \[1\]"):
        convolve.generated(x, kernels[:1], (), lambda code, shared: code)
    with pytest.raises(ValueError, match="padding='CIRCULAR' must be"):
        per_example(x, kernels, padding="CIRCULAR")
    with pytest.raises(ValueError, match="strides=0 must be"):
        per_example(x, kernels, strides=0)


# Per pixel


def pixel_by_pixel(x, kernels, channel_kernels=None, strides=1, dilation=1):
    """The definition, in NumPy."""
    x, kernels = np.asarray(x, np.float64), np.asarray(kernels, np.float64)
    batch, height, width, kh, kw, groups = kernels.shape
    channels = x.shape[3]
    (sh, sw), (dh, dw) = np.broadcast_to(strides, 2), np.broadcast_to(dilation, 2)
    # The kernel of output pixel (i, j) is centred on the pixel (i, j) times the strides.
    top, left = (kh - 1) * dh // 2, (kw - 1) * dw // 2
    y = np.zeros((batch, height, width, channels))
    for b, i, j, u, v, c in np.ndindex(batch, height, width, kh, kw, channels):
        row, column = i * sh + u * dh - top, j * sw + v * dw - left
        if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
            factor = 1 if channel_kernels is None else channel_kernels[b, u, v, c]
            y[b, i, j, c] += kernels[b, i, j, u, v, c * groups // channels] * factor * x[b, row, column, c]
    return y


PIXELS = {
    "plain": ((2, 5, 4, 6), (5, 4, 3, 3, 2), {}),
    "one group": ((1, 4, 5, 3), (4, 5, 3, 3, 1), {}),
    "a group each": ((1, 3, 4, 2), (3, 4, 1, 3, 2), {}),
    "dilation": ((1, 7, 6, 2), (7, 6, 3, 3, 1), dict(dilation=(2, 1))),
    "strides": ((2, 7, 6, 4), (4, 3, 3, 3, 2), dict(strides=2)),
    "both": ((1, 8, 9, 2), (4, 3, 3, 2, 1), dict(strides=(2, 3), dilation=2)),
}


@pytest.mark.parametrize("name", PIXELS)
@pytest.mark.parametrize("decoupled", [False, True])
def test_per_pixel_is_its_definition(name, decoupled):
    shape, kernel, options = PIXELS[name]
    x, kernels = image(*shape), image(shape[0], *kernel, seed=1)
    options = options | (dict(channel_kernels=image(shape[0], *kernel[2:4], shape[3], seed=2)) if decoupled else {})
    y = jax.jit(lambda x, k, o=options: convolve.per_pixel(x, k, **o))(x, kernels)
    np.testing.assert_allclose(y, pixel_by_pixel(x, kernels, **options), atol=1e-5)


@pytest.mark.parametrize("side", [3, 5])
def test_identity_taps_give_the_pixels_that_the_kernels_belong_to(side):
    for size, stride, dilation in [(8, 2, 1), (9, 2, 1), (8, 3, 1), (9, 3, 1), (10, 3, 2), (8, (2, 3), 1)]:
        x = jnp.arange(float(size * size)).reshape(1, size, size, 1)
        down, across = np.broadcast_to(stride, 2)
        pixels = x[:, ::down, ::across]
        taps = jnp.zeros((side, side)).at[side // 2, side // 2].set(1)
        kernels = jnp.broadcast_to(taps[..., None], (*pixels.shape[:3], side, side, 1))
        y = jax.jit(lambda x, k, s=stride, d=dilation: convolve.per_pixel(x, k, strides=s, dilation=d))(x, kernels)
        np.testing.assert_array_equal(y, pixels, err_msg=f"{size} pixels, stride {stride}, dilation {dilation}")


def test_one_kernel_for_all_pixels_is_a_depthwise_convolution():
    x, kernel = image(2, 6, 5, 4), image(3, 3, 1, seed=1)
    kernels = jnp.broadcast_to(kernel, (2, 6, 5, 3, 3, 1))
    depthwise = jnp.tile(kernel[None, ..., None], (2, 1, 1, 1, 4))
    np.testing.assert_allclose(
        convolve.per_pixel(x, kernels), per_example(x, depthwise, groups=4), rtol=1e-5, atol=1e-5
    )


def test_macs_and_mistakes_per_pixel():
    x, kernels = image(2, 5, 4, 6), image(2, 5, 4, 3, 3, 2)
    assert cost.macs(convolve.per_pixel, x, kernels) == 2 * 5 * 4 * 9 * 6
    both = lambda x, k, c: convolve.per_pixel(x, k, channel_kernels=c)  # noqa: E731
    assert cost.macs(both, x, kernels, image(2, 3, 3, 6)) == 2 * 2 * 5 * 4 * 9 * 6
    with pytest.raises(ValueError, match=r"one for each of \(2, 3, 2\) output pixels"):
        convolve.per_pixel(x, kernels, strides=2)
    with pytest.raises(ValueError, match="6 channels cannot be parted into groups=4"):
        convolve.per_pixel(x, image(2, 5, 4, 3, 3, 4))


# As the platform wants it

LAYERS = {
    "depthwise": dict(kernel_size=(3, 3), feature_group_count=6),
    "depthwise, strides": dict(kernel_size=(5, 3), strides=(2, 1), feature_group_count=6),
    "depthwise, dilated": dict(kernel_size=(3, 3), kernel_dilation=(2, 1), feature_group_count=6, padding=2),
    "depthwise, valid": dict(kernel_size=(3, 3), feature_group_count=6, padding="VALID"),
    "one pixel": dict(kernel_size=(1, 1)),
    "one pixel, strides": dict(kernel_size=(1, 1), strides=2),
    "one pixel, padded": dict(kernel_size=(1, 1), padding=1),
    "groups": dict(kernel_size=(3, 3), feature_group_count=2),
    "plain": dict(kernel_size=(3, 3), strides=2),
    "few numbers, strides": dict(kernel_size=(3, 2), strides=(2, 1)),
    "few numbers, dilated": dict(kernel_size=(2, 3), strides=(1, 3), kernel_dilation=(1, 2), padding=((0, 3), (2, 1))),
    "few numbers, valid": dict(kernel_size=(2, 2), strides=2, padding="VALID"),
    "circular": dict(kernel_size=(3, 3), feature_group_count=6, padding="CIRCULAR"),
    "transposed": dict(kernel_size=(3, 3), feature_group_count=6, input_dilation=2, padding=1),
    "precise": dict(kernel_size=(1, 1), precision="highest"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_convolution_is_the_one_of_lax(name):
    theirs = nnx.Conv(6, 6, **LAYERS[name], rngs=nnx.Rngs(0))
    ours = convolve.by_platform(nnx.clone(theirs))
    assert ours.conv_general_dilated is convolve.convolution and theirs.conv_general_dilated is lax.conv_general_dilated
    x = image(2, 9, 8, 6)
    for function in (lambda conv, x: conv(x), lambda conv, x: nnx.grad(lambda c, x: (c(x) ** 2).sum())(conv, x)):
        found, expected = (jax.tree.leaves(jax.jit(function)(conv, x)) for conv in (ours, theirs))
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_a_linear_layer_is_the_one_of_lax(dtype):
    theirs = nnx.Linear(6, 5, dtype=dtype, rngs=nnx.Rngs(0))
    ours = convolve.by_platform(nnx.clone(theirs))
    assert ours.dot_general is convolve.dot_general and theirs.dot_general is lax.dot_general
    for x in (image(2, 9, 8, 6), image(7, 6), image(6)):
        for function in (
            lambda layer, x: layer(x),
            lambda layer, x: nnx.grad(lambda c, x: (c(x) ** 2).sum())(layer, x),
        ):
            found, expected = (jax.tree.leaves(jax.jit(function)(layer, x)) for layer in (ours, theirs))
            for one, other in zip(found, expected, strict=True):
                assert one.dtype == other.dtype
                rough = 0.03 if dtype else 1e-4
                np.testing.assert_allclose(one, other, rtol=rough, atol=rough * np.abs(other).max())


def test_second_derivatives_of_layers_are_those_of_lax():
    """As the penalty of a discriminator has them."""
    for kernel, strides in ((image(3, 3, 1, 6), 1), (image(1, 1, 6, 4), 1), (image(2, 2, 6, 4), 2)):
        groups = 6 if kernel.shape[2] == 1 else 1
        ways = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups)

        def penalty(kernel, convolution):
            of = lambda x: jnp.sin(convolution(x, kernel, (strides, strides), "VALID", **ways)).sum()  # noqa: E731, B023
            return (jax.grad(of)(image(2, 5, 4, 6)) ** 2).sum()

        found, wanted = (
            jax.jit(jax.grad(penalty), static_argnums=1)(kernel, c)
            for c in (convolve.convolution, lax.conv_general_dilated)
        )
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_one_axis_and_three_are_left_to_lax():
    for x, sides in ((image(2, 9, 4), (3,)), (image(1, 5, 4, 6, 4), (3, 1, 3))):
        conv = nnx.Conv(4, 4, sides, feature_group_count=4, rngs=nnx.Rngs(0))
        np.testing.assert_array_equal(convolve.by_platform(nnx.clone(conv))(x), conv(x))


def operations(conv, x):
    # A function of its own each time: JAX remembers what it made of one.
    return [eqn.primitive.name for eqn in jax.make_jaxpr(lambda x: conv(x))(x).eqns]


def test_what_a_cpu_runs():
    depthwise, pointwise, first = (
        nnx.Conv(4, features, (side, side), stride, feature_group_count=groups, rngs=nnx.Rngs(0))
        for features, side, groups, stride in ((4, 3, 4, 1), (6, 1, 1, 1), (6, 3, 1, 2))
    )
    x = image(1, 5, 5, 4)
    for conv in (depthwise, pointwise, first):
        assert "conv_general_dilated" in operations(conv, x)
        convolve.by_platform(conv)
        assert "conv_general_dilated" not in operations(conv, x)
        with convolve.plain():
            assert "conv_general_dilated" in operations(conv, x)
    # Of a 3x3 kernel the taps inside of the map, as before.
    assert cost.macs(depthwise, x) == 13 * 13 * 4 and cost.macs(pointwise, x) == 25 * 4 * 6
    assert cost.macs(first, x) == 7 * 7 * 4 * 6


def test_a_choice_of_ones_own_stays():
    mine = lambda *args, **ways: lax.conv_general_dilated(*args, **ways)  # noqa: E731
    conv = nnx.Conv(4, 4, (3, 3), conv_general_dilated=mine, rngs=nnx.Rngs(0))
    assert convolve.by_platform(conv).conv_general_dilated is mine


class Mobile(nnx.Module):
    """As others write it."""

    def __init__(self, rngs):
        self.wide = nnx.Conv(6, 24, (1, 1), rngs=rngs)
        self.depthwise = nnx.Conv(24, 24, (3, 3), feature_group_count=24, rngs=rngs)
        self.narrow = nnx.Conv(24, 6, (1, 1), rngs=rngs)

    def __call__(self, x):
        return x + self.narrow(nnx.relu(self.depthwise(nnx.relu(self.wide(x)))))


def test_foreign_layers_are_run_so_after_dynamize_and_deploy():
    net = nnx.Sequential(Mobile(nnx.Rngs(0)), Mobile(nnx.Rngs(1)))
    model = dj.dynamize(net, {"layers/1": dj.Tiles}, features=6, rngs=nnx.Rngs(2))
    x = image(2, 19, 16, 6)
    chosen = [m.conv_general_dilated for _, m in nnx.iter_modules(model) if isinstance(m, nnx.Conv)]
    assert chosen and all(each is convolve.convolution for each in chosen)
    deployed = dj.deploy(model, 0.7, [x])
    assert all(
        m.conv_general_dilated is convolve.convolution
        for _, m in nnx.iter_modules(deployed.model)
        if isinstance(m, nnx.Conv)
    )
    plain = dj.dynamize(net, {"layers/1": dj.Tiles}, features=6, rngs=nnx.Rngs(2))
    dj.budget.set_threshold(plain, -1000.0)
    np.testing.assert_allclose(nnx.view(plain, deterministic=True)(x), net(x), rtol=1e-4, atol=1e-4)
