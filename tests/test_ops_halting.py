"""Halting: the published formulas by hand, masked equals compact, what is left out when it halts, what that cost."""

import blocks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import CHANNELS, at, image, make, still
from flax import nnx
from jaxtyping import TypeCheckError
from test_ops_tiles import assert_same, three_ways

import dynjax as dj
from dynjax import cost
from dynjax.core.decision import PREFIX
from dynjax.ops import halting
from dynjax.ops.halting import Halt

# The formulas


def test_act_weights_by_hand():
    weights = halting.weights(
        jnp.asarray([[0.3, 0.5, 0.4, 0.9], [0.995, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.1]]), halting.act_rule
    )
    np.testing.assert_allclose(
        weights, [[0.3, 0.5, 0.2, 0.0], [1.0, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.7]], rtol=1e-6, atol=1e-7
    )
    random = halting.weights(jax.nn.sigmoid(image(50, 7)), halting.act_rule)
    np.testing.assert_allclose(random.sum(-1), 1, rtol=1e-6)
    assert (random >= 0).all()


def test_pondernet_distribution_by_hand_and_in_numpy():
    np.testing.assert_allclose(
        halting.weights(jnp.asarray([0.5, 0.2, 0.9]), halting.pondernet_rule), [0.5, 0.1, 0.4], rtol=1e-6
    )
    lambdas = jax.nn.sigmoid(image(20, 6))
    survived = np.cumprod(np.concatenate([np.ones((20, 1)), 1 - lambdas[:, :-1]], 1), 1)
    expected = np.concatenate([(lambdas * survived)[:, :-1], survived[:, -1:]], 1)
    np.testing.assert_allclose(halting.weights(lambdas, halting.pondernet_rule), expected, rtol=1e-5)


def test_kl_to_the_geometric_prior():
    prior = halting.geometric_prior(0.25, 4)
    np.testing.assert_allclose(prior, [0.25, 0.1875, 0.140625, 0.421875], rtol=1e-6)
    p = np.asarray([[0.5, 0.25, 0.25, 0.0], [0.25, 0.1875, 0.140625, 0.421875]])
    by_hand = 0.5 * np.log(2) + 0.25 * np.log(0.25 / 0.1875) + 0.25 * np.log(0.25 / 0.140625)
    np.testing.assert_allclose(halting.kl_to_prior(jnp.asarray(p), prior), [by_hand, 0.0], rtol=1e-5, atol=1e-6)
    slope = jax.grad(lambda p: halting.kl_to_prior(p, prior).sum())(jnp.asarray(p))
    assert np.isfinite(slope).all()
    with pytest.raises(ValueError, match=r"rate=1.0 must be in \(0, 1\)"):
        halting.geometric_prior(1.0, 4)


# By hand: a state that counts its steps, and a halting unit that reads a table by the count


class Table(nnx.Module):
    """Halting probabilities (examples, steps); the state is (count, example)."""

    def __init__(self, rows):
        self.rows = nnx.Param(jnp.asarray(rows, jnp.float32))

    def __call__(self, x):
        go_on = 1 - self.rows[...][x[:, 1].astype(int), x[:, 0].astype(int) - 1]
        return dj.Decision((go_on >= 0.5).astype(jnp.float32), go_on, "example")


ROWS = [[0.3, 0.5, 0.4, 0.9], [0.995, 0.5, 0.5, 0.5], [0.1, 0.1, 0.1, 0.1]]
START = jnp.stack([jnp.zeros(3), jnp.arange(3.0)], -1)


def counted(kind):
    return Halt(lambda x: x + jnp.asarray([[1.0, 0.0]]), Table(ROWS), 4, kind=kind)


@pytest.mark.parametrize("execution", ["masked", "compact"])
@pytest.mark.parametrize(
    ("kind", "counts", "steps"),
    [
        ("act", [0.3 + 2 * 0.5 + 3 * 0.2, 1.0, 0.1 + 0.2 + 0.3 + 4 * 0.7], [3, 1, 4]),
        ("pondernet", [2.0, 1.0, 4.0], [2, 1, 4]),
        ("hard", [4.0, 1.0, 4.0], [4, 1, 4]),
    ],
)
def test_halting_by_hand(kind, counts, steps, execution):
    model = nnx.view(counted(kind), execution=execution, deterministic=True)
    y, trace = jax.jit(lambda x: dj.traced(model)(x))(START)
    np.testing.assert_allclose(y[:, 0], counts, rtol=1e-5)
    (decision,) = trace.decisions.values()
    assert (decision.place, decision.rule) == ("example", PREFIX)
    np.testing.assert_array_equal(decision.keep, np.arange(4)[None] < np.asarray(steps)[:, None])


