"""Cascades: tiles stop along a decoder, and what is computed for the others does not change."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import make, still
from flax import nnx

import dynjax as dj
from dynjax import models
from dynjax.models.backbones.residual import ResidualConfig
from dynjax.models.dense import DenseConfig, StaticConfig
from dynjax.models.dynamics.exits import DecoderExitsConfig
from dynjax.models.heads.segnet import SegNetHeadConfig
from dynjax.models.heads.unet import UNetHeadConfig

HEADS = {"unet": UNetHeadConfig(blocks=(1, 1, 1)), "segnet": SegNetHeadConfig(blocks=(1, 0, 2))}
BACKBONE = ResidualConfig(widths=(4, 5, 6, 8), blocks=(0, 0, 0, 1))


def build(head="unet", gate="learned", **ways):
    config = DenseConfig(BACKBONE, HEADS[head], DecoderExitsConfig(tile=2, gate=gate))
    return make(lambda rngs: models.build(config, 3, rngs=rngs, **ways))


def pictures(*shape):
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))


def spread_thresholds(model, x):
    """Thresholds under which all tiles go on, some, and none."""
    own = model.cascade
    maps = still(model).backbone(x)
    from dynjax.ops.confidence import doubt

    logits = still(model).cascade.predictions(maps[-1], maps[-2::-1])
    unsure = np.asarray(doubt(logits[0], own.confidence, own.at, own.size)).ravel()
    return [-1000.0, float(np.median(unsure)), 1000.0]


@pytest.mark.parametrize("gate", ["learned", "random"])
@pytest.mark.parametrize("head", HEADS)
def test_masked_is_compact(head, gate):
    model = build(head, gate)
    for shape in [(1, 37, 30), (3, 48, 32)][: 2 if (head, gate) == ("unet", "learned") else 1]:
        x = pictures(*shape)
        run = jax.jit(lambda m, x: [dj.traced(still(m, way))(x) for way in ("masked", "compact")])
        spent = []
        for threshold in spread_thresholds(model, x):
            dj.budget.set_threshold(model, threshold)
            (masked, trace), (compact, _) = run(model, x)
            np.testing.assert_allclose(masked, compact, rtol=1e-4, atol=1e-4)
            spent.append(float(trace.macs().mean()))
        assert spent[0] == pytest.approx(trace.full_macs) and spent[0] >= spent[1] >= spent[2] < spent[0]
        (decision,) = trace.decisions.values()
        assert decision.keep.shape[0] == shape[0] and decision.keep.shape[-1] == 3


def test_with_everything_kept_it_is_the_static_decoder():
    static = make(lambda rngs: models.build(DenseConfig(BACKBONE, HEADS["unet"], StaticConfig()), 3, rngs=rngs))
    config = DenseConfig(BACKBONE, HEADS["unet"], DecoderExitsConfig(tile=2))
    twin = nnx.state(static, (nnx.Param, nnx.BatchStat))
    model = models.build(config, 3, rngs=nnx.Rngs(1), twin_params=twin)
    dj.budget.set_threshold(model, -1000.0)
    x = pictures(2, 21, 30)
    found, expected, last = jax.jit(lambda x: (still(model)(x), still(static)(x), still(model).predictions(x)[-1]))(x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(last, expected, rtol=1e-4, atol=1e-4)


def test_a_tile_that_stopped_has_the_logits_of_its_exit():
    model = build()
    x = pictures(1, 32, 48)
    own = still(model)
    dj.budget.set_threshold(model, 1000.0)
    # All stop after the first level: its logits, at the picture's size.
    np.testing.assert_allclose(own(x), own.predictions(x)[0], rtol=1e-4, atol=1e-4)
    dj.budget.set_threshold(model, spread_thresholds(model, x)[1])
    early, *_, last = own.predictions(x)
    found, trace = dj.traced(own)(x)
    (decision,) = trace.decisions.values()
    keep = np.asarray(decision.keep)
    assert 0 < keep[..., 1].mean() < 1
    side = 2 * 8  # of a tile, in pixels of the picture: tiles of 2 pixels of a map of stride 8
    reached = np.kron(keep[0, ..., 1], np.ones((side, side)))[:32, :48]
    # Inside of a tile that stopped, away from others, whose logits interpolation mixes in.
    inner = np.zeros((32, 48), bool)
    for i, j in np.argwhere(keep[0, ..., 1] == 0):
        inner[i * side + 8 : (i + 1) * side - 8 + 1, j * side + 8 : (j + 1) * side - 8 + 1] = True
    assert reached.shape == (32, 48) and inner.any()
    np.testing.assert_allclose(np.asarray(found)[0][inner], np.asarray(early)[0][inner], rtol=1e-3, atol=1e-3)
    gone_on = np.kron(keep[0, ..., 2], np.ones((side, side)))[:32, :48] > 0
    if gone_on.all():
        np.testing.assert_allclose(found, last, rtol=1e-4, atol=1e-4)


def test_training_stops_nothing_and_teaches_every_exit():
    model = build()
    dj.budget.set_threshold(model, 1000.0)
    x = pictures(2, 21, 30)

    def loss(model, x):
        return sum((logits**2).mean() for logits in model.predictions(x))

    grads = nnx.jit(nnx.grad(loss))(model, x)
    for number, leave in enumerate(grads["cascade"]["exits"].values()):
        assert np.abs(leave["kernel"][...]).max() > 0, number
    model.train()
    _, trace = nnx.jit(lambda m, x: dj.traced(m)(x))(model, x)
    np.testing.assert_array_equal(next(iter(trace.decisions.values())).keep, 1)


def test_mistakes():
    block = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="1 joins, 2 blocks and 1 exits"):
        dj.Cascade([block], [block, block], [block], size=2)
    with pytest.raises(ValueError, match="size=0 must be at least 1"):
        dj.Cascade([block], [block], [block], size=0)
    from dynjax.models.heads.fcn import FCNHeadConfig

    config = DenseConfig(BACKBONE, FCNHeadConfig(), DecoderExitsConfig())
    with pytest.raises(ValueError, match="dynamics exits need a decoder with levels"):
        jax.eval_shape(lambda: nnx.state(models.build(config, 3, rngs=nnx.Rngs(0))))
    one_level = dataclasses.replace(BACKBONE, widths=(4, 6), blocks=(1, 1))
    config = DenseConfig(one_level, UNetHeadConfig(blocks=(1,)), DecoderExitsConfig())
    model = still(make(lambda rngs: models.build(config, 3, rngs=rngs)))
    assert model(pictures(1, 9, 7)).shape == (1, 9, 7, 3)
