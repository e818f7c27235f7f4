"""The ResNet: its cost by hand, every kind of dynamics against its static twin, masked against compact."""

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
from dynjax.models.resnet import ResNetConfig

SMALL = ResNetConfig(widths=(4, 8), blocks=(1, 2), groups=2)


def build(dynamics, gate="learned", twin_params=None):
    config = models.static_twin(SMALL) if dynamics == "static" else None
    config = config or ResNetConfig(widths=(4, 8), blocks=(1, 2), groups=2, dynamics=dynamics, gate=gate)
    return make(lambda rngs: models.build(config, 5, rngs=rngs, twin_params=twin_params))


def bytes_(*shape):
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, shape), jnp.uint8)


def test_macs_by_hand():
    config = ResNetConfig(stem_stride=2, widths=(4, 8), blocks=(1, 2))
    model = make(lambda rngs: models.build(config, 5, rngs=rngs))
    stem = 16 * 9 * 12 * 4  # 4x4 places
    first, down, second = 2 * 16 * 9 * 4 * 4, 4 * 16 * 8, 4 * 4 * 9 * 8 * 8
    found = cost.macs(still(model), jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.uint8), padding=True)
    assert found == stem + first + down + second + 8 * 5


@pytest.mark.parametrize("dynamics", ["skip", "exits", "policy", "channels", "slices"])
@pytest.mark.parametrize("gate", ["learned", "random"])
def test_masked_equals_compact(dynamics, gate):
    model, x = build(dynamics, gate), bytes_(5, 7, 8, 3)
    run = three_ways(lambda threshold, x: (at(threshold, model), x), jnp.zeros(()), x)
    trace = jax.jit(lambda threshold, x: dj.traced(at(threshold, still(model)))(x)[1].fraction().mean())
    shares = []
    for threshold in (-30.0, 0.0, 30.0):
        masked, *compact = run(jnp.float32(threshold), x)
        assert_same(masked, *compact)
        shares.append(float(trace(jnp.float32(threshold), x)))
    assert shares[0] == pytest.approx(1) and shares[0] >= shares[1] >= shares[2] and shares[2] < 1


@pytest.mark.parametrize("dynamics", ["skip", "exits", "policy", "channels", "slices"])
def test_everything_kept_is_the_static_twin(dynamics):
    twin, x = build("static"), bytes_(2, 8, 8, 3)
    params = nnx.state(twin, nnx.Any(nnx.Param, nnx.BatchStat))
    config = ResNetConfig(widths=(4, 8), blocks=(1, 2), groups=2, dynamics=dynamics)
    model = nnx.jit(lambda params: models.build(config, 5, rngs=nnx.Rngs(1), twin_params=params))(params)
    np.testing.assert_allclose(at(-30.0, still(model))(x), still(twin)(x), rtol=1e-5, atol=1e-5)


def test_errors():
    for changes, message in (
        (dict(widths=(4,), blocks=(1, 1)), "--model.blocks is 1 1: it must be one number for each stage"),
        (dict(stem_stride=3), "--model.stem-stride is 3: it must be 1 or 2"),
    ):
        with pytest.raises(UserError, match=message):
            models.build(ResNetConfig(**changes), 5, rngs=nnx.Rngs(0))
