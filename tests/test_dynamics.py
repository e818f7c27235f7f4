"""Dynamics of dense prediction that choose kernels and scales."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import make, still
from flax import nnx

import dynjax as dj
from dynjax import models
from dynjax.config import UserError
from dynjax.models.backbones.efficientnet import EfficientNetLite0Config
from dynjax.models.backbones.inverted import InvertedBlock, Ways
from dynjax.models.backbones.mobilenet import MobileNetConfig
from dynjax.models.backbones.residual import ResidualConfig
from dynjax.models.backbones.resnet import ResNetBackboneConfig
from dynjax.models.blocks import Block
from dynjax.models.dense import Dense, DenseConfig, StaticConfig
from dynjax.models.dynamics import levels
from dynjax.models.dynamics.kernels import KernelsConfig, recut, with_kernel
from dynjax.models.dynamics.levels import LevelsConfig
from dynjax.models.dynamics.scales import ScalesConfig
from dynjax.models.heads.attention import AttentionHeadConfig
from dynjax.models.heads.deeplab import DeepLabHeadConfig
from dynjax.models.heads.fcn import FCNHeadConfig
from dynjax.models.heads.pspnet import PSPNetHeadConfig
from dynjax.models.heads.unet import UNetHeadConfig

RESIDUAL = ResidualConfig(widths=(4, 6, 8), blocks=(1, 0, 1))
HEADS = {
    "unet": UNetHeadConfig(blocks=(1, 1)),
    "deeplab": DeepLabHeadConfig(features=6, rates=(1, 2), fine=4, stride=4),
    "pspnet": PSPNetHeadConfig(features=6, bins=(1, 2), stride=4),
    "attention": AttentionHeadConfig(features=8, heads=2, layers=1, stride=4, keys=2),
}


def pictures(*shape):
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))


def compare(config, sizes, thresholds=(-1000.0, 0.5, 1000.0)):
    """Masked beside compact; the traces."""
    model = make(lambda rngs: models.build(config, 5, rngs=rngs))
    run = jax.jit(lambda m, x: [dj.traced(still(m, way))(x) for way in ("masked", "compact")])
    traces = []
    for size in sizes:
        for threshold in thresholds:
            dj.budget.set_threshold(model, threshold)
            (masked, trace), (compact, _) = run(model, pictures(*size))
            np.testing.assert_allclose(masked, compact, rtol=1e-4, atol=1e-4)
            traces.append(trace)
    return traces


@pytest.mark.parametrize("gate", ["learned", "random"])
def test_kernels_masked_is_compact(gate):
    traces = compare(DenseConfig(RESIDUAL, HEADS["unet"], KernelsConfig(tiles=(8, 6, 4), gate=gate)), [(1, 37, 30)])
    assert len(traces[0].decisions) == 4
    shares = [float(trace.macs().mean() / trace.full_macs) for trace in traces]
    assert shares[0] > shares[2] and all(decision.keep.shape[-1] == 4 for decision in traces[0].decisions.values())


def test_kernels_of_depthwise_convolutions():
    backbone = EfficientNetLite0Config(levels=3)
    dynamics = KernelsConfig(tiles=(8, 8, 4), kinds=("1x1", "3x3", "5x5"))
    compare(DenseConfig(backbone, DeepLabHeadConfig(features=6, rates=(1,), fine=4, stride=8), dynamics), [(1, 48, 40)])


def test_copies_begin_as_the_block():
    ways = Ways(1e-5, lambda side: "SAME", None, nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 9, 11, 4))
    for block in (make(lambda rngs: Block(4, rngs=rngs)), InvertedBlock(4, 4, 3, 1, 2, ways)):
        larger, same, dilated = (with_kernel(block, *kind, rngs=nnx.Rngs(1)) for kind in ((5, 1), (3, 1), (3, 2)))
        np.testing.assert_allclose(still(larger)(x), still(block)(x), atol=1e-5)
        np.testing.assert_array_equal(still(same)(x), still(block)(x))
        assert np.abs(still(dilated)(x) - still(block)(x)).max() > 1e-3
        costs = [dj.cost.macs(with_kernel(block, *kind, rngs=nnx.Rngs(1)), x) for kind in ((1, 1), (3, 1), (5, 1))]
        assert costs[0] < costs[1] < costs[2]


def test_recut_by_hand():
    kernel = jnp.arange(9.0).reshape(3, 3, 1, 1)
    np.testing.assert_array_equal(recut(kernel, 1)[..., 0, 0], [[4]])
    expected = np.zeros((5, 5))
    expected[1:4, 1:4] = np.arange(9).reshape(3, 3)
    np.testing.assert_array_equal(recut(kernel, 5)[..., 0, 0], expected)


@pytest.mark.parametrize("tile", [0, 3])
@pytest.mark.parametrize("head", ["deeplab", "pspnet", "attention"])
def test_scales_masked_is_compact(head, tile):
    traces = compare(DenseConfig(RESIDUAL, HEADS[head], ScalesConfig(tile=tile)), [(1, 37, 30), (3, 24, 32)])
    kept = [[float(decision.keep.mean()) for decision in trace.decisions.values()] for trace in traces[::2]]
    assert all(each == 1 for each in kept[0]) and all(each == 0 for each in kept[1])
    assert len(kept[0]) == (2 if head == "deeplab" else 1)


@pytest.mark.parametrize("gate", ["learned", "random"])
def test_levels_masked_is_compact(gate):
    config = DenseConfig(RESIDUAL, HEADS["unet"], LevelsConfig(gate=gate))
    all_, some, none, *alone = compare(config, [(3, 37, 30), (1, 24, 32)])
    assert float(alone[0].fraction()[0]) == 1 > float(alone[2].fraction()[0])
    fraction = [float(trace.macs().mean() / trace.full_macs) for trace in (all_, some, none)]
    assert fraction[0] == 1 > fraction[2] and fraction[0] >= fraction[1] >= fraction[2]
    assert len(all_.decisions) == 2


BACKBONES = {
    "residual": RESIDUAL,
    "resnet": ResNetBackboneConfig(levels=3, width=4),
    "mobilenet": MobileNetConfig(levels=3, width=0.25),
    "efficientnet": EfficientNetLite0Config(levels=3),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_levels_are_peeled_off_any_backbone(name):
    """With all levels it is the twin; without the two coarsest these cost nothing, and the head sees zeros."""
    config = DenseConfig(BACKBONES[name], FCNHeadConfig(), LevelsConfig())
    static = make(lambda rngs: models.build(models.static_twin(config), 5, rngs=rngs))
    model = models.build(config, 5, rngs=nnx.Rngs(1), twin_params=nnx.state(static, (nnx.Param, nnx.BatchStat)))
    x = pictures(2, 41, 36)
    maps = jax.jit(lambda m, x: m.maps(x))
    dj.budget.set_threshold(model, -1000.0)
    expected = maps(still(static), x)
    for found, each in zip(maps(still(model), x), expected, strict=True):
        np.testing.assert_allclose(found, each, rtol=1e-4, atol=1e-4)
    dj.budget.set_threshold(model, 1000.0)
    both = jax.jit(lambda m, x: (m.maps(x), dj.traced(m)(x)[1]))
    (finest, *others), trace = both(still(model, "compact"), x)
    np.testing.assert_allclose(finest, expected[0], rtol=1e-4, atol=1e-4)
    assert [each.shape for each in others] == [each.shape for each in expected[1:]]
    assert not any(each.any() for each in others)
    kept = dj.cost.macs(model.backbone, x[:1]) + dj.cost.macs(model.head, [each[:1] for each in expected], x.shape[1:3])
    assert kept <= trace.macs()[0] < kept * 1.01  # a gate


def test_with_all_scales_it_is_the_twin():
    static = make(lambda rngs: models.build(DenseConfig(RESIDUAL, HEADS["deeplab"], StaticConfig()), 5, rngs=rngs))
    twin = nnx.state(static, (nnx.Param, nnx.BatchStat))
    config = DenseConfig(RESIDUAL, HEADS["deeplab"], ScalesConfig(tile=2))
    model = models.build(config, 5, rngs=nnx.Rngs(1), twin_params=twin)
    dj.budget.set_threshold(model, -1000.0)
    x = pictures(2, 21, 30)
    np.testing.assert_allclose(*jax.jit(lambda x: (still(static)(x), still(model)(x)))(x), rtol=1e-4, atol=1e-4)


class Whole(nnx.Module):
    """A backbone that has what is asked of all, and no more."""

    widths, strides = (4, 6, 8), (2, 4, 8)
    tail = property(lambda self: nnx.List([]))

    def __call__(self, image):
        return []

    def sites(self):
        return []


def test_a_backbone_without_levels_to_peel_is_refused():
    head = make(lambda rngs: models.build(DenseConfig(RESIDUAL, FCNHeadConfig(), StaticConfig()), 5, rngs=rngs)).head
    with pytest.raises(ValueError, match="dynamics levels need a backbone with `peel`, and Whole has none"):
        levels.build(LevelsConfig(), Dense(Whole(), head), rngs=nnx.Rngs(0))


def test_mistakes():
    for head, dynamics, error, message in [
        ("unet", ScalesConfig(), ValueError, "dynamics scales need a head that fuses scales"),
        (
            "unet",
            LevelsConfig(levels=3),
            UserError,
            "levels is 3: it must be fewer than the backbone's levels, which are",
        ),
        ("unet", KernelsConfig(tiles=(4,), kinds=("3x3",)), UserError, "--model.dynamics.kinds is 3x3: it must be two"),
        ("unet", KernelsConfig(tiles=(4,), kinds=("5x5", "1x1")), UserError, "each once and in this order"),
    ]:
        config = DenseConfig(RESIDUAL, HEADS[head], dynamics)
        with pytest.raises(error, match=message):
            jax.eval_shape(lambda config=config: nnx.state(models.build(config, 3, rngs=nnx.Rngs(0))))
