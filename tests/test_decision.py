"""What decisions cost, worked out by hand."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dynjax as dj
from dynjax.core.decision import EACH, MIXTURE, ONE, PREFIX, Decision, Decisions, Linear, record, some
from dynjax.core.wrapper import Wrapper


def decision(keep, place, unit, whole, probability=None, rule=EACH):
    keep = jnp.asarray(keep, jnp.float32)
    probability = keep if probability is None else jnp.asarray(probability, jnp.float32)
    return Decision(keep, probability, place, rule, Linear(unit, whole))


def test_samples():
    d = decision([1, 0, 1, 1], "example", (10.0,), (10.0,), [0.5, 0.25, 1, 0])
    np.testing.assert_array_equal(d.macs(), [10, 0, 10, 10])
    assert (d.full_macs, d.cost.masked, float(d.kept())) == (10, 10, 0.75)


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
    d = decision([[1, 0], [0, 1], [0, 1]], "example", (2.0, 10.0), (2.0, 10.0), rule=ONE)
    np.testing.assert_array_equal(d.macs(), [2, 10, 10])
    assert (d.full_macs, d.cost.masked) == (10, 12)
    assert d.kept() == pytest.approx(2 / 3)


def test_branches_per_tile_are_limited_one_by_one():
    keep = np.zeros((1, 2, 2, 2))
    keep[..., 1] = 1
    keep[0, 0, 0] = [1, 0]
    # One tile of the cheap branch, three of the dear one: 3 * 40 is more than the 100 of its whole input.
    d = decision(keep, "tile", (5.0, 40.0), (20.0, 100.0), rule=ONE)
    np.testing.assert_array_equal(d.macs(), [105])
    assert (d.full_macs, d.cost.masked, float(d.kept())) == (100, 120, 0.75)


def test_exits_and_channels_count_each_stage_and_group():
    stages = decision([[1, 1, 0], [1, 0, 0]], "example", (1.0, 10.0, 100.0), (1.0, 10.0, 100.0), rule=PREFIX)
    np.testing.assert_array_equal(stages.macs(), [11, 1])
    assert (stages.full_macs, float(stages.kept())) == (111, 0.5)
    groups = decision([[1, 0, 1]], "example", (4.0,), (12.0,))
    np.testing.assert_array_equal(groups.macs(), [8])
    tiles = np.ones((2, 2, 1, 2))
    tiles[0, 0, 0, 1] = 0
    np.testing.assert_array_equal(decision(tiles, "tile", (3.0, 7.0), (6.0, 14.0), rule=PREFIX).macs(), [13, 20])


def test_a_decision_passes_through_jit_and_counts_in_float32():
    d = decision([1, 0], "example", (1e9 + 1,), (2e9,))
    half = Decision(d.keep.astype(jnp.bfloat16), d.probability, "example", EACH, d.cost)
    out = jax.jit(lambda d: d)(half)
    chex.assert_trees_all_equal(out, half)
    assert (out.cost.unit, out.place, out.rule) == ((1e9 + 1,), "example", EACH)
    assert out.macs().dtype == jnp.float32 and float(out.macs()[0]) == np.float32(1e9 + 1)


class Records(nnx.Module):
    def __call__(self, x):
        record(self, decision(x, "example", (1.0,), (1.0,)))
        return x


def test_recorded_only_while_a_trace_is_taken():
    wrapper, x = Records(), jnp.ones(2)
    wrapper(x)
    assert not nnx.state(wrapper, Decisions)
    _, captured = nnx.capture(wrapper, Decisions)(x)
    assert len(jax.tree.leaves(captured)) == 2


def test_experts_of_tokens_cost_as_many_as_a_token_can_take():
    keep = jnp.asarray([[[1, 1, 0], [1, 0, 0]]], jnp.float32)  # the second token takes one of its two
    probability = jnp.asarray([[[0.5, 0.25, 0.25], [0.75, 0.125, 0.125]]])
    decision = Decision(keep, probability, "token", some(2), Linear((10.0,) * 3, (20.0,) * 3))
    np.testing.assert_allclose(decision.macs(), [30])
    assert (decision.full_macs, decision.cost.masked) == (40, 60)


def test_kernels_cost_nothing():
    decision = Decision(jnp.ones((2, 3)), jnp.full((2, 3), 1 / 3), "example", MIXTURE)
    np.testing.assert_array_equal(decision.macs(), [0, 0])
    assert decision.full_macs == 0


@dataclasses.dataclass(frozen=True)
class Squared:
    """Attention among the kept: quadratic in their number, of `units`."""

    each: float
    units: int

    def __call__(self, kept):
        return self.each * (kept**2).sum(1)

    @property
    def masked(self):
        return self.each * self.units**2

    def full(self, most):
        return self.masked


class Attends(Wrapper):
    """Looks from every kept token at every kept one, at a cost of its own."""

    def __call__(self, x):
        told = Decision(jnp.asarray([[1.0, 1, 0], [1, 0, 0]]), jnp.full((2, 3), 0.5), "token")
        kept = self.expect(told, "token", EACH, x.shape[:2], "")
        record(self, dataclasses.replace(kept, cost=Squared(2.0 * x.shape[2], x.shape[1])))
        seen = x * kept.keep[..., None]
        return (seen @ seen.swapaxes(1, 2)) @ seen


def test_a_cost_may_be_any_function_of_what_is_kept():
    _, trace = dj.traced(Attends())(jnp.ones((2, 3, 5)))
    np.testing.assert_array_equal(trace.macs(), [40, 10])
    assert (trace.static_macs, trace.full_macs) == (0, 90)
    np.testing.assert_allclose(trace.heatmap((4, 4)).sum((1, 2)), [40, 10])
    grad = jax.grad(lambda keep: Decision(keep, keep, "token", EACH, Squared(1.0, 3)).macs().sum())(jnp.ones((1, 3)))
    np.testing.assert_array_equal(grad, [[6, 6, 6]])
