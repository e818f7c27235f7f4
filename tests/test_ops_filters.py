"""Per-pixel kernels: parity with their published definitions in NumPy, inside tiles, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import image, make, still
from flax import nnx
from test_convolve import pixel_by_pixel
from test_ops_tiles import assert_same, three_ways

import dynjax as dj
from dynjax import cost
from dynjax.core.receptive import receptive_radius
from dynjax.ops.filters import DDF, DynamicFilter, Involution


def array(variable):
    return np.asarray(variable[...], np.float64)


def evaluated(model, *args):
    return jax.jit(lambda *args: still(model)(*args))(*args)


@pytest.mark.parametrize("stride", [1, 2])
def test_involution_is_its_definition(stride):
    model = make(lambda rngs: Involution(6, 6, (3, 3), stride, group_channels=2, reduction=2, rngs=rngs))
    x = image(2, 7, 5, 6)
    seen = np.asarray(x, np.float64)
    if stride == 2:  # the mean over each 2x2 pixels that are there; on 7 and 5 pixels the last ones are half outside
        cells = [[seen[:, i : i + 2, j : j + 2].mean((1, 2)) for j in (0, 2, 4)] for i in (0, 2, 4, 6)]
        seen = np.moveaxis(np.asarray(cells), 2, 0)
    hidden = seen @ array(model.reduce.kernel)
    norm = model.norm
    hidden = (hidden - array(norm.mean)) / np.sqrt(array(norm.var) + norm.epsilon) * array(norm.scale) + array(
        norm.bias
    )
    kernels = np.maximum(hidden, 0) @ array(model.span.kernel) + array(model.span.bias)
    kernels = kernels.reshape(*seen.shape[:3], 3, 3, 3)
    np.testing.assert_allclose(evaluated(model, x), pixel_by_pixel(x, kernels, strides=stride), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, dict(strides=2), dict(kernel_dilation=2)], ids=str)
def test_ddf_is_its_definition(options):
    model = make(lambda rngs: DDF(4, 4, (3, 3), squeeze=0.5, **options, rngs=rngs))
    x = np.asarray(image(2, 5, 6, 4), np.float64)

    def normalised(filters, axis):
        return (filters - filters.mean(axis, keepdims=True)) / filters.std(axis, keepdims=True)

    stride = options.get("strides", 1)
    spatial = normalised(x[:, ::stride, ::stride] @ array(model.spatial.kernel) + array(model.spatial.bias), -1)
    spatial = spatial * array(model.spatial_scale) + array(model.spatial_shift)
    squeezed = np.maximum(x.mean((1, 2)) @ array(model.squeeze.kernel) + array(model.squeeze.bias), 0)
    channel = (squeezed @ array(model.excite.kernel) + array(model.excite.bias)).reshape(2, 9, 4)
    channel = normalised(channel, 1) * array(model.channel_scale) + array(model.channel_shift)
    expected = pixel_by_pixel(
        x,
        spatial.reshape(*spatial.shape[:3], 3, 3, 1),
        channel.reshape(2, 3, 3, 4),
        strides=stride,
        dilation=options.get("kernel_dilation", 1),
    )
    np.testing.assert_allclose(evaluated(model, jnp.asarray(x, jnp.float32)), expected, rtol=1e-3, atol=1e-4)


def test_strided_windows_are_centred_on_the_pixels_of_their_filters():
    # On maps of even size, where SAME convolutions are centred one pixel further.
    x = image(1, 8, 10, 4)
    plain, strided = (make(lambda rngs, s=s: DDF(4, 4, (3, 3), s, rngs=rngs)) for s in (1, 2))
    np.testing.assert_allclose(evaluated(strided, x), evaluated(plain, x)[:, ::2, ::2], rtol=1e-4, atol=1e-5)
    involution = make(lambda rngs: Involution(4, 4, (3, 3), 2, rngs=rngs))
    change = evaluated(involution, x.at[0, 3, 3, 0].add(1.0)) - evaluated(involution, x)
    # Row and column 3 are neighbours of 2 and 4, which output pixels 1 and 2 are centred on.
    np.testing.assert_array_equal(np.argwhere(np.abs(change[0]).max(-1) > 1e-6), [[1, 1], [1, 2], [2, 1], [2, 2]])


@pytest.mark.parametrize("softmax", [False, True])
def test_dynamic_filters_come_from_the_guide(softmax):
    model = make(lambda rngs: DynamicFilter(3, 3, (3, 5), guide=2, softmax=softmax, rngs=rngs))
    x, guide = image(2, 6, 5, 3), image(2, 6, 5, 2, seed=1)
    filters = np.asarray(nnx.relu(model.look(guide))) @ array(model.make.kernel) + array(model.make.bias)
    filters = np.exp(filters) / np.exp(filters).sum(-1, keepdims=True) if softmax else filters
    expected = pixel_by_pixel(x, np.reshape(filters, (2, 6, 5, 3, 5, 1)))
    np.testing.assert_allclose(evaluated(model, x, guide), expected, rtol=1e-4, atol=1e-4)


def test_other_channels_follow_from_a_linear_layer():
    x = image(1, 5, 4, 4)
    for kind in (Involution, DDF, DynamicFilter):
        model = make(lambda rngs, kind=kind: kind(4, 7, (3, 3), rngs=rngs))
        y = evaluated(model, x)
        assert y.shape == (1, 5, 4, 7)
        kernel, model.project = model.project.kernel[...], None
        np.testing.assert_allclose(y, evaluated(model, x) @ kernel, rtol=1e-4, atol=1e-5)


def test_macs_are_those_of_the_docstrings():
    x, pixels = jax.ShapeDtypeStruct((1, 8, 6, 8), jnp.float32), 8 * 6
    count = lambda build: cost.macs(still(make(build)), x)  # noqa: E731
    involution = count(lambda rngs: Involution(8, 8, (3, 3), group_channels=4, reduction=4, rngs=rngs))
    assert involution == pixels * (8 * 2 + 2 * 9 * 2 + 9 * 8)
    ddf = count(lambda rngs: DDF(8, 8, (3, 3), squeeze=0.5, rngs=rngs))
    assert ddf == pixels * (8 * 9 + 2 * 9 * 8) + 8 * 4 + 4 * 9 * 8
    taps = (3 * 8 - 2) * (3 * 6 - 2)
    dynamic = count(lambda rngs: DynamicFilter(8, 8, (3, 3), hidden=5, rngs=rngs))
    assert dynamic == taps * 8 * 5 + pixels * (5 * 9 + 9 * 8)


@pytest.mark.parametrize("kind", [Involution, DDF, DynamicFilter])
def test_gradients_reach_all_parameters(kind):
    model = make(lambda rngs: kind(4, 5, (3, 3), rngs=rngs))
    loss = lambda model, x: (model(x) ** 3).sum()  # noqa: E731
    grads, slope = nnx.jit(nnx.grad(loss, argnums=(0, 1)))(model, image(3, 5, 6, 4))
    for leaf in (*jax.tree.leaves(grads), slope):
        assert np.isfinite(leaf).all() and np.any(leaf)


@pytest.mark.parametrize(("dilation", "radius"), [(1, 1), (2, 2)])
def test_involution_runs_on_tiles(dilation, radius):
    block = make(lambda rngs: Involution(4, 4, (3, 3), kernel_dilation=dilation, group_channels=2, rngs=rngs))
    x = image(2, 13, 9, 4)
    assert receptive_radius(block, x) == radius

    run = three_ways(lambda x, keep: (dj.Tiles(block, dj.FixedGate(keep, size=4)), x), x, jnp.zeros((2, 4, 3)))
    random = np.random.default_rng(0)
    for keep in (np.zeros((2, 4, 3)), np.ones((2, 4, 3)), random.random((2, 4, 3)) < 0.4):
        masked, *compact = run(x, jnp.asarray(keep, jnp.float32))
        assert_same(masked, *compact)


def test_what_pools_over_the_map_is_refused_on_tiles():
    block = make(lambda rngs: DDF(4, 4, (3, 3), rngs=rngs))
    with pytest.raises(ValueError, match="DDF cannot be run on tiles: it mixes the whole map"):
        receptive_radius(block, image(1, 8, 8, 4))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="group_channels=4 must divide in_features=6"):
        make(lambda rngs: Involution(6, 6, group_channels=4, rngs=rngs))
    x, guided = image(1, 4, 4, 2), make(lambda rngs: DynamicFilter(2, 2, guide=3, rngs=rngs))
    with pytest.raises(ValueError, match="made with guide=3 and none is given"):
        guided(x)
    with pytest.raises(ValueError, match=r"guide has shape \(1, 4, 4, 2\); it must be \(1, 4, 4, 3\)"):
        guided(x, x)
    with pytest.raises(ValueError, match="made with guide=None and one is given"):
        make(lambda rngs: DynamicFilter(2, 2, rngs=rngs))(x, x)
