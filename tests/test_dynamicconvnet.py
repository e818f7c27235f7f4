"""The network of dynamic kernels: its forms, its twin, training, the random control; the same kernels in the U-Net."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from blocks import make, still
from flax import nnx

import dynjax as dj
from dynjax import cost
from dynjax.config import UserError
from dynjax.core.decision import MIXTURE
from dynjax.core.training import schedule
from dynjax.models import build, static_twin
from dynjax.models.backbones.residual import ResidualConfig
from dynjax.models.dense import DenseConfig, StaticConfig
from dynjax.models.dynamicconvnet import DynamicConvNetConfig
from dynjax.models.heads.unet import UNetHeadConfig
from dynjax.ops.kernels import CondConv, with_kernels

SMALL = DynamicConvNetConfig(widths=(4, 6), blocks=(1, 1), kernels=3)
MIXTURES = ("condconv", "dyconv", "odconv")
DYNAMIC = (*MIXTURES, "hyper", "warehouse", "involution", "ddf")


def net(seed=0, **changes):
    model = make(lambda rngs: build(dataclasses.replace(SMALL, **changes), 5, rngs=rngs), seed)
    schedule(model, 1.0)
    return model


def pictures(*shape):
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))


def test_the_default_size_is_about_ten_million_macs():
    sizes = {}
    for dynamics in ("static", *MIXTURES, "hyper"):
        config = DynamicConvNetConfig(dynamics=dynamics)
        model = still(nnx.eval_shape(lambda config=config: build(config, 10, rngs=nnx.Rngs(0))))
        sizes[dynamics] = cost.macs(model, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.uint8))
    # Taps on the padding are not counted: 3 n - 2 along n pixels.
    convolutions = [(94**2, 3 * 16), *[(94**2, 16 * 16)] * 2, *[(46**2, 24 * 24)] * 2, *[(22**2, 48 * 48)] * 2]
    linear = 16**2 * 64 * 24 + 8**2 * 96 * 48 + 48 * 10
    assert sizes["static"] == sum(taps * channels for taps, channels in convolutions) + linear
    mixed = sum(2 * (4 * 9 * c * c + 4 * c) for c in (16, 24, 48))
    assert sizes["condconv"] == sizes["static"] + mixed
    assert all(sizes["static"] < sizes[kind] < 1.05 * sizes["static"] for kind in (*MIXTURES, "hyper"))


@pytest.mark.parametrize("dynamics", ["static", *DYNAMIC])
def test_logits_of_any_size_and_their_decisions(dynamics):
    model = still(net(dynamics=dynamics))
    for size in ((8, 8), (9, 5)):
        logits, trace = jax.eval_shape(lambda x: dj.traced(model)(x), jax.ShapeDtypeStruct((3, *size, 3), jnp.uint8))
        assert (logits.shape, logits.dtype) == ((3, 5), jnp.float32)
    paths = [f"stages/{stage}/0/conv{number}" for stage in (0, 1) for number in (1, 2)]
    assert sorted(trace.decisions) == (paths if dynamics in (*MIXTURES, "warehouse") else [])
    # Two 3x3 kernels of a stage have 18 cells.
    kinds = 18 if dynamics == "warehouse" else 3
    assert all(d.keep.shape == (3, kinds) and d.rule == MIXTURE for d in trace.decisions.values())


def test_a_stage_has_one_warehouse():
    model = nnx.eval_shape(
        lambda: build(dataclasses.replace(SMALL, dynamics="warehouse", cells=0.5), 5, rngs=nnx.Rngs(0))
    )
    shared = [{block.conv1.warehouse, block.conv2.warehouse} for (block,) in model.stages]
    assert [len(each) for each in shared] == [1, 1] and not shared[0] & shared[1]
    assert [each.pop().cells.shape for each in shared] == [(9, 1, 1, 4, 4), (9, 1, 1, 6, 6)]
    static = nnx.eval_shape(lambda: build(SMALL, 5, rngs=nnx.Rngs(0)))
    kernels = lambda model: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model.stages, nnx.Param)))  # noqa: E731
    attention = sum(16 * (c + 1) + 9 * 10 * 17 for c in (4, 6)) * 2
    assert kernels(model) == kernels(static) - 9 * (16 + 36) + attention


@pytest.mark.parametrize("dynamics", ["odconv", "warehouse"])
def test_a_few_steps_of_training_lower_the_loss(dynamics):
    model, x, label = net(dynamics=dynamics), pictures(6, 8, 8), jnp.asarray([0, 1, 2, 3, 4, 0])
    optimizer = optax.adam(1e-2)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def step(params, rest, state):
        def loss(params):
            model = nnx.merge(graphdef, params, rest, copy=True)
            logits = model(x)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
            return losses.mean(), nnx.state(model, nnx.Not(nnx.Param))

        (value, rest), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), rest, state, value, grads

    state, losses = optimizer.init(params), []
    for _ in range(8):
        params, rest, state, value, grads = step(params, rest, state)
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_trained_static_kernels_start_the_dynamic_ones():
    static, x = net(), pictures(2, 8, 8)
    config = dataclasses.replace(SMALL, dynamics="dyconv")
    assert static_twin(config) == SMALL
    twin_params = nnx.state(static, (nnx.Param, nnx.BatchStat))
    # Not by `make`, which would put other numbers in their place; compiled at once rather than layer by layer.
    started = nnx.jit(lambda rngs: build(config, 5, rngs=rngs, twin_params=twin_params))(nnx.Rngs(3))
    fresh = nnx.eval_shape(lambda: build(config, 5, rngs=nnx.Rngs(3)))
    assert jax.tree.structure(nnx.state(started)) == jax.tree.structure(nnx.state(fresh))
    y, expected = jax.jit(lambda x: (still(started)(x), still(static)(x)))(x)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_the_random_control_is_a_function_of_the_picture_when_evaluated():
    model, x = net(dynamics="dyconv", gate="random"), pictures(4, 8, 8)
    y, again, one = jax.jit(lambda x: (still(model)(x), still(model)(x), still(model)(x[1:2])))(x)
    np.testing.assert_array_equal(y, again)
    np.testing.assert_allclose(one, y[1:2], rtol=1e-4, atol=1e-4)
    trace = jax.jit(lambda x: dj.traced(still(model))(x)[1])(x)
    for decision in trace.decisions.values():
        np.testing.assert_allclose(decision.probability.sum(1), 1, rtol=1e-5)
        assert len(np.unique(np.asarray(decision.probability), axis=0)) == 4


def test_what_makes_no_sense_is_refused():
    config = dataclasses.replace(SMALL, dynamics="involution")
    with pytest.raises(UserError, match=r"--model\.gate is random: it must be learned: involution"):
        build(dataclasses.replace(config, gate="random"), 5, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=r"--model\.cells is 0.0: it must be more than 0"):
        build(dataclasses.replace(SMALL, dynamics="warehouse", cells=0.0), 5, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="involution cannot start from a static twin"):
        build(config, 5, rngs=nnx.Rngs(0), twin_params=nnx.State({}))
    with pytest.raises(UserError, match=r"--model\.blocks is 1: it must be one number for each stage"):
        build(dataclasses.replace(SMALL, blocks=(1,)), 5, rngs=nnx.Rngs(0))


def test_a_u_net_with_kernels_of_the_example_takes_a_step():
    config = DenseConfig(ResidualConfig(widths=(4, 6), blocks=(1, 0)), UNetHeadConfig(blocks=(1,)), StaticConfig())
    static = make(lambda rngs: build(config, 3, rngs=rngs))
    paths = {r"(backbone|head)/blocks/\d+/\d+/conv1": "condconv"}
    model = nnx.jit(lambda static, rngs: with_kernels(static, paths, kernels=2, rngs=rngs))(static, nnx.Rngs(0))
    assert isinstance(model.backbone.blocks[0][0].conv1, CondConv) and isinstance(
        model.backbone.blocks[0][0].conv2, nnx.Conv
    )
    x = pictures(2, 9, 12)

    @nnx.jit
    def run(static, model, x):
        before = still(static)(x), still(model)(x)
        loss = lambda model: (model(x) ** 2).mean()  # noqa: E731
        value, grads = nnx.value_and_grad(loss)(model)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.01 * g, nnx.state(model, nnx.Param), grads))
        return before, grads, value, loss(model)

    (expected, started), grads, first, second = run(static, model, x)
    np.testing.assert_allclose(started, expected, rtol=1e-4, atol=1e-4)
    assert second < first
    assert np.asarray(grads.head.blocks[0][0].conv1.kernel[...]).any((1, 2, 3, 4)).all()
    assert np.asarray(grads.head.blocks[0][0].conv1.attention.out.kernel[...]).any()
