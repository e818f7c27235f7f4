"""Select: the chosen module per example or per tile. Cell: the open paths of each example. Masked and compact alike."""

import itertools
from unittest import mock

import blocks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import CHANNELS, at, image, make, still
from flax import nnx
from test_ops_tiles import Squeeze, assert_same, three_ways

import dynjax as dj
from dynjax import cost, execute
from dynjax.core.decision import EACH, Decision
from dynjax.ops import Flow


def choices(shape, count):
    """One-hot patterns: each branch alone, and random ones."""
    random = np.random.default_rng(0)
    alone = [np.full(shape, k) for k in range(count)]
    return [jax.nn.one_hot(jnp.asarray(k), count) for k in (*alone, random.integers(0, count, shape))]


@pytest.mark.parametrize("examples", [1, 5])
def test_per_example(examples):
    modules = [make(kind) for kind in (blocks.Pointwise, Squeeze, blocks.Residual)]
    x = image(examples, 7, 6, CHANNELS)
    run = three_ways(lambda x, keep: (dj.Select(modules, dj.FixedGate(keep)), x), x, jnp.zeros((examples, 3)))
    outputs = np.stack([run(x, choice)[0] for choice in choices((examples,), 3)[:3]])
    np.testing.assert_allclose(outputs[1], still(modules[1])(x), rtol=1e-5, atol=1e-6)
    for choice in choices((examples,), 3):
        masked, *compact = run(x, choice)
        np.testing.assert_array_equal(masked, outputs[choice.argmax(-1), np.arange(examples)])
        assert_same(masked, *compact)


@pytest.mark.parametrize("shape", [(2, 13, 9), (1, 3, 3)], ids=str)
def test_per_tile(shape):
    """Branches of several radii, one of which is run on whole windows."""
    modules = [make(kind) for kind in (blocks.Pointwise, blocks.Pooled, blocks.Biased)]
    x, grid = image(*shape, CHANNELS), (shape[0], -(-shape[1] // 4), -(-shape[2] // 4))
    run = three_ways(lambda x, keep: (dj.Select(modules, dj.FixedGate(keep, size=4)), x), x, jnp.zeros((*grid, 3)))
    outputs = np.stack([run(x, choice)[0] for choice in choices(grid, 3)[:3]])
    for choice in choices(grid, 3):
        masked, *compact = run(x, choice)
        pixels = np.asarray(choice.argmax(-1)).repeat(4, 1).repeat(4, 2)[:, : shape[1], : shape[2], None]
        np.testing.assert_array_equal(masked, np.choose(pixels, outputs))
        assert_same(masked, *compact)


def test_a_branch_may_be_a_function_and_change_the_channels():
    wider, plain = make(blocks.Wider), make(lambda rngs: nnx.Linear(CHANNELS, 6, rngs=rngs))
    modules = [lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, 2))), plain, wider]
    x, keep = image(1, 8, 8, CHANNELS), choices((1, 2, 2), 3)[-1]
    model = dj.Select(modules, dj.FixedGate(keep, size=4))
    assert_same(still(model)(x), still(model, "compact")(x))


def selected(rngs, size=4):
    gate = dj.BranchGate(CHANNELS, 2, size=size, rngs=rngs)
    return dj.Select([blocks.Pointwise(rngs), blocks.Residual(rngs)], gate)


def test_the_threshold_moves_the_choice_to_the_first():
    model, x = make(selected), image(2, 13, 9, CHANNELS)

    def run(threshold):
        return dj.traced(at(threshold, still(model)))(x), at(threshold, still(model, "compact"))(x)

    run, spent, taken = jax.jit(run), [], []
    for threshold in (-30.0, 0.0, 0.2, 30.0):
        (masked, trace), compact = run(threshold)
        assert_same(masked, compact)
        spent.append(float(trace.macs().mean()))
        taken.append(float(trace.decisions[""].kept()))
    assert taken == sorted(taken, reverse=True)
    # Between the ends tiles of several branches pay for their borders, so spending need not fall at every step.
    assert spent[-1] < min(spent[:-1])
    assert taken[0] == 1 and taken[-1] == 0
    np.testing.assert_allclose(spent[0], trace.full_macs, rtol=1e-6)