def test_the_expected_steps_have_the_gradient_of_the_mass_that_is_left():
    (decision,) = jax.jit(dj.traced(still(counted("act"))))(START)[1].decisions.values()
    weights = halting.weights(jnp.asarray(ROWS), halting.act_rule)
    np.testing.assert_allclose(halting.halting_distribution(decision), weights, atol=1e-6)
    # The core's own measure, in steps: what each step costs times the mass that is left before it.
    expected = (weights * jnp.arange(1.0, 5.0)[None]).sum(-1)
    np.testing.assert_allclose(decision.probability.sum(-1), expected, rtol=1e-5)

    def slopes(measure):
        def loss(model, x):
            return measure(dj.traced(model)(x)[1].decisions[""]).sum()

        return nnx.jit(nnx.grad(loss))(nnx.view(counted("act"), deterministic=False), START)["gate"]["rows"][...]

    # Each probability takes its mass from all steps that are run after it.
    expected = [[-2, -1, 0, 0], [0, 0, 0, 0], [-3, -2, -1, 0]]
    np.testing.assert_allclose(slopes(lambda d: d.probability.sum(-1)), expected)


def test_pondernet_in_training_runs_all_steps_and_gives_what_its_loss_needs():
    model = nnx.view(counted("pondernet"), deterministic=False)
    y, trace = dj.traced(model)(START)
    p = halting.weights(jnp.asarray(ROWS), halting.pondernet_rule)
    np.testing.assert_allclose(y[:, 0], p @ jnp.arange(1.0, 5.0), rtol=1e-5)
    states, trace = dj.traced(model.predictions)(START)
    np.testing.assert_array_equal(jnp.stack(states)[..., 0], np.arange(1.0, 5.0)[:, None] * np.ones((1, 3)))
    (decision,) = trace.decisions.values()
    np.testing.assert_allclose(halting.halting_distribution(decision), p, rtol=1e-5)
    np.testing.assert_array_equal(decision.keep.sum(-1), [2, 1, 4])


# Real blocks and gates


