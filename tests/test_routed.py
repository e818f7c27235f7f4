"""The routed nets: shapes, their static twin, sampled training, and the refusals of their configuration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import at, make, still
from flax import nnx
from test_ops_tiles import assert_same

import dynjax as dj
from dynjax import models
from dynjax.config import UserError
from dynjax.models.routed import RoutedConfig

SMALL = dict(channels=4, scales=2, layers=3)
TASKS = {"classification": dict(), "segmentation": dict(task="segmentation", stem_stride=2)}


def build(rngs, **form):
    return models.build(RoutedConfig(**SMALL | form), 3, rngs=rngs)


def pictures(*shape):
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))


@pytest.mark.parametrize("task", TASKS)
def test_gates_at_every_threshold_and_the_static_twin(task):
    x = pictures(3, 13, 10)
    static = make(lambda rngs: build(rngs, **TASKS[task]))
    state = nnx.state(static, (nnx.Param, nnx.BatchStat))
    gated = make(lambda rngs: build(rngs, dynamics="gates", **TASKS[task]), seed=1)
    nnx.update(gated, state)

    def run(threshold):
        model = at(threshold, gated)
        return dj.traced(still(model))(x), still(model, "compact")(x)

    run, spent = jax.jit(run), []
    logits = {}
    for threshold in (-30.0, 0.0, 30.0):
        (masked, trace), compact = run(threshold)
        assert_same(masked, compact)
        assert masked.shape == ((3, 3) if task == "classification" else (3, 13, 10, 3)) and masked.dtype == jnp.float32
        spent.append(np.asarray(trace.macs()))
        logits[threshold] = masked
    assert len(trace.decisions) == 1 + 2 + 2
    np.testing.assert_allclose(spent[0], trace.full_macs, rtol=1e-6)
    np.testing.assert_allclose(spent[2], trace.static_macs, rtol=1e-6)
    assert (spent[0] >= spent[1]).all() and (spent[1] >= spent[2]).all() and spent[1].mean() < spent[0].mean()
    twin = jax.jit(lambda x: still(static)(x))(x)
    np.testing.assert_allclose(logits[-30.0], twin, rtol=0, atol=1e-4 * np.abs(twin).max())
    assert np.abs(logits[30.0] - twin).max() > 1e-2


def test_twin_params_are_put_in():
    state = nnx.state(make(build), (nnx.Param, nnx.BatchStat))
    config = RoutedConfig(**SMALL, dynamics="gates")
    # Not by `make`, which would put other numbers in their place.
    shapes = nnx.eval_shape(lambda: models.build(config, 3, rngs=nnx.Rngs(0), twin_params=state))
    flat = dict(nnx.to_flat_state(nnx.state(shapes, (nnx.Param, nnx.BatchStat))))
    twin = dict(nnx.to_flat_state(state))
    assert set(twin) <= set(flat) and all("gate" in path for path in set(flat) - set(twin))
    model = nnx.jit(lambda: models.build(config, 3, rngs=nnx.Rngs(0), twin_params=state))()
    for path, variable in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))):
        if path in twin:
            np.testing.assert_array_equal(variable[...], twin[path][...])


@pytest.mark.parametrize("dynamics", ["gates", "sandwich"])
def test_training_moves_every_part(dynamics):
    def loss(model, x):
        logits, trace = dj.traced(model)(x)
        return (logits**2).mean() + dj.budget_loss(trace, target=0.5), trace

    model, x = at(-1.0, make(lambda rngs: build(rngs, layers=2, dynamics=dynamics))), pictures(6, 8, 8)
    # As gates are when they are made; `make` leaves their logits around 0.
    for _, module in nnx.iter_modules(model):
        if isinstance(module, dj.PathGate):
            module.logits.bias[...] = jnp.full_like(module.logits.bias[...], 1.5)
    grads, trace = nnx.jit(nnx.grad(loss, has_aux=True))(model, x)
    leaves = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(grads)}
    assert all(np.isfinite(leaf).all() for leaf in leaves.values())
    # The last layer's gates have one path; of a cell that a batch does not reach nothing would move.
    assert [path for path, leaf in leaves.items() if not leaf.any()] == []
    assert 0 < trace.macs().mean() <= trace.full_macs


def test_separable_cells_and_the_random_control():
    form = dict(dynamics="gates", gate="random", operation="separable", scales=1, layers=2)
    model, x = make(lambda rngs: build(rngs, **form)), pictures(4, 8, 8)
    (masked, trace), compact = jax.jit(lambda x: (dj.traced(still(model))(x), still(model, "compact")(x)))(x)
    assert_same(masked, compact)
    assert all(isinstance(cell.gate, dj.SampledPaths) for cells in model.supernet.layers for cell in cells)
    plain = dj.traced(still(make(lambda rngs: build(rngs, **form | dict(operation="residual")))))(x)[1]
    assert trace.full_macs < 0.7 * plain.full_macs


def test_configurations_that_make_no_net():
    control = "--model.gate is random: it must be learned: random is the control of gates, and single learns none"
    for message, form in {
        "--model.stem-stride is 3: it must be 1, 2 or 4": dict(stem_stride=3),
        "--model.layers is 3: it must be from 4": dict(scales=4),
        control: dict(dynamics="single", gate="random"),
    }.items():
        with pytest.raises(UserError, match=message):
            make(lambda rngs, form=form: build(rngs, **form))
