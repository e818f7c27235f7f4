"""The budget's loss and statistics worked out by hand; thresholds solved on functions that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import CHANNELS, Pointwise, make
from flax import nnx

import dynjax as dj
from dynjax import budget
from dynjax.core.decision import EACH, ONE, Decision, Linear


def trace(*decisions, static=0.0):
    full = static + sum(d.full_macs for d in decisions)
    return dj.Trace({str(n): d for n, d in enumerate(decisions)}, static, full, decisions[0].keep.shape[0])


def samples(keep, macs, probability=None):
    keep = jnp.asarray(keep, jnp.float32)
    probability = keep if probability is None else jnp.asarray(probability, jnp.float32)
    return Decision(keep, probability, "example", EACH, Linear((macs,), (macs,)))


def test_budget_loss_by_hand():
    # 20 static MACs; gates of 60 and 20 MACs that keep 3/4 and 0 of the examples: 65 of 100 are spent.
    t = trace(samples([1, 1, 1, 0], 60.0), samples([0] * 4, 20.0), static=20.0)
    network = (0.65 - 0.6) ** 2
    assert dj.budget_loss(t, 0.6) == pytest.approx(network, rel=1e-4)
    # 40 of the gates' 80 MACs are left of the target: with closed bounds each should spend one half.
    bounds = ((0.75 - 0.5) ** 2 + (0 - 0.5) ** 2) / 2
    assert dj.budget_loss(t, 0.6, released=0.0) == pytest.approx(network + bounds, rel=1e-4)
    # Half released: [1/4, 3/4].
    assert dj.budget_loss(t, 0.6, released=0.5) == pytest.approx(network + 0.25**2 / 2, rel=1e-4)


def test_a_target_that_the_static_part_exceeds_asks_the_gates_for_nothing():
    t = trace(samples([0, 0], 20.0), static=80.0)
    assert dj.budget_loss(t, 0.5, released=0.0) == pytest.approx((0.8 - 0.5) ** 2)
    with_all = trace(samples([1, 1], 20.0), static=80.0)
    assert dj.budget_loss(with_all, 1.0, released=0.0) == pytest.approx(0, abs=1e-7)


def test_gates_of_what_costs_nothing_and_models_without_gates():
    t = trace(samples([1, 0], 0.0), samples([1, 1], 10.0), static=10.0)
    assert dj.budget_loss(t, 0.75, released=0.0) == pytest.approx(0.25**2 + 0.5**2)
    assert dj.budget_loss(trace(samples([1, 0], 0.0), static=10.0), 0.5, released=0.0) == pytest.approx(0.25)
    assert dj.budget_loss(dj.Trace({}, 10.0, 10.0, 2), 0.5) == pytest.approx(0.25)


def test_the_loss_pulls_the_gates_towards_the_target():
    def loss(keep, target):
        return dj.budget_loss(trace(samples(keep, 60.0), static=40.0), target, 1.0)

    keep = jnp.asarray([1.0, 1.0, 0.0])
    pull = jax.jit(jax.grad(loss))
    assert (pull(keep, 0.5) > 0).all() and (pull(keep, 0.95) < 0).all()
    for target in (0.0, 1.5, -1):
        with pytest.raises(ValueError, match=f"target={target} must be in"):
            loss(keep, target)


def test_release_is_a_squared_cosine_over_the_first_third():
    assert [float(budget.release(p)) for p in (0.0, 1 / 6, 1 / 3, 1.0)] == pytest.approx([0, 0.5, 1, 1], abs=1e-6)
    assert float(budget.release(0.5, until=1.0)) == pytest.approx(0.5)


def test_check():
    assert budget.check(1) == 1 and budget.check(0.5) == 0.5
    for value in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"budget=.* must be in \(0, 1\]"):
            budget.check(value)


def branches(keep, probability):
    keep, probability = (jnp.asarray(a, jnp.float32) for a in (keep, probability))
    ones = (1.0,) * keep.shape[-1]
    return Decision(keep, probability, "example", ONE, Linear(ones, ones))


def test_load_balance():
    uniform = branches(np.eye(4), np.full((4, 4), 0.25))
    assert budget.load_balance(trace(uniform)) == pytest.approx(1)
    one = branches([[1, 0], [1, 0]], [[0.9, 0.1], [0.7, 0.3]])
    assert budget.load_balance(trace(one)) == pytest.approx(2 * 0.8)
    assert budget.load_balance(trace(uniform, one)) == pytest.approx((1 + 1.6) / 2)
    assert budget.load_balance(trace(samples([1], 1.0))) == 0

    def loss(probability):
        return budget.load_balance(trace(branches([[1, 0], [1, 0]], probability)))

    np.testing.assert_allclose(jax.grad(loss)(jnp.full((2, 2), 0.5)), [[1, 0], [1, 0]])


def test_statistics():
    t = trace(samples([1, 1], 60.0, [0.5, 0.5]), samples([0, 0], 20.0, [0, 1]), samples([1, 0], 20.0, [0.11, 0.11]))
    entropy = -(0.11 * np.log2(0.11) + 0.89 * np.log2(0.89))
    assert {name: float(value) for name, value in budget.statistics(t).items()} == pytest.approx(
        dict(macs_fraction=0.7, gate_entropy=(1 + 0 + entropy) / 3, dead=1 / 3, always=1 / 3), abs=1e-4
    )
    uniform = branches(np.eye(4), np.full((4, 4), 0.25))
    assert float(budget.statistics(trace(uniform))["gate_entropy"]) == pytest.approx(2)
    assert budget.statistics(dj.Trace({}, 1.0, 1.0, 1)) == {"macs_fraction": 1}


def test_set_threshold_moves_every_gate():
    def build(rngs):
        gated = [dj.Skip(Pointwise(rngs), dj.SampleGate(CHANNELS, rngs=rngs)) for _ in range(2)]
        exits = dj.Exits([Pointwise(rngs)], [nnx.Linear(CHANNELS, 2, rngs=rngs)])
        return nnx.Sequential(*gated, dj.Skip(Pointwise(rngs), dj.RandomGate(0.5, rngs=rngs)), exits)

    model = make(build)
    budget.set_threshold(model, 1.5)
    thresholds = jax.tree.leaves(nnx.state(model, dj.gates.Threshold))
    assert [float(t) for t in thresholds] == [1.5] * 4
    assert all(t.dtype == jnp.float32 and t.shape == () for t in thresholds)
    # Parameters of gates are told apart from those of the blocks.
    gates, others = (jax.tree.leaves(nnx.state(model, f)) for f in (budget.gate_filter, nnx.Param))
    assert (len(gates), len(others)) == (2 * 5, 2 * 5 + 4 * 2 + 2)


def test_sampled_threshold_keeps_the_target_of_gates_that_know_nothing():
    for target in (0.1, 0.5, 0.8):
        assert jax.nn.sigmoid(0.0 - budget.sampled_threshold(target)) == pytest.approx(target)
    assert np.isfinite([budget.sampled_threshold(t) for t in (0.0, 1.0)]).all()


@pytest.mark.parametrize(
    "share", [lambda t: (1 - np.tanh(t / 2)) / 2, lambda t: 0.2 + 0.4 * (1 - np.tanh(40 * (t + 11)))]
)
@pytest.mark.parametrize("target", [0.25, 0.5, 0.9, 1.0])
def test_solve_threshold_meets_the_budget_closely(share, target):
    asked = []

    def spent(threshold):
        asked.append(threshold)
        return float(share(threshold))

    threshold = budget.solve_threshold(spent, target)
    assert target - 0.01 <= share(threshold) <= target
    assert len(asked) <= 25


def test_solve_threshold_where_nothing_suffices_or_everything_does():
    assert budget.solve_threshold(lambda t: 0.3, 0.2) == budget.HIGHEST
    assert budget.solve_threshold(lambda t: 0.3, 0.4) == budget.LOWEST
    # Steps, as few calibration examples give them: the largest step within the budget.
    threshold = budget.solve_threshold(lambda t: np.mean(np.asarray([-1.0, 0.5, 2.0, 3.0]) >= t), 0.6)
    assert 0.5 < threshold <= 0.51
    with pytest.raises(ValueError, match="budget=0"):
        budget.solve_threshold(lambda t: 0.5, 0)
