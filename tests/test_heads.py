"""Heads of dense prediction with every backbone, and each against small cases worked by hand or in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import make, still
from flax import nnx

import dynjax as dj
from dynjax import models
from dynjax.models import blocks
from dynjax.models.backbones.efficientnet import EfficientNetLite0Config
from dynjax.models.backbones.mobilenet import MobileNetConfig
from dynjax.models.backbones.residual import ResidualConfig
from dynjax.models.backbones.resnet import ResNetBackboneConfig
from dynjax.models.dense import DenseConfig, StaticConfig
from dynjax.models.dynamics.recursion import RecursionConfig
from dynjax.models.dynamics.skip import SkipConfig
from dynjax.models.dynamics.tiles import TilesConfig
from dynjax.models.heads import attention, deeplab, fcn, pspnet, recursive, segnet, unet

BACKBONES = {
    "residual": ResidualConfig(widths=(4, 6, 8), blocks=(1, 0, 1)),
    "lite0": EfficientNetLite0Config(levels=3),
    "mobilenet": MobileNetConfig(levels=3, width=0.25),
    "resnet": ResNetBackboneConfig(depth=18, levels=3, width=4),
}
HEADS = {
    "fcn": fcn.FCNHeadConfig(stride=4),
    "segnet": segnet.SegNetHeadConfig(blocks=(1, 1)),
    "unet": unet.UNetHeadConfig(blocks=(0, 1)),
    "deeplab": deeplab.DeepLabHeadConfig(features=6, rates=(1, 2), fine=4, stride=4),
    "pspnet": pspnet.PSPNetHeadConfig(features=6, bins=(1, 2, 3), stride=4),
    "attention": attention.AttentionHeadConfig(features=8, heads=2, layers=1, stride=4, keys=2),
    "recursive": recursive.RecursiveHeadConfig(features=6, steps=3, stride=4),
}
DYNAMICS = {
    "fcn": SkipConfig(),
    "segnet": TilesConfig(tiles=(4, 3)),
    "unet": TilesConfig(tiles=(4, 3, 3)),
    "deeplab": TilesConfig(tiles=(4, 3)),
    "pspnet": TilesConfig(tiles=(4, 3)),
    "attention": SkipConfig(),
    "recursive": RecursionConfig(tile=3),
}


def build(head, backbone="residual", dynamics=None):
    config = DenseConfig(BACKBONES[backbone], HEADS[head], dynamics or StaticConfig())
    return make(lambda rngs: models.build(config, 5, rngs=rngs))


def pictures(*shape):
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("head", HEADS)
def test_every_head_on_every_backbone_at_any_size(head, backbone):
    config = DenseConfig(BACKBONES[backbone], HEADS[head], StaticConfig())
    model = still(make(lambda rngs: models.build(config, 5, rngs=rngs)))
    for height, width in [(1, 1), (21, 30), (33, 16)]:
        logits = jax.eval_shape(lambda x: model(x), jax.ShapeDtypeStruct((2, height, width, 3), jnp.uint8))
        assert (logits.shape, logits.dtype) == ((2, height, width, 5), jnp.float32)
    for site in (*model.backbone.sites(), *model.head.sites()):
        side = 8
        x = jax.ShapeDtypeStruct((1, side, side, site.channels), jnp.float32)
        assert jax.eval_shape(lambda x, m=site.modules[site.number]: still(m)(x), x).shape == x.shape


@pytest.mark.parametrize("backbone", ["residual", "lite0"])
@pytest.mark.parametrize("head", HEADS)
def test_masked_is_compact_and_macs_are_those_of_xla(head, backbone):
    model = build(head, backbone, DYNAMICS[head])
    dj.budget.set_threshold(model, 1.0)
    x = pictures(1, 37, 30)
    run = jax.jit(lambda x: [dj.traced(still(model, way))(x) for way in ("masked", "compact")])
    (masked, trace), (compact, _) = run(x)
    assert trace.decisions and 0 < trace.macs()[0] <= trace.full_macs
    np.testing.assert_allclose(masked, compact, rtol=1e-4, atol=1e-4)


def xla_macs(fn, x):
    return jax.jit(fn).lower(x).compile().cost_analysis()["flops"] / 2


WIDE = {
    "segnet": segnet.SegNetHeadConfig(blocks=(1, 1, 1)),
    "unet": unet.UNetHeadConfig(blocks=(1, 1, 1)),
    "deeplab": deeplab.DeepLabHeadConfig(features=48, stride=8, blocks=2),
    "pspnet": pspnet.PSPNetHeadConfig(features=48, blocks=2),
    "attention": attention.AttentionHeadConfig(features=64, layers=3),
    "recursive": recursive.RecursiveHeadConfig(),
}


@pytest.mark.optimised
@pytest.mark.parametrize("head", WIDE)
def test_macs_are_those_of_xla(head):
    """XLA counts norms, rectifiers and interpolation too."""
    backbone = ResidualConfig(widths=(16, 24, 32, 64))
    model = still(make(lambda rngs: models.build(DenseConfig(backbone, WIDE[head], StaticConfig()), 5, rngs=rngs)))
    maps = model.backbone(pictures(1, 64, 96))
    run = lambda maps: model.head(maps, (64, 96))  # noqa: E731
    counted = dj.cost.macs(run, maps)
    assert counted <= xla_macs(run, maps) <= 1.5 * counted


# Each piece by hand


def image(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_enlarge_is_bilinear_interpolation(factor):
    x = image(2, 3, 5, 4)
    expected = jax.image.resize(x, (2, 3 * factor, 5 * factor, 4), "bilinear")
    np.testing.assert_allclose(blocks.enlarge(x, factor), expected, atol=1e-6)
    assert dj.cost.macs(lambda x: blocks.enlarge(x, factor), x) == 0


def test_fcn_sums_the_scores_of_its_maps():
    head = build("fcn").head
    maps = [image(1, 7, 9, 4), image(1, 4, 5, 6, seed=1), image(1, 2, 3, 8, seed=2)]
    assert head.levels == [1, 2] and head.stride == 4
    fine, coarse = (
        np.asarray(x) @ np.asarray(s.kernel[...]) + np.asarray(s.bias[...])
        for x, s in zip(maps[1:], head.scores, strict=True)
    )
    total = fine + jax.image.resize(coarse, (1, 4, 6, 5), "bilinear")[:, :, :5]
    expected = jax.image.resize(total, (1, 16, 20, 5), "bilinear")[:, :14, :18]
    np.testing.assert_allclose(head(maps, (14, 18)), expected, atol=1e-5)


@pytest.mark.parametrize("height, width", [(4, 6), (5, 7), (1, 1)])
def test_segnet_puts_values_where_the_maxima_were(height, width):
    fine = np.array(image(2, height, width, 3))
    fine[0, 0, 0] = fine[0, : min(2, height), : min(2, width)].max((0, 1))  # two alike: the first counts
    coarse = np.asarray(image(2, -(-height // 2), -(-width // 2), 3, seed=1))
    expected = np.zeros((2, height, width, 3), np.float32)
    for b, i, j, c in np.ndindex(coarse.shape):
        window = fine[b, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, c]
        row, column = np.unravel_index(window.argmax(), window.shape)
        expected[b, 2 * i + row, 2 * j + column, c] = coarse[b, i, j, c]
    found = segnet.unpool(jnp.asarray(coarse), segnet.pooling_indices(jnp.asarray(fine)))
    np.testing.assert_array_equal(found[:, :height, :width], expected)


def test_a_dilated_branch_by_its_definition():
    branch = make(lambda rngs: deeplab.Separable(2, 2, 3, rngs=rngs)).depthwise
    x, kernel = np.asarray(image(1, 8, 7, 2)), np.asarray(branch.kernel[...])
    expected = np.zeros_like(x)
    for i, j, c, u, v in np.ndindex(8, 7, 2, 3, 3):
        row, column = i + 3 * (u - 1), j + 3 * (v - 1)
        if 0 <= row < 8 and 0 <= column < 7:
            expected[0, i, j, c] += kernel[u, v, 0, c] * x[0, row, column, c]
    np.testing.assert_allclose(branch(x), expected, atol=1e-5)


def test_the_atrous_pyramid_has_the_mean_of_the_map():
    pyramid = still(make(lambda rngs: deeplab.AtrousPyramid(3, 4, (1, 2), rngs=rngs)))
    x = image(2, 5, 6, 3)
    mean = nnx.relu(x.mean((1, 2)) @ pyramid.whole.kernel[...] + pyramid.whole.bias[...][None])
    parts = [pyramid.point(x), *(branch(x) for branch in pyramid.branches)]
    parts.append(jnp.broadcast_to(mean[:, None, None], (2, 5, 6, 4)))
    np.testing.assert_allclose(pyramid(x), pyramid.mix(jnp.concatenate(parts, -1)), atol=1e-5)


@pytest.mark.parametrize("height, width", [(6, 6), (5, 7), (1, 2)])
@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_pooled_parts_cover_the_map(parts, height, width):
    x = np.asarray(image(2, height, width, 3))
    expected = np.zeros((2, parts, parts, 3))
    for p, q in np.ndindex(parts, parts):
        top, bottom = p * height // parts, -(-(p + 1) * height // parts)
        left, right = q * width // parts, -(-(q + 1) * width // parts)
        expected[:, p, q] = x[:, top:bottom, left:right].mean((1, 2))
    np.testing.assert_allclose(pspnet.pooled(jnp.asarray(x), parts), expected, atol=1e-6)


def test_attention_by_its_definition():
    layer = make(lambda rngs: attention.AttentionLayer(4, 1, 0, rngs=rngs))
    x = image(2, 3, 2, 4)
    own = layer.attention
    norm = np.asarray(layer.norm1(x)).reshape(2, 6, 4)
    q, k, v = (
        norm @ np.asarray(each.kernel[...])[:, 0] + np.asarray(each.bias[...])[0]
        for each in (own.query, own.key, own.value)
    )
    weights = jax.nn.softmax(q @ k.swapaxes(1, 2) / 2, -1)
    y = np.asarray(weights @ v) @ np.asarray(own.out.kernel[...])[0] + np.asarray(own.out.bias[...])
    y = x + y.reshape(x.shape)
    y = jnp.asarray(y)
    expected = y + np.asarray(layer.narrow(nnx.gelu(layer.wide(layer.norm2(y)))))
    np.testing.assert_allclose(layer(x), expected, atol=1e-4)


def test_attention_to_means_costs_less_and_is_the_same_on_a_small_map():
    whole, few = (make(lambda rngs, k=k: attention.AttentionLayer(8, 2, k, rngs=rngs)) for k in (0, 3))
    small, large = image(1, 3, 3, 8), image(1, 24, 20, 8)
    np.testing.assert_allclose(whole(small), few(small), atol=1e-6)
    assert dj.cost.macs(few, large) < 0.5 * dj.cost.macs(whole, large)


def test_a_recursive_decoder_that_never_stops_is_its_twin():
    static = build("recursive")
    config = DenseConfig(BACKBONES["residual"], HEADS["recursive"], RecursionConfig(gate="random"))
    halting = models.build(config, 5, rngs=nnx.Rngs(1), twin_params=nnx.state(static, (nnx.Param, nnx.BatchStat)))
    dj.budget.set_threshold(halting, -1000.0)
    x = pictures(2, 21, 30)
    run = jax.jit(lambda x: (still(static)(x), still(halting)(x)))
    np.testing.assert_allclose(*run(x), rtol=1e-4, atol=1e-4)


def test_what_does_not_fit():
    for head, dynamics, message in [
        (deeplab.DeepLabHeadConfig(stride=16), StaticConfig(), "--model.head.stride 16: the backbone has maps"),
        (HEADS["unet"], RecursionConfig(), "dynamics recursion need the recursive head"),
        (HEADS["fcn"], TilesConfig(tiles=(4,)), None),
        (fcn.FCNHeadConfig(stride=32), StaticConfig(), "the backbone's coarsest map has 8"),
    ]:
        config = DenseConfig(BACKBONES["residual"], head, dynamics)
        build = lambda c=config: nnx.state(models.build(c, 3, rngs=nnx.Rngs(0)))  # noqa: E731
        if message is None:
            jax.eval_shape(build)
            continue
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(build)
