"""Kernels assembled from shared cells: parity with a plain loop, where attention begins, gradients, MACs.

Letters as in warehouse.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import image, make, still
from flax import nnx
from test_convolve import one_by_one
from test_ops_kernels import array, both_strategies, linear

import dynjax as dj
from dynjax import cost
from dynjax.core.decision import MIXTURE
from dynjax.core.training import schedule
from dynjax.ops.warehouse import Warehouse, WarehouseConv

# shape of x, kernels of the warehouse, the layer, options of the warehouse and of the layer
CASES = {
    "two layers": ((3, 6, 5, 4), [(3, 3, 4, 6), (3, 3, 4, 4)], 1, {}, {}),
    "one example, odd sizes": ((1, 7, 3, 2), [(2, 3, 2, 3)], 0, {}, {}),
    "fewer cells, strides, no bias": (
        (2, 7, 6, 4),
        [(1, 1, 2, 4), (3, 3, 4, 4)],
        1,
        dict(budget=0.4),
        dict(strides=2, use_bias=False),
    ),
    "larger cells, groups": (
        (2, 6, 7, 4),
        [(3, 2, 2, 6)] * 2,
        1,
        dict(cell=(3, 1, 1, 3), budget=1.5),
        dict(feature_group_count=2, kernel_dilation=2),
    ),
    "no padding": ((2, 6, 7, 4), [(3, 1, 4, 2)], 0, dict(cell=(1, 1, 2, 2)), dict(padding="VALID")),
}


def layer_of(kernels, layer=0, rngs=None, warehouse=None, groups=1, **options):
    """A layer of a warehouse for these kernels, as it is after training."""

    def build(rngs):
        height, width, inputs, outputs = kernels[layer]
        own = Warehouse(kernels, **warehouse or {}, rngs=rngs)
        return WarehouseConv(
            inputs * options.get("feature_group_count", 1),
            outputs,
            (height, width),
            warehouse=own,
            layer=layer,
            **options,
            rngs=rngs,
        )

    conv = make(build)
    schedule(conv, 1.0)
    return conv


def assembled(conv, x, tau):
    """The definition: kernels (B, kh, kw, I, D) of the examples, part by part and cell by cell."""
    cells, beta = array(conv.warehouse.cells), conv.warehouse.beginning(conv.layer)
    mean = np.asarray(x, np.float64).mean((1, 2))
    z = linear(conv.attention.out, np.maximum(linear(conv.attention.hidden, mean), 0))
    kernels = np.zeros((len(x), *conv.kernel_shape))
    corners = [np.arange(0, n, side) for n, side in zip(conv.kernel_shape, conv.warehouse.cell, strict=True)]
    for example in range(len(x)):
        rows = z[example].reshape(len(beta), len(cells) + 1)
        for part, corner in enumerate(np.stack(np.meshgrid(*corners, indexing="ij"), -1).reshape(-1, 4)):
            place = tuple(slice(at, at + side) for at, side in zip(corner, conv.warehouse.cell, strict=True))
            for cell in range(len(cells)):
                share = rows[part, cell] / (np.abs(rows[part]).sum() + 1e-3)
                kernels[(example, *place)] += (tau * beta[part, cell] + (1 - tau) * share) * cells[cell]
    return jnp.asarray(kernels, jnp.float32)


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_a_mixture_of_cells_in_every_part(name):
    shape, kernels, layer, warehouse, options = CASES[name]
    conv, x = layer_of(kernels, layer, warehouse=warehouse, **options), image(*shape)
    conv.attention.held[...] = jnp.float32(0.25)
    ways = dict(strides=1, padding="SAME", kernel_dilation=1, feature_group_count=1) | options
    ways.pop("use_bias", None)
    expected = one_by_one(x, assembled(conv, x, 0.25), *ways.values())
    expected = expected if conv.bias is None else expected + conv.bias[...][None, None, None]
    for y in jax.jit(lambda x: both_strategies(conv, lambda conv: conv(x)))(x):
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))


@pytest.mark.parametrize("budget", [0.2, 0.5, 1.0, 1.5, 3.0])
def test_attention_begins_with_cells_of_its_own(budget):
    warehouse = Warehouse([(3, 3, 2, 2), (1, 1, 4, 2)], budget, rngs=nnx.Rngs(0))
    beta = np.concatenate([warehouse.beginning(layer) for layer in range(2)])
    assert beta.shape == (9 + 2, int(budget * 11)) and warehouse.cells.shape == (int(budget * 11), 1, 1, 2, 2)
    assert set(np.unique(beta)) == {0, 1} and (beta.sum(0) <= 1).all()
    if budget >= 1:
        np.testing.assert_array_equal(beta.sum(1), 1)
    else:
        np.testing.assert_array_equal(beta.sum(0), 1)  # and the other parts begin as nothing


def test_fewer_cells_begin_at_other_taps_each_time():
    beta = Warehouse([(3, 3, 2, 2)], 1 / 3, rngs=nnx.Rngs(0)).beginning(0)
    np.testing.assert_array_equal(beta.sum(1).reshape(3, 3), np.eye(3))


def test_at_first_it_is_the_static_convolution_of_its_cells():
    conv, x = layer_of([(3, 3, 2, 4), (3, 3, 2, 4)], 1), image(2, 5, 6, 2)
    schedule(conv, 0.0)
    kernel = conv.warehouse.cells[...][9:].reshape(3, 3, 2, 4)
    y = jax.jit(conv)(x)
    expected = one_by_one(x, jnp.stack([kernel, kernel])) + conv.bias[...][None, None, None]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    schedule(conv, 0.05)
    np.testing.assert_allclose(conv.attention.held[...], 0.5)
    schedule(conv, 0.7)
    assert conv.attention.held[...] == 0


def test_cells_begin_as_parts_of_their_kernels_would():
    wide, narrow = (3, 3, 64, 64), (1, 1, 16, 64)
    warehouse = jax.jit(lambda: nnx.state(Warehouse([wide, narrow], rngs=nnx.Rngs(0), cell=(1, 1, 16, 64))))()
    cells = np.asarray(warehouse.cells[...])
    assert cells[:36].std() == pytest.approx((9 * 64) ** -0.5, rel=0.05)
    assert cells[36:].std() == pytest.approx(16**-0.5, rel=0.1)


class Two(nnx.Module):
    """Two layers of one warehouse."""

    def __init__(self, rngs, budget=0.5, random=False):
        warehouse = Warehouse([(3, 3, 4, 4)] * 2, budget, rngs=rngs)
        ways = dict(warehouse=warehouse, use_bias=False, random=random, rngs=rngs)
        self.first, self.second = (WarehouseConv(4, 4, (3, 3), layer=layer, **ways) for layer in range(2))

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


def test_gradients_of_two_layers_meet_in_their_cells():
    model, x = make(Two), image(3, 5, 4, 4)
    for part in (model.first, model.second):
        part.attention.hidden.bias[...] += 3  # none of the few hidden units is dead
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    assert sum("cells" in path for path in nnx.to_flat_state(params).paths) == 1
    outside = jnp.zeros_like(model.first.warehouse.cells[...])

    def loss(params, ahead, behind):
        model = nnx.merge(graphdef, params, rest)
        cells = model.first.warehouse.cells
        # The same cells for each layer, told apart by what is added for it.
        own = cells[...]
        cells[...] = own + ahead
        y = nnx.relu(model.first(x))
        cells[...] = own + behind
        return (model.second(y) ** 3).sum()

    whole, first, second = jax.jit(jax.grad(loss, (0, 1, 2)))(params, outside, outside)
    assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in jax.tree.leaves(whole))
    assert first.any((1, 2, 3, 4)).all() and second.any((1, 2, 3, 4)).all()
    np.testing.assert_allclose(whole.first.warehouse.cells[...], first + second, rtol=1e-4, atol=1e-4)


def test_both_strategies_have_the_same_gradient():
    conv, x = layer_of([(3, 3, 4, 6)] * 2, warehouse=dict(budget=0.5)), image(3, 5, 4, 4)
    graphdef, params, rest = nnx.split(conv, nnx.Param, ...)

    def slopes(way):
        definition = nnx.split(way, nnx.Param, ...)[0]
        return jax.grad(lambda p, x: (nnx.merge(definition, p, rest)(x) ** 3).sum(), (0, 1))(params, x)

    loop, grouped = jax.jit(lambda: both_strategies(nnx.merge(graphdef, params, rest), slopes))()
    for a, b in zip(jax.tree.leaves(loop), jax.tree.leaves(grouped), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * float(jnp.abs(b).max()))


def test_macs_worked_by_hand_and_in_the_trace():
    conv, x = layer_of([(3, 3, 4, 6)] * 2, warehouse=dict(budget=0.5)), image(2, 8, 6, 4)
    static, cells, parts = (3 * 8 - 2) * (3 * 6 - 2) * 4 * 6, 9, 9
    macs = static + cells * 9 * 4 * 6 + 16 * (4 + parts * (cells + 1))
    assert cost.macs(conv, x) == 2 * macs
    _, trace = jax.jit(lambda x: dj.traced(conv)(x))(x)
    (decision,) = trace.decisions.values()
    assert decision.rule == MIXTURE and decision.keep.shape == (2, cells)
    assert (decision.probability.sum(1) < 1).all() and (decision.probability > 0).all()
    assert trace.full_macs == trace.static_macs == macs


def test_a_model_with_shared_cells_is_viewed_counted_and_traced_as_one():
    model, x = make(Two), image(2, 5, 4, 4)
    viewed = still(model)
    assert viewed.first.warehouse is viewed.second.warehouse
    y, again = jax.jit(lambda x: (dj.traced(viewed)(x)[0], model(x)))(x)
    np.testing.assert_allclose(y, again, rtol=1e-5, atol=1e-5)


def test_random_attention_has_either_sign_and_is_a_function_of_the_example_when_evaluated():
    model, x = make(lambda rngs: Two(rngs, random=True)), image(4, 5, 4, 4)
    schedule(model, 1.0)
    first, second = nnx.jit(lambda model, x: (model(x), model(x)))(model, x)
    assert not np.allclose(first, second)
    y, again, one = jax.jit(lambda x: (still(model)(x), still(model)(x), still(model)(x[2:3])))(x)
    np.testing.assert_array_equal(again, y)
    np.testing.assert_allclose(one, y[2:3], rtol=1e-4, atol=1e-5)
    conv = still(model).first
    weights = conv.attention.weights(x.mean((1, 2)), conv.warehouse.beginning(0))
    assert (weights < 0).any() and (weights > 0).any() and (jnp.abs(weights).sum(-1) < 1).all()


def test_shapes_are_those_of_a_convolution_and_half_precision_stays_half():
    for options in (dict(strides=2), dict(padding=2), dict(padding=((1, 0), (0, 2)), kernel_dilation=(1, 2))):
        conv = layer_of([(3, 3, 4, 6)], **options)
        static = make(lambda rngs, o=options: nnx.Conv(4, 6, (3, 3), **o, rngs=rngs))
        x = image(2, 9, 8, 4)
        assert jax.eval_shape(conv, x).shape == jax.eval_shape(static, x).shape
    graphdef, state = nnx.split(conv)
    half = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state))
    assert jax.eval_shape(half, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_mistakes_are_named():
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match=r"kernels=\[\]: a warehouse needs the shapes"):
        Warehouse([], rngs=rngs)
    with pytest.raises(ValueError, match=r"budget=0\.0 must be positive"):
        Warehouse([(3, 3, 4, 4)], 0.0, rngs=rngs)
    with pytest.raises(ValueError, match=r"kernel of shape \(3, 3, 4, 4\) cannot be cut into cells of shape \(2, 1"):
        Warehouse([(3, 3, 4, 4)], cell=(2, 1, 4, 4), rngs=rngs)
    warehouse = Warehouse([(3, 3, 4, 4)], rngs=rngs)
    with pytest.raises(ValueError, match="layer=1 must be one of the 1"):
        WarehouseConv(4, 4, (3, 3), warehouse=warehouse, layer=1, rngs=rngs)
    with pytest.raises(ValueError, match=r"has a kernel of shape \(3, 3, 4, 4\), and this one is \(3, 3, 4, 6\)"):
        WarehouseConv(4, 6, (3, 3), warehouse=warehouse, layer=0, rngs=rngs)