@pytest.mark.parametrize("size", [None, 4])
def test_gradients_reach_gate_and_all_branches(size):
    def loss(model, x):
        return (model(x) ** 2).sum()

    model = make(lambda rngs: selected(rngs, size))
    grads, slope = nnx.jit(nnx.grad(loss, argnums=(0, 1)))(model, image(6, 9, 9, CHANNELS))
    leaves = [np.asarray(leaf) for leaf in (*jax.tree.leaves(grads), slope)]
    assert len(leaves) == 5 + 2 + 6 + 1
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in leaves)


def test_errors():
    x, plain = image(2, 8, 8, CHANNELS), make(blocks.Pointwise)
    with pytest.raises(
        ValueError,
        match=r"Select needs a decision per example \(rule: one\) of shape \(2, 3\).*BranchGate\(channels, 3",
    ):
        dj.Select([plain] * 3, dj.FixedGate(np.ones((1, 2))))(x)
    with pytest.raises(ValueError, match=r"Select needs a decision per tile \(rule: one\) of shape \(2, 2, 2, 2\)"):
        dj.Select([plain] * 2, dj.FixedGate(np.ones((1, 2, 2)), size=4))(x)
    with pytest.raises(ValueError, match=r"gives shape \(2, 8, 8, 6\).*branches"):
        dj.Select([plain, make(blocks.Wider)], dj.FixedGate([[1, 0]]))(x)
    with pytest.raises(ValueError, match="Squeeze cannot be run on tiles"):
        dj.Select([plain, make(Squeeze)], dj.FixedGate(np.ones((1, 2, 2, 2)), size=4))(x)
    with pytest.raises(ValueError, match="Select per tile around a module that is dynamic already"):
        dj.Select([plain, dj.Skip(plain, dj.FixedGate([1]))], dj.FixedGate(np.ones((1, 2, 2, 2)), size=4))
    with pytest.raises(ValueError, match="Select needs at least one module"):
        dj.Select([], dj.FixedGate([[1, 0]]))


# Cells: every example has one of the 8 combinations of open paths

PATHS = ("up", "keep", "down")
COMBINATIONS = np.array(list(itertools.product((0, 1), repeat=3)), np.float32)


