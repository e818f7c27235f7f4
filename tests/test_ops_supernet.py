"""The supernet: where its paths lead, which cells run for an example, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import at, image, make, still
from flax import nnx
from test_ops_tiles import assert_same

import dynjax as dj


def up(x):
    """A path without parameters: half the channels, twice the resolution."""
    return jnp.repeat(jnp.repeat(x[..., ::2], 2, 1), 2, 2)


def down(x):
    return jnp.concatenate([x, -x], -1)[:, ::2, ::2]


def plus(x):
    return x + 2


class Plus(nnx.Module):
    """A cheap operation with one parameter, and MACs to count."""

    def __init__(self, rngs, channels):
        self.linear = nnx.Linear(channels, channels, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.linear(x))


def grid(layers, scales, cell):
    """Layers of cells with all their paths; `cell(channels, paths, up=, down=)` makes one."""
    result = []
    for number in range(layers):
        ends = number == layers - 1
        ways = [
            dict(up=up if s and not ends else None, down=down if s + 1 < scales and not ends else None)
            for s in range(min(number + 1, scales))
        ]
        result.append([cell(2 * 2**s, 1 + sum(p is not None for p in w.values()), **w) for s, w in enumerate(ways)])
    return dj.Supernet(result)


def sampled(draw, layers=3, scales=2):
    def build(rngs):
        return grid(
            layers,
            scales,
            lambda c, paths, **ways: dj.Cell(Plus(rngs, c), dj.SampledPaths(paths, draw, rngs=rngs), **ways),
        )

    return make(build)


def learned(rngs):
    return grid(3, 2, lambda c, paths, **ways: dj.Cell(Plus(rngs, c), dj.PathGate(c, paths, rngs=rngs), **ways))


def test_paths_lead_to_the_next_layer_at_odd_sizes():
    model = grid(3, 2, lambda c, paths, **ways: dj.Cell(plus, **ways))
    x = np.asarray(image(1, 5, 7, 2))
    fine, coarse = model(jnp.asarray(x))
    h = x + 2
    second_fine, second_coarse = h + 2, np.asarray(down(h)) + 2
    third_fine = second_fine + np.asarray(up(second_coarse))[:, :5, :7]
    third_coarse = second_coarse + np.asarray(down(second_fine))
    np.testing.assert_allclose(fine, third_fine + 2, rtol=1e-6)
    np.testing.assert_allclose(coarse, third_coarse + 2, rtol=1e-6)
    assert coarse.shape == (1, 3, 4, 4)


def runs(trace):
    """For each layer, how many of its cells each example runs."""
    counts = {}
    for path, decision in trace.decisions.items():
        layer = int(path.split("/")[1])
        counts[layer] = counts.get(layer, 0) + np.asarray(decision.keep[:, 0])
    return np.stack([counts[layer] for layer in sorted(counts)])


def test_a_single_path_runs_one_cell_in_each_layer():
    model, x = sampled("single"), image(16, 6, 6, 2)
    step = nnx.jit(lambda model, x: dj.traced(model)(x))
    (maps, trace), (others, _) = step(model, x), step(model, x)
    np.testing.assert_array_equal(runs(trace), np.ones((3, 16)))
    # At either scale a cell's linear layer costs 6 * 6 * 2 * 2.
    np.testing.assert_allclose(trace.macs(), 3 * 144)
    # The examples end at different scales, each at one (or none, where its features are zeros), and anew in each step.
    ended, then = (np.stack([np.abs(m).max((1, 2, 3)) > 0 for m in each]) for each in (maps, others))
    assert (ended.sum(0) <= 1).all() and ended.any(1).all() and (ended != then).any()


def test_a_sandwich_runs_all_none_and_some():
    model, x = sampled("sandwich"), image(9, 6, 6, 2)
    trace = nnx.jit(lambda model, x: dj.traced(model)(x)[1])(model, x)
    spent, counts = np.asarray(trace.macs()), runs(trace)
    np.testing.assert_array_equal(counts[:, ::3], np.repeat([[1], [2], [2]], 3, 1))
    np.testing.assert_array_equal(counts[:, 1::3], 0)
    np.testing.assert_allclose(spent[::3], trace.full_macs, rtol=1e-6)
    np.testing.assert_allclose(spent[1::3], trace.static_macs, atol=1e-3)
    assert ((spent[2::3] > 0) & (spent[2::3] < trace.full_macs)).any()


@pytest.mark.parametrize("build", [learned, lambda rngs: sampled("independent")], ids=["learned", "sampled"])
def test_a_path_always_exists_and_the_threshold_leaves_no_other(build):
    model, x = make(build), image(3, 5, 7, 2)
    run = jax.jit(lambda t: (dj.traced(at(t, still(model)))(x), at(t, still(model, "compact"))(x)))
    spent = []
    for threshold in (-30.0, -0.5, 0.0, 0.5, 30.0):
        (masked, trace), compact = run(threshold)
        for maps in zip(masked, compact, strict=True):
            assert_same(*maps)
        spent.append(float(trace.macs().mean()))
    assert spent == sorted(spent, reverse=True) and len(set(spent)) > 2
    np.testing.assert_allclose(spent[0], trace.full_macs, rtol=1e-6)
    np.testing.assert_allclose(spent[-1], trace.static_macs, rtol=1e-6, atol=1e-3)
    # With every path closed the input passes on at its own scale, and nothing reaches the other.
    np.testing.assert_array_equal(masked[0], x)
    np.testing.assert_array_equal(masked[1], 0)


def test_what_leads_nowhere_is_refused():
    def cell(**ways):
        return dj.Cell(plus, **ways)

    with pytest.raises(ValueError, match=r"layers have \[2, 2\] cells; the first layer must have one"):
        dj.Supernet([[cell(), cell()], [cell(), cell()]])
    with pytest.raises(ValueError, match=r"layers\[1\]\[0\] is in the last layer, so up and down lead nowhere"):
        dj.Supernet([[cell()], [cell(down=down)]])
    with pytest.raises(ValueError, match=r"layers\[0\]\[0\] has a path up, and is at the finest scale"):
        dj.Supernet([[cell(up=up)], [cell()]])
    with pytest.raises(ValueError, match=r"layers\[0\]\[0\] has a path down, and layers\[1\] has only 1 scales"):
        dj.Supernet([[cell(down=down)], [cell()]])
    with pytest.raises(ValueError, match=r"layers\[1\] has 2 cells; .* the last has no path down, come 1 to 1"):
        dj.Supernet([[cell()], [cell(), cell()]])
