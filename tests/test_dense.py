"""Dense prediction: shapes, odd sizes, half precision, and adaptive forms that hold the static twin's parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import make, still
from flax import nnx

import dynjax as dj
from dynjax import models
from dynjax.config import UserError
from dynjax.models import blocks
from dynjax.models.backbones.residual import ResidualConfig
from dynjax.models.dense import DenseConfig, StaticConfig
from dynjax.models.dynamics.experts import ExpertsConfig
from dynjax.models.dynamics.halt import HaltStepConfig
from dynjax.models.dynamics.select import SelectConfig
from dynjax.models.dynamics.skip import SkipConfig
from dynjax.models.dynamics.tiles import TilesConfig
from dynjax.models.heads.unet import UNetHeadConfig

SMALL = DenseConfig(ResidualConfig(widths=(4, 6, 8), blocks=(1, 1, 2)), UNetHeadConfig(blocks=(1, 1)), StaticConfig())
FORMS = {"tiles": TilesConfig(tiles=(4, 3)), "select": SelectConfig(tiles=(4, 3)), "skip": SkipConfig()}
BLOCKS = [f"backbone/blocks/{each}" for each in ("0/0", "1/0", "2/0", "2/1")]
BLOCKS += ["head/blocks/0/0", "head/blocks/1/0"]


def build(rngs, dynamics=None, twin_params=None):
    config = dataclasses.replace(SMALL, dynamics=dynamics or StaticConfig())
    return models.build(config, 3, rngs=rngs, twin_params=twin_params)


def pictures(*shape):
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def static():
    return make(build)


def under(model, state):
    """`model` with the variables of `state` under its wrappers."""
    flat = dict(nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    for path, variable in nnx.to_flat_state(state):
        inside = [path[:n] + middle + path[n:] for n in range(len(path)) for middle in ((), ("block",), ("blocks", 1))]
        (place,) = {p for p in inside if p in flat}
        flat.pop(place)[...] = variable[...]
    return model, flat


@pytest.mark.parametrize("form", FORMS)
def test_adaptive_forms_have_the_static_parameters_under_their_wrappers(form, static):
    adaptive = make(lambda rngs: build(rngs, FORMS[form]), seed=1)
    state = nnx.state(static, (nnx.Param, nnx.BatchStat))
    adaptive, left = under(adaptive, state)
    # What is left is of gates and of the plain branches.
    assert left and all(
        "gate" in path or (form == "select" and path[-4:-2] == ("blocks", 0)) or "blocks" in path for path in left
    )
    decisions = BLOCKS if form == "skip" else [b for b in BLOCKS if "blocks/2/" not in b]
    x = pictures(2, 21, 30)
    dj.budget.set_threshold(adaptive, -30.0)
    logits, trace = jax.jit(lambda x: dj.traced(still(adaptive))(x))(x)
    assert sorted(trace.decisions) == decisions
    np.testing.assert_allclose(logits, still(static)(x), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(trace.macs(), trace.full_macs, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_twin_params_give_the_logits_of_the_static_twin(form, static):
    twin_params = nnx.state(static, (nnx.Param, nnx.BatchStat))

    # Not by `make`, which would put other numbers in their place; compiled at once rather than layer by layer.
    adaptive = nnx.jit(lambda: build(nnx.Rngs(3), FORMS[form], twin_params))()
    dj.budget.set_threshold(adaptive, -30.0)
    x = pictures(1, 16, 12)
    np.testing.assert_allclose(still(adaptive)(x), still(static)(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_any_size_and_stride(stride):
    backbone = ResidualConfig(widths=(4, 6, 8), blocks=(1, 0, 1), stem_stride=stride)
    config = DenseConfig(backbone, UNetHeadConfig(blocks=(1, 0)), StaticConfig())
    model = still(make(lambda rngs: models.build(config, 5, rngs=rngs)))
    for height, width in [(1, 1), (7, 5), (21, 30), (32, 16)]:
        logits = jax.eval_shape(lambda x: model(x), jax.ShapeDtypeStruct((2, height, width, 3), jnp.uint8))
        assert (logits.shape, logits.dtype) == ((2, height, width, 5), jnp.float32)


def test_the_default_rows_compact_equals_masked(static):
    adaptive = make(lambda rngs: build(rngs, FORMS["tiles"]))
    x = pictures(2, 21, 30)
    run = jax.jit(lambda x: [still(adaptive, way)(x) for way in ("masked", "compact")])
    np.testing.assert_allclose(*run(x), rtol=1e-4, atol=1e-4)


def test_half_precision_parameters(static):
    graphdef, state = nnx.split(static)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), state)
    run = jax.jit(lambda state, x: still(nnx.merge(graphdef, state))(x))
    x = pictures(1, 16, 12)
    logits = run(half, x)
    assert logits.dtype == jnp.float32
    expected = run(state, x)
    assert np.abs(logits - expected).mean() < 0.1 * np.abs(expected).mean()


def test_training_moves_statistics_and_has_gradients_everywhere(static):
    adaptive = make(lambda rngs: build(rngs, FORMS["select"]))

    def loss(model, x):
        logits, trace = dj.traced(model)(x)
        return (logits**2).mean() + dj.budget_loss(trace, 0.5)

    before = jax.tree.map(np.asarray, nnx.state(adaptive, nnx.BatchStat))
    grads = nnx.jit(nnx.grad(loss))(adaptive, pictures(2, 21, 30))
    for path, gradient in nnx.to_flat_state(grads):
        assert np.isfinite(gradient[...]).all(), path
    assert sum(bool(np.asarray(leaf).any()) for leaf in jax.tree.leaves(grads)) > 0.9 * len(jax.tree.leaves(grads))
    after = jax.tree.map(np.asarray, nnx.state(adaptive, nnx.BatchStat))
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


def test_the_random_control():
    model = make(lambda rngs: build(rngs, TilesConfig(tiles=(4, 3), gate="random")))
    gates = [module for _, module in nnx.iter_modules(model) if isinstance(module, dj.RandomGate)]
    assert len(gates) == 4 and {gate.size for gate in gates} == {4, 3}
    skip = make(lambda rngs: build(rngs, SkipConfig(gate="random")))
    assert sum(isinstance(module, dj.RandomGate) for _, module in nnx.iter_modules(skip)) == len(BLOCKS)


def test_gather_pixels_by_hand():
    x = jnp.arange(12.0).reshape(1, 2, 3, 2)
    # Pixels [0 1] [2 3] [4 5] over [6 7] [8 9] [10 11]; the odd last column is doubled.
    expected = [[[0, 1, 2, 3, 6, 7, 8, 9], [4, 5, 4, 5, 10, 11, 10, 11]]]
    np.testing.assert_array_equal(blocks.gather_pixels(x), [expected])


def test_spread_pixels_by_hand():
    x = jnp.arange(16.0).reshape(1, 1, 2, 8)
    first, second = [[[0, 1], [2, 3]], [[4, 5], [6, 7]]], [[[8, 9], [10, 11]], [[12, 13], [14, 15]]]
    np.testing.assert_array_equal(blocks.spread_pixels(x, 2)[0], np.concatenate([first, second], 1))
    np.testing.assert_array_equal(blocks.gather_pixels(blocks.spread_pixels(x, 2)), x)


def test_repeat_pixels():
    x = jnp.arange(4.0).reshape(1, 2, 2, 1)
    np.testing.assert_array_equal(blocks.repeat_pixels(x)[0, ..., 0], np.kron([[0, 1], [2, 3]], np.ones((2, 2))))


def test_errors():
    backbone = SMALL.backbone
    for changes, message in [
        (
            dict(backbone=dataclasses.replace(backbone, widths=(4, 6))),
            "--model.backbone.blocks is 1 1 2",
        ),
        (dict(backbone=dataclasses.replace(backbone, stem_stride=3)), "--model.backbone.stem-stride is 3"),
        (dict(head=UNetHeadConfig(blocks=(1,))), "--model.head.blocks is 1: it must be one number"),
        (
            dict(dynamics=TilesConfig(tiles=(4, 3, 2, 2))),
            "--model.dynamics.tiles is 4 3 2 2: it must be one side",
        ),
    ]:
        config = dataclasses.replace(SMALL, **changes)
        with pytest.raises(UserError, match=message):
            jax.eval_shape(lambda c=config: nnx.state(models.build(c, 3, rngs=nnx.Rngs(0))))


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("dynamics", [ExpertsConfig(layers=2, hidden=6, experts=3), HaltStepConfig(steps=3)])
def test_dynamics_in_the_place_of_the_coarsest_blocks(dynamics, random):
    dynamics = dataclasses.replace(dynamics, gate="random" if random else "learned")
    model = make(lambda rngs: build(rngs, dynamics))
    dj.budget.set_threshold(model, 0.3)
    x = pictures(2, 21, 30)
    run = jax.jit(lambda x: [dj.traced(still(model, way))(x) for way in ("masked", "compact")])
    (masked, trace), (compact, _) = run(x)
    np.testing.assert_allclose(masked, compact, rtol=1e-4, atol=1e-4)
    assert len(trace.decisions) == len(model.backbone.blocks[-1]) == (2 if isinstance(dynamics, ExpertsConfig) else 1)
    assert all(path.startswith("backbone/blocks/2/") for path in trace.decisions)
