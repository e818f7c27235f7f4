"""MSDNet: its size is the published one, its exits work, a static twin goes under them."""

import blocks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import at, make, still
from flax import nnx
from test_ops_tiles import assert_same, three_ways

import dynjax as dj
from dynjax import cost, models
from dynjax.config import UserError
from dynjax.models import msdnet
from dynjax.models.msdnet import MSDNetConfig

SMALL = MSDNetConfig(scales=2, channels=4, growth=2, blocks=3, base=1, step=1, dynamics="exits")


def build(config, twin_params=None):
    return make(lambda rngs: models.build(config, 5, rngs=rngs, twin_params=twin_params))


def bytes_(*shape):
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, shape), jnp.uint8)


def test_the_size_of_the_published_configuration():
    """7 blocks, base 4, even steps of 2, 16 channels, growth 6: 2.99 million parameters."""
    model = nnx.eval_shape(lambda: models.build(MSDNetConfig(blocks=7, dynamics="exits"), 10, rngs=nnx.Rngs(0)))
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert count == 2_986_690


def test_scales_are_left_out_in_thirds_of_the_depth():
    config = MSDNetConfig(blocks=7)
    stages = nnx.eval_shape(lambda: [stage for stage, _ in msdnet._stages(config, nnx.Rngs(0))])
    layers = [layer for stage in stages for layer in stage.layers]
    scales = [len(layer.scales) for layer in layers if isinstance(layer, msdnet.Layer)]
    assert scales == [3] * 6 + [2] * 6 + [1] * 4
    assert sum(isinstance(layer, msdnet.Transition) for layer in layers) == 2


def test_masked_equals_compact():
    model, x = build(SMALL), bytes_(5, 9, 8, 3)
    run = three_ways(lambda threshold, x: (at(threshold, model), x), jnp.zeros(()), x)
    outputs = jax.jit(lambda x: still(model).predictions(x))(x)
    for threshold in (-30.0, 0.0, 1.0, 30.0):
        masked, *compact = run(jnp.float32(threshold), x)
        assert_same(masked, *compact)
    np.testing.assert_allclose(masked, outputs[0], rtol=1e-5, atol=1e-5)  # all stopped at once
    np.testing.assert_allclose(run(jnp.float32(-30.0), x)[0], outputs[-1], rtol=1e-5, atol=1e-5)
    assert_same(*three_ways(lambda x: (at(0.0, model), x), x[:1])(x[:1]))


def test_the_twin_is_the_last_exit():
    twin, x = build(models.static_twin(SMALL)), bytes_(2, 8, 8, 3)
    params = nnx.state(twin, nnx.Any(nnx.Param, nnx.BatchStat))
    model = nnx.jit(lambda params: models.build(SMALL, 5, rngs=nnx.Rngs(1), twin_params=params))(params)
    outputs, wanted, trace = jax.jit(
        lambda x: (still(model).predictions(x), still(twin)(x), dj.traced(at(-30.0, still(model)))(x)[1])
    )(x)
    np.testing.assert_allclose(outputs[-1], wanted, rtol=1e-5, atol=1e-5)
    channels = [head.convs.layers[0].conv.in_features for head in model.exits.heads[:-1]]
    heads = [
        cost.macs(still(head), [jax.ShapeDtypeStruct((1, 4, 4, c), jnp.float32)])
        for head, c in zip(model.exits.heads, channels, strict=False)
    ]
    assert trace.full_macs == pytest.approx(cost.macs(still(twin), x[:1]) + sum(heads))


def test_errors():
    for changes, message in (
        (dict(blocks=0), "blocks is 0"),
        (dict(growth=1), "growth is 1: it must be at least 2"),
    ):
        with pytest.raises(UserError, match=message):
            blocks.make(lambda rngs, c=changes: models.build(MSDNetConfig(**c), 5, rngs=rngs))