class Plain(nnx.Module):
    """A residual block that keeps its scale when it is applied again and again."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(CHANNELS, CHANNELS, (3, 3), rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.conv(x))


def per_example(kind, steps=4):
    return make(lambda rngs: Halt(Plain(rngs), dj.SampleGate(CHANNELS, rngs=rngs), steps, kind=kind))


def per_tile(rngs, size=4):
    return Halt(Plain(rngs), dj.TileGate(CHANNELS, size=size, rngs=rngs), 3)


@pytest.mark.parametrize("kind", ["act", "pondernet", "hard"])
def test_masked_equals_compact_per_example(kind):
    model, x = per_example(kind), 2 * image(9, 6, 5, CHANNELS)
    run = three_ways(lambda threshold, x: (at(threshold, model), x), jnp.zeros(()), x)
    trace = jax.jit(lambda threshold, x: dj.traced(at(threshold, still(model)))(x)[1])
    states = jax.jit(lambda x: still(model).predictions(x))(x)
    spent = []
    for threshold in (-30.0, -1.0, -0.3, 0.3, 1.0, 30.0):
        masked, *compact = run(jnp.float32(threshold), x)
        assert_same(masked, *compact)
        spent.append(trace(jnp.float32(threshold), x).decisions[""].keep.sum(-1))
        if abs(threshold) == 30:
            np.testing.assert_allclose(masked, states[-1 if threshold < 0 else 0], rtol=1e-5, atol=1e-5)
    spent = np.stack(spent)
    assert (spent[0] == 4).all() and (spent[-1] == 1).all() and (np.diff(spent, axis=0) <= 0).all()
    assert any(len(set(row)) > 1 for row in spent)


@pytest.mark.parametrize(("shape", "size"), [((3, 9, 14), 4), ((1, 5, 4), 1)])
def test_masked_equals_compact_per_tile(shape, size):
    model, x = make(lambda rngs: per_tile(rngs, size)), 2 * image(*shape, CHANNELS)
    run = three_ways(lambda threshold, x: (at(threshold, model), x), jnp.zeros(()), x)
    trace = jax.jit(lambda threshold, x: dj.traced(at(threshold, still(model)))(x)[1])
    kept = []
    for threshold in (-30.0, -0.5, 0.0, 0.5, 30.0):
        assert_same(*run(jnp.float32(threshold), x))
        decision = trace(jnp.float32(threshold), x).decisions[""]
        assert (decision.place, decision.rule) == ("tile", PREFIX) and (jnp.diff(decision.keep) <= 0).all()
        kept.append(float(decision.keep.mean()))
    assert kept[0] == 1 and kept[-1] == pytest.approx(1 / 3) and kept == sorted(kept, reverse=True)
    assert len(set(kept)) > 2


def test_tiles_that_have_halted_keep_their_value_for_their_neighbours():
    model, x = still(make(per_tile)), 2 * image(2, 8, 8, CHANNELS)
    y, trace = jax.jit(lambda x: dj.traced(at(-2.0, model))(x))(x)
    keep, mass = (np.asarray(a) for a in (trace.decisions[""].keep, trace.decisions[""].probability))
    assert 0 < keep[..., 2].mean() < 1
    state, expected = np.asarray(x), np.zeros_like(x)
    for n in range(3):
        running = np.kron(keep[..., n], np.ones((4, 4)))[..., None]
        state = np.where(running, model.step(jnp.asarray(state)), state)
        weight = mass[..., n] - (mass[..., n + 1] if n < 2 else 0)
        expected += np.kron(weight, np.ones((4, 4)))[..., None] * state
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(trace.heatmap((8, 8)).sum((1, 2)), trace.macs(), rtol=1e-5)


def test_examples_that_have_halted_leave_the_work():
    seen = []

    def step(x):
        jax.debug.callback(lambda: seen.append(x.shape[0]))
        return x + jnp.asarray([[1.0, 0.0]])

    # Three examples run the first step, which is the whole batch, two the second, and one the others.
    for strategy, expected in [("loop", [1, 1, 1, 1, 3]), ("buckets", [1, 1, 2, 3])]:
        model = Halt(step, Table([[0.3, 0.7, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]), 4)
        model = nnx.view(model, execution="compact", deterministic=True, strategy=strategy)
        seen.clear()
        jax.block_until_ready(jax.jit(lambda x, model=model: model(x))(START))
        jax.effects_barrier()
        assert sorted(seen) == expected


def test_macs():
    model, x = per_example("act", 3), image(2, 6, 5, CHANNELS)
    step = cost.macs(model.step, x[:1])
    gate = cost.macs(still(model.gate), x[:1])
    run = jax.jit(lambda x, threshold: dj.traced(at(threshold, still(model)))(x)[1])
    trace = run(x, -30.0)
    assert trace.full_macs == 3 * (step + gate) == cost.macs(still(model), x) / 2 and trace.static_macs == 0
    np.testing.assert_allclose(trace.macs(), 3 * (step + gate))
    np.testing.assert_allclose(run(x, 30.0).macs(), step + gate)
    tiles = make(per_tile)
    trace = jax.eval_shape(dj.traced(still(tiles)), x)[1]
    assert trace.full_macs == 3 * step + trace.static_macs
    assert trace.static_macs == 3 * cost.macs(still(tiles.gate), x[:1])


@pytest.mark.parametrize("build", ["act", "pondernet", "hard", "tiles"])
def test_gradients_reach_gate_step_and_input(build):
    model = make(per_tile) if build == "tiles" else per_example(build, 3)

    def loss(model, x):
        y, trace = dj.traced(model)(x)
        return (y**2).sum() + trace.fraction().mean()

    grads, slope = nnx.jit(nnx.grad(loss, argnums=(0, 1)))(model, image(4, 8, 8, CHANNELS))
    leaves = [np.asarray(leaf) for leaf in (*jax.tree.leaves(grads), slope)]
    assert len(leaves) == 5 + 2 + 1
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in leaves)


def test_a_tree_of_states():
    """A recurrence that sees its input at every step, as ACT's do."""

    def step(x):
        return {"input": x["input"], "state": jnp.tanh(x["state"] + x["input"])}

    x = {"input": image(5, CHANNELS), "state": jnp.zeros((5, CHANNELS))}
    model = make(lambda rngs: Halt(step, nnx.Sequential(lambda x: x["state"], dj.SampleGate(CHANNELS, rngs=rngs)), 3))
    y = jax.jit(lambda x: [still(model, way)(x) for way in ("masked", "compact")])(x)
    for name in x:
        assert_same(y[0][name], y[1][name])
    np.testing.assert_allclose(y[0]["input"], x["input"], rtol=1e-5)


def test_errors():
    plain, gate = make(blocks.Pointwise), dj.FixedGate([1])
    for build, message in [
        (lambda: Halt(plain, gate, 0), "max_steps=0"),
        (lambda: Halt(plain, gate, 2, kind="soft"), "'soft'"),
        (lambda: Halt(plain, gate, 2, epsilon=1.0), "epsilon=1.0 must"),
        (lambda: Halt(plain, dj.FixedGate(np.ones((1, 2, 2)), size=4), 2, kind="pondernet"), "tiles of size=4"),
        (lambda: Halt(dj.Skip(plain, gate), gate, 2), "Halt around a module that is dynamic already"),
    ]:
        with pytest.raises((ValueError, TypeCheckError), match=message):  # the latter where types are checked first
            build()
    with pytest.raises(ValueError, match=r"must keep the shape; Wider turns \(1, 8, 8, 4\) into \(1, 8, 8, 6\)"):
        Halt(make(blocks.Wider), gate, 2)(image(1, 8, 8, CHANNELS))
    with pytest.raises(
        ValueError, match=r"Halt needs a decision per example \(rule: each\) of shape \(2,\).*use SampleGate"
    ):
        Halt(plain, dj.FixedGate(np.ones((1, 3))), 2)(image(2, 8, 8, CHANNELS))
    with pytest.raises(ValueError, match="compact execution cannot train: BatchNorm at 'norm1'"):
        nnx.view(Halt(make(blocks.Residual), gate, 2), execution="compact")(image(1, 8, 8, CHANNELS))
