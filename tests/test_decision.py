"""What decisions cost, worked out by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynjax.core.decision import Decision, Decisions, record


def decision(keep, granularity, unit, whole, probability=None):
    keep = jnp.asarray(keep, jnp.float32)
    probability = keep if probability is None else jnp.asarray(probability, jnp.float32)
    return Decision(keep, probability, granularity, unit, whole)


def test_samples():
    d = decision([1, 0, 1, 1], "sample", (10.0,), (10.0,), [0.5, 0.25, 1, 0])
    np.testing.assert_array_equal(d.macs(), [10, 0, 10, 10])
    np.testing.assert_array_equal(d.expected_macs(), [5, 2.5, 10, 0])
    assert (d.full_macs, d.masked_macs, float(d.kept())) == (10, 10, 0.75)


def test_tiles_cost_their_border_and_at_most_the_whole_input():
    keep = np.zeros((3, 2, 2))
    keep[1, 0], keep[2] = 1, 1
    d = decision(keep, "tile", (30.0,), (100.0,))
    np.testing.assert_array_equal(d.macs(), [0, 60, 100])
    assert (d.full_macs, float(d.kept())) == (100, 0.5)


def test_the_limit_has_no_gradient():
    def spent(keep):
        return decision(keep, "tile", (30.0,), (100.0,)).macs().sum()

    np.testing.assert_array_equal(jax.grad(spent)(jnp.ones((2, 2, 2))), jnp.full((2, 2, 2), 30.0))


def test_branches():
    d = decision([[1, 0], [0, 1], [0, 1]], "branch", (2.0, 10.0), (2.0, 10.0))
    np.testing.assert_array_equal(d.macs(), [2, 10, 10])
    assert (d.full_macs, d.masked_macs) == (10, 12)
    assert d.kept() == pytest.approx(2 / 3)


def test_branches_per_tile_are_limited_one_by_one():
    keep = np.zeros((1, 2, 2, 2))
    keep[..., 1] = 1
    keep[0, 0, 0] = [1, 0]
    # One tile of the cheap branch, three of the dear one: 3 * 40 is more than the 100 of its whole input.
    d = decision(keep, "tile branch", (5.0, 40.0), (20.0, 100.0))
    np.testing.assert_array_equal(d.macs(), [105])
    assert (d.full_macs, d.masked_macs, float(d.kept())) == (100, 120, 0.75)


def test_exits_and_channels_count_each_stage_and_group():
    stages = decision([[1, 1, 0], [1, 0, 0]], "exit", (1.0, 10.0, 100.0), (1.0, 10.0, 100.0))
    np.testing.assert_array_equal(stages.macs(), [11, 1])
    assert (stages.full_macs, float(stages.kept())) == (111, 0.5)
    groups = decision([[1, 0, 1]], "channel", (4.0,), (12.0,))
    np.testing.assert_array_equal(groups.macs(), [8])
    tiles = np.ones((2, 2, 1, 2))
    tiles[0, 0, 0, 1] = 0
    np.testing.assert_array_equal(decision(tiles, "tile exit", (3.0, 7.0), (6.0, 14.0)).macs(), [13, 20])


def test_a_decision_passes_through_jit_and_counts_in_float32():
    d = decision([1, 0], "sample", (1e9 + 1,), (2e9,))
    half = Decision(d.keep.astype(jnp.bfloat16), d.probability, "sample", d.unit_macs, d.whole_macs)
    out = jax.jit(lambda d: d)(half)
    chex.assert_trees_all_equal(out, half)
    assert (out.unit_macs, out.granularity) == ((1e9 + 1,), "sample")
    assert out.macs().dtype == jnp.float32 and float(out.macs()[0]) == np.float32(1e9 + 1)


class Wrapper(nnx.Module):
    def __call__(self, x):
        record(self, decision(x, "sample", (1.0,), (1.0,)))
        return x


def test_recorded_only_while_a_trace_is_taken():
    wrapper, x = Wrapper(), jnp.ones(2)
    wrapper(x)
    assert not nnx.state(wrapper, Decisions)
    _, captured = nnx.capture(wrapper, Decisions)(x)
    assert len(jax.tree.leaves(captured)) == 2


def test_experts_of_tokens_cost_as_many_as_a_token_can_take():
    keep = jnp.asarray([[[1, 1, 0], [1, 0, 0]]], jnp.float32)  # the second token takes one of its two
    probability = jnp.asarray([[[0.5, 0.25, 0.25], [0.75, 0.125, 0.125]]])
    costs = dict(unit_macs=(10.0,) * 3, whole_macs=(20.0,) * 3, most=2)
    decision = Decision(keep, probability, "token branch", **costs)
    np.testing.assert_allclose(decision.macs(), [30])
    assert (decision.full_macs, decision.masked_macs) == (40, 60)
    np.testing.assert_allclose(decision.expected_macs(), [20 + 7.5 + 7.5])  # the first expert's 25 stop at all it has


def test_kernels_cost_nothing():
    decision = Decision(jnp.ones((2, 3)), jnp.full((2, 3), 1 / 3), "kernel", (0.0,) * 3, (0.0,) * 3)
    np.testing.assert_array_equal(decision.macs(), [0, 0])
    assert decision.full_macs == 0