class Up(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(CHANNELS, CHANNELS // 2, rngs=rngs)

    def __call__(self, x):
        return jnp.repeat(jnp.repeat(self.linear(x), 2, 1), 2, 2)


class Down(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(CHANNELS, 2 * CHANNELS, (3, 3), strides=2, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.conv(x))


class Weighted(nnx.Module):
    """A gate of given weights, of which 0 is a closed path."""

    def __init__(self, weights):
        self.weights = nnx.Variable(weights)

    def __call__(self, x):
        weights = self.weights[...]
        return Decision((weights > 0).astype(jnp.float32), weights, "example")


def parts(rngs):
    return blocks.Residual(rngs), Up(rngs), Down(rngs)


def routed(rngs):
    operation, up, down = parts(rngs)
    return dj.Cell(operation, dj.PathGate(CHANNELS, 3, rngs=rngs), up=up, down=down)


@pytest.fixture(scope="module")
def modules():
    return make(lambda rngs: nnx.List(parts(rngs)))


@pytest.mark.parametrize("examples", [1, 9])
def test_a_cell_weighs_its_open_paths_and_passes_its_input_on_when_all_are_closed(examples, modules):
    operation, up, down = (still(module) for module in modules)
    random = np.random.default_rng(1)
    x = image(examples, 7, 6, CHANNELS)

    def wrap(x, weights):
        return dj.Cell(modules[0], Weighted(weights), up=modules[1], down=modules[2]), x

    run = three_ways(wrap, x, jnp.zeros((examples, 3)))
    h = operation(x)
    along = dict(up=up(h), keep=h, down=down(h))
    for start in range(8) if examples == 1 else [0, 5]:
        opens = COMBINATIONS[(np.arange(examples) + start) % 8]
        weights = opens * random.uniform(0.1, 1, opens.shape).astype(np.float32)
        masked, *compact = run(x, jnp.asarray(weights))
        dropped = ~opens.any(1)
        for number, path in enumerate(PATHS):
            expected = weights[:, number, None, None, None] * along[path]
            if path == "keep":
                expected = np.where(dropped[:, None, None, None], x, expected)
            np.testing.assert_allclose(masked[path].features, expected, rtol=1e-4, atol=1e-5)
            arrived = np.maximum(opens[:, number], dropped * (path == "keep"))
            for flow in (masked[path], *(way[path] for way in compact)):
                np.testing.assert_array_equal(flow.arrived, arrived)
                np.testing.assert_array_equal(np.abs(flow.features).max((1, 2, 3)) > 0, arrived)
            assert_same(masked[path].features, *(way[path].features for way in compact))


def test_a_closed_path_runs_nothing(modules):
    """Compact execution one example at a time, counted where it happens."""
    ran = []

    def counted(name, module):
        def run(x):
            jax.experimental.io_callback(lambda: ran.append(name), None)
            return still(module)(x)

        return run

    weights, x = jnp.asarray(COMBINATIONS), image(8, 6, 6, CHANNELS)
    operation, up, down = map(counted, ("operation", "up", "down"), modules)

    def compact(x, weights):
        cell = dj.Cell(operation, Weighted(weights), up=up, down=down)
        return still(cell, "compact", strategy="loop")(x)

    with mock.patch.object(execute, "BREAK_EVEN_SAMPLES", 2.0):
        run = jax.jit(compact).lower(x, weights).compile()
    for weights in (COMBINATIONS, COMBINATIONS[::-1] * [1, 1, 0], COMBINATIONS * 0, COMBINATIONS * 0 + 1):
        ran.clear()
        jax.block_until_ready(run(x, jnp.asarray(weights, jnp.float32)))
        jax.effects_barrier()
        counts = [ran.count(name) for name in ("operation", "up", "down")]
        assert counts == [weights.any(1).sum(), weights[:, 0].sum(), weights[:, 2].sum()]


def test_macs_of_a_cell_are_those_of_its_open_parts(modules):
    x = image(8, 7, 6, CHANNELS)
    cell = dj.Cell(modules[0], Weighted(jnp.asarray(COMBINATIONS * 0.5)), up=modules[1], down=modules[2])
    trace = jax.jit(dj.traced(still(cell)))(x)[1]
    one = x[:1]
    operation, up, down = (cost.macs(still(module), one) for module in modules)
    spent = COMBINATIONS.any(1) * operation + COMBINATIONS @ [up, 0, down]
    np.testing.assert_allclose(trace.macs(), spent, rtol=1e-6)
    assert trace.static_macs == 0 and trace.full_macs == operation + up + down
    assert trace.decisions[""].rule == EACH


def test_inputs_are_summed_and_where_none_arrives_the_cell_is_dropped(modules):
    x, other = image(3, 5, 5, CHANNELS), image(3, 5, 5, CHANNELS, seed=1)
    first, second = jnp.asarray([1.0, 0, 0]), jnp.asarray([1.0, 1, 0])
    flows = [Flow(v * a[:, None, None, None], a) for v, a in ((x, first), (other, second))]
    cell = dj.Cell(modules[0], Weighted(jnp.ones((3, 1))))
    out, trace = dj.traced(lambda cell, x, flows: cell(*flows))(still(cell), x, flows)
    expected = still(modules[0])(flows[0].features + flows[1].features)
    np.testing.assert_allclose(out["keep"].features, expected.at[2].set(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(out["keep"].arrived, second)
    np.testing.assert_array_equal(trace.decisions[""].keep, [[1, 1], [1, 1], [0, 0]])


def test_without_a_gate_all_paths_are_open_and_nothing_is_decided(modules):
    x = image(2, 5, 5, CHANNELS)
    static = dj.Cell(modules[0], up=modules[1], down=modules[2])
    every = dj.Cell(modules[0], Weighted(jnp.ones((2, 3))), up=modules[1], down=modules[2])
    out, trace = jax.jit(dj.traced(still(static)))(x)
    assert not trace.decisions
    for path, flow in still(every)(x).items():
        np.testing.assert_allclose(out[path].features, flow.features, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(out[path].arrived, 1)


def test_the_threshold_closes_paths_one_after_the_other():
    model, x = make(routed), image(5, 7, 6, CHANNELS)
    run = jax.jit(lambda t: (dj.traced(at(t, still(model)))(x), at(t, still(model, "compact"))(x)))
    spent = []
    for threshold in (-30.0, -0.5, -0.2, 0.0, 0.2, 30.0):
        (masked, trace), compact = run(threshold)
        for path in PATHS:
            assert_same(masked[path].features, compact[path].features)
        spent.append(float(trace.macs().mean()))
    np.testing.assert_allclose(spent[0], trace.full_macs, rtol=1e-6)
    np.testing.assert_allclose(spent[-1], trace.static_macs, rtol=1e-6)
    assert spent == sorted(spent, reverse=True) and len(set(spent)) > 3
    np.testing.assert_array_equal(masked["keep"].features, x)


def test_gradients_reach_the_gate_and_all_parts_of_a_cell():
    def loss(model, x):
        return sum((flow.features**2).sum() for flow in model(x).values())

    model = at(-2.0, make(routed))
    grads, slope = nnx.jit(nnx.grad(loss, argnums=(0, 1)))(model, image(4, 5, 5, CHANNELS))
    leaves = [np.asarray(leaf) for leaf in (*jax.tree.leaves(grads), slope)]
    assert len(leaves) == 5 + 6 + 2 + 2 + 1
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in leaves)


@pytest.mark.parametrize("threshold", [-2.0, 2.0], ids=["open", "closed"])
def test_a_budget_can_close_and_open_paths(threshold):
    def spent(model, x):
        return dj.traced(model)(x)[1].macs().mean()

    grads = nnx.jit(nnx.grad(spent))(at(threshold, make(routed)), image(2, 4, 4, CHANNELS))
    slope = np.asarray(grads.gate.logits.bias[...])
    # Of no cost of its own, the path keep pulls only where it is the most open one, and then the operation's cost too.
    assert (slope >= 0).all() and slope[0] > 0 and slope[2] > 0


def test_errors_of_cells(modules):
    x, (operation, up, down) = image(2, 8, 8, CHANNELS), modules
    hint = r"Cell needs a decision per example \(rule: each\) of shape \(2, 2\).*PathGate.channels, 2.*keep, down"
    with pytest.raises(ValueError, match=hint):
        dj.Cell(operation, Weighted(jnp.ones((2, 3))), down=down)(x)
    with pytest.raises(ValueError, match="Cell around a module that is dynamic already"):
        dj.Cell(operation, Weighted(jnp.ones((2, 2))), up=dj.Skip(up, dj.FixedGate([1])))
    with pytest.raises(ValueError, match=r"a cell's inputs have shapes .*\(2, 4, 8, 4\).*must have one"):
        dj.Cell(operation)(*(Flow(each, jnp.ones(2)) for each in (x, x[:, :4])))
    with pytest.raises(ValueError, match="compact execution cannot train: BatchNorm"):
        nnx.view(dj.Cell(operation, Weighted(jnp.ones((2, 1)))), execution="compact")(x)
