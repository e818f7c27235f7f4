"""The patch classifier: shapes, odd sizes, the twin inside the experts, executions, training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import at, make, still
from flax import nnx
from test_ops_tiles import assert_same

import dynjax as dj
from dynjax import budget, cost, models
from dynjax.config import UserError
from dynjax.models import moe
from dynjax.models.blocks import gather_pixels
from dynjax.models.moe import MoEConfig

TINY = dict(patch=2, width=8, depth=2, heads=2, hidden=6, experts=4, top=2, least=1)


def build(rngs, dynamics="experts", **fields):
    return models.build(MoEConfig(**TINY | fields, dynamics=dynamics), 3, rngs=rngs)


def pictures(*shape):
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))


@pytest.mark.parametrize("gate", ["learned", "random"])
def test_masked_equals_compact_at_any_threshold(gate):
    model, x = make(lambda rngs: build(rngs, gate=gate)), pictures(3, 7, 8)

    @jax.jit
    def run(threshold):
        masked, compact = (at(threshold, still(model, way)) for way in ("masked", "compact"))
        return dj.traced(masked)(x), compact(x)

    spent = []
    for threshold in (-30.0, 0.0, 30.0):
        (y, trace), compact = run(jnp.float32(threshold))
        assert_same(y, compact)
        spent.append(np.asarray(trace.macs()))
    assert (y.shape, y.dtype) == ((3, 3), jnp.float32)
    assert sorted(trace.decisions) == ["blocks/0/mlp", "blocks/1/mlp"]
    assert trace.decisions["blocks/0/mlp"].keep.shape == (3, 16, 4)
    np.testing.assert_allclose(spent[0], trace.full_macs)
    np.testing.assert_allclose(spent[-1], trace.full_macs - 2 * 16 * 2 * 8 * 6, rtol=1e-6)
    assert (spent[1] < spent[0]).all() and (spent[1] >= spent[2]).all()


def test_the_twin_costs_what_the_net_costs_without_its_routers():
    x = pictures(1, 6, 6)
    twin = cost.macs(still(make(lambda rngs: build(rngs, "static"))), x)
    trace = jax.eval_shape(dj.traced(still(make(build))), x)[1]
    assert trace.full_macs == twin + 2 * 9 * 8 * 4


def test_the_twins_mlp_is_in_the_experts():
    """A token whose two experts have different parts and equal weights has the twin's MLP."""
    twin, x = make(lambda rngs: build(rngs, "static")), pictures(2, 6, 6)
    state = nnx.state(twin, (nnx.Param, nnx.BatchStat))
    config = MoEConfig(**TINY, dynamics="experts")
    model = nnx.jit(lambda state: moe.build(config, 3, rngs=nnx.Rngs(1), twin_params=state))(state)
    for block in model.blocks:
        keep = np.zeros((1, 1, 4))
        keep[..., [0, 3]] = 1
        block.mlp.gate = lambda x, keep=keep: dj.FixedGate(np.broadcast_to(keep, (1, x.shape[1], 4)))(x)
    run = jax.jit(lambda x: [still(model)(x), still(twin)(x)])
    np.testing.assert_allclose(*run(x), rtol=1e-4, atol=1e-4)


def test_training_has_gradients_everywhere():
    model = make(lambda rngs: build(rngs, depth=1))

    def loss(model, x):
        logits, trace = dj.traced(model)(x)
        extra = dj.budget_loss(trace, 0.9) + 0.01 * budget.load_balance(trace)
        return (logits**2).mean() + extra + 1e-3 * dj.ops.router_z_loss(model)

    grads = nnx.jit(nnx.grad(loss))(model, pictures(2, 6, 6))
    for path, gradient in nnx.to_flat_state(grads):
        leaf = np.asarray(gradient[...])
        # A bias on all keys changes no softmax over them.
        assert np.isfinite(leaf).all() and (leaf.any() or path[-2:] == ("key", "bias")), path


def test_patches_and_positions_by_hand():
    x = jnp.arange(12.0).reshape(1, 3, 4, 1)
    first = [[0, 1, 4, 5], [2, 3, 6, 7]]
    last = [[8, 9, 8, 9], [10, 11, 10, 11]]  # the last row repeated
    np.testing.assert_array_equal(gather_pixels(x, 2), [[first, last]])
    place = np.asarray(moe.positions(2, 3, 8))
    for row, column in [(0, 0), (1, 2)]:
        rates = np.asarray([1, 1e-4])
        expected = np.concatenate([f(p * rates) for p in (row, column) for f in (np.sin, np.cos)])
        np.testing.assert_allclose(place[row, column], expected, atol=1e-6)


def test_any_size():
    model = still(make(lambda rngs: build(rngs, "static")))
    for height, width in [(1, 1), (7, 5), (28, 28)]:
        spec = jax.eval_shape(lambda x: model(x), jax.ShapeDtypeStruct((2, height, width, 3), jnp.uint8))
        assert (spec.shape, spec.dtype) == ((2, 3), jnp.float32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(width=6), "width is 6"),
        (dict(heads=3), "a multiple of --model.heads"),
        (dict(patch=0), "patch is 0"),
        (dict(top=5), "top is 5"),
    ],
    ids=str,
)
def test_errors(fields, message):
    with pytest.raises(UserError, match=message):
        make(lambda rngs: build(rngs, **fields))
