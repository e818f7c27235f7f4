"""One policy for a chain of blocks: masked equals compact, what is skipped, its costs, and its training by hand."""

import blocks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import CHANNELS, at, image, make, still
from flax import nnx
from test_ops_tiles import assert_same, three_ways

import dynjax as dj
from dynjax import cost
from dynjax.core.decision import EACH
from dynjax.ops import policy
from dynjax.ops.policy import PolicySkip


class Down(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, kernel: int = 3):
        self.conv = nnx.Conv(CHANNELS, 6, (kernel, kernel), strides=2, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.conv(x))


def network(rngs, **options):
    """A stem that always runs, a block, a change of resolution that can be skipped for a cheaper one, a block."""
    chain = [nnx.Conv(3, CHANNELS, (3, 3), rngs=rngs), blocks.Residual(rngs), Down(rngs), blocks.Residual(rngs, 6)]
    gate = nnx.Sequential(nnx.Conv(3, 5, (3, 3), strides=2, rngs=rngs), nnx.relu, dj.ChannelGate(5, 3, rngs=rngs))
    return PolicySkip(chain, gate, skip=(1, 2, 3), otherwise={2: Down(rngs, kernel=1)}, **options)


@pytest.fixture(scope="module")
def model():
    return make(network)


@pytest.mark.parametrize("examples", [1, 5])
def test_masked_equals_compact_and_the_chain_by_hand(examples, model):
    def wrap(x, keep):
        gate, otherwise = dj.FixedGate(keep, rule=EACH), {2: model.otherwise["2"]}
        return PolicySkip(model.blocks, gate, skip=model.skip, otherwise=otherwise), x

    @jax.jit
    def by_hand(x, keep):
        stem, block, down, last = still(model).blocks
        choose = [keep[:, k].reshape(-1, 1, 1, 1) > 0 for k in range(3)]
        x = stem(x)
        x = jnp.where(choose[0], block(x), x)
        x = jnp.where(choose[1], down(x), model.otherwise["2"](x))
        return jnp.where(choose[2], last(x), x)

    x = image(examples, 7, 6, 3)
    run = three_ways(wrap, x, jnp.zeros((examples, 3)))
    random = np.random.default_rng(0)
    for keep in [np.zeros((examples, 3)), np.ones((examples, 3)), *(random.random((2, examples, 3)) < 0.5)]:
        keep = jnp.asarray(keep, jnp.float32)
        masked, *compact = run(x, keep)
        np.testing.assert_allclose(masked, by_hand(x, keep), rtol=1e-4, atol=1e-5)
        assert_same(masked, *compact)


def test_the_policy_sees_the_input_and_the_threshold_moves_it(model):
    x = image(9, 7, 6, 3)

    def run(threshold):
        views = [at(threshold, still(model, way)) for way in ("masked", "compact")]
        return [dj.traced(view)(x) for view in views]

    run, spent = jax.jit(run), []
    logits = jax.scipy.special.logit(run(jnp.float32(0.0))[0][1].decisions[""].probability)
    for threshold in (-30.0, *np.quantile(logits, (0.3, 0.5, 0.7)), 30.0):
        (masked, trace), (compact, same) = run(jnp.float32(threshold))
        assert_same(masked, compact)
        np.testing.assert_array_equal(trace.decisions[""].keep, same.decisions[""].keep)
        assert trace.decisions[""].keep.shape == (9, 3)
        spent.append(trace.decisions[""].keep)
    kept = [float(keep.mean()) for keep in spent]
    assert kept[0] == 1 and kept[-1] == 0 and kept == sorted(kept, reverse=True)
    assert any((keep != keep[:1]).any() for keep in spent)


def test_macs(model):
    x, view = image(2, 8, 8, 3), still(model)
    fine, coarse = image(1, 8, 8, CHANNELS), image(1, 4, 4, 6)
    units = [cost.macs(view.blocks[k], value) for k, value in [(1, fine), (2, fine), (3, coarse)]]
    static = cost.macs(view.blocks[0], x[:1]) + cost.macs(view.gate, x[:1]) + cost.macs(view.otherwise["2"], fine)
    for threshold, expected in [(-30.0, static + sum(units)), (30.0, static)]:
        trace = dj.traced(at(threshold, view))(x)[1]
        np.testing.assert_allclose(trace.macs(), expected, rtol=1e-6)
        assert trace.static_macs == static and trace.full_macs == static + sum(units)


@pytest.mark.parametrize("straight_through", [True, False])
def test_gradients_reach_the_policy_through_the_blocks_or_through_reinforce(straight_through):
    model = make(lambda rngs: network(rngs, straight_through=straight_through))

    def loss(model, x):
        return (model(x) ** 2).sum()

    def reinforce(model, x):
        decision = dj.traced(model)(x)[1].decisions[""]
        kept = decision.keep.mean(-1)
        reward = policy.blockdrop_reward(jnp.asarray([True, True, False, True]), kept, gamma=2.0)
        return policy.reinforce_loss(policy.log_probability(decision), reward, jnp.zeros(4))

    def gate_slopes(measure):
        grads = nnx.jit(nnx.grad(measure))(model, image(4, 6, 6, 3))
        return [np.asarray(leaf) for leaf in jax.tree.leaves(grads["gate"])]

    leaves = gate_slopes(loss)
    assert len(leaves) == 5 + 2 and all(leaf.any() == straight_through for leaf in leaves)
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in gate_slopes(reinforce))


# Training as in the paper, by hand


def test_reward_by_hand():
    reward = policy.blockdrop_reward(jnp.asarray([True, True, False]), jnp.asarray([0.5, 1.0, 0.25]), gamma=5.0)
    np.testing.assert_allclose(reward, [0.75, 0.0, -5.0])


def test_log_probability_and_the_gradient_of_reinforce_by_hand():
    keep, p = jnp.asarray([[1.0, 0.0], [1.0, 1.0]]), jnp.asarray([[0.8, 0.3], [0.5, 0.25]])
    expected = [np.log(0.8) + np.log(0.7), np.log(0.5) + np.log(0.25)]
    np.testing.assert_allclose(policy.log_probability(dj.Decision(keep, p, "example")), expected, rtol=1e-6)

    def loss(p):
        log_p = policy.log_probability(dj.Decision(keep, p, "example"))
        return policy.reinforce_loss(log_p, jnp.asarray([0.75, -1.0]), jnp.asarray([0.25, 0.0]))

    np.testing.assert_allclose(loss(p), -(0.5 * expected[0] - expected[1]) / 2, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(loss)(p), [[-0.25 / 0.8, 0.25 / 0.7], [0.5 / 0.5, 0.5 / 0.25]], rtol=1e-5)


def test_reinforce_is_unbiased():
    """Over all four choices, weighted by how probable they are, the gradient is that of the expected reward."""
    choices = jnp.asarray([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    rewards = policy.blockdrop_reward(jnp.asarray([False, True, True, True]), choices.mean(-1), gamma=1.0)

    def expected_reward(p):
        return (jnp.where(choices > 0, p[None], 1 - p[None]).prod(-1) * rewards).sum()

    p = jnp.asarray([0.3, 0.6])
    chances = jnp.where(choices > 0, p[None], 1 - p[None]).prod(-1)

    def surrogate(p):
        decision = dj.Decision(choices, jnp.broadcast_to(p, (4, 2)), "example")
        losses = [
            policy.reinforce_loss(log_p[None], r[None], jnp.full((1,), 0.4))
            for log_p, r in zip(policy.log_probability(decision), rewards, strict=True)
        ]
        return (jax.lax.stop_gradient(chances) * jnp.stack(losses)).sum()

    np.testing.assert_allclose(jax.jit(jax.grad(surrogate))(p), -jax.jit(jax.grad(expected_reward))(p), rtol=1e-4)


def test_the_curriculum_frees_the_last_blocks_first(model):
    for progress, expected in [(0.0, [0, 0, 0, 1]), (0.25, [0, 0, 0, 1]), (0.3, [0, 0, 1, 1]), (1.0, [1, 1, 1, 1])]:
        np.testing.assert_array_equal(policy.curriculum_mask(progress, 4), expected)
    learner, x = nnx.clone(still(model)), image(2, 7, 6, 3)
    dj.budget.set_threshold(learner, 30.0)
    for progress, expected in [(1 / 3, [1, 1, 0]), (2 / 3, [1, 0, 0]), (1.0, [0, 0, 0])]:
        learner.schedule(progress * policy.CURRICULUM)
        decision = dj.traced(learner)(x)[1].decisions[""]
        np.testing.assert_array_equal(decision.keep, [expected] * 2)
        np.testing.assert_allclose(decision.probability, [expected] * 2, atol=1e-6)


def test_errors():
    plain, gate = make(blocks.Pointwise), dj.FixedGate(np.ones((1, 2)), rule=EACH)
    for build, message in [
        (lambda: PolicySkip([plain, plain], gate, skip=()), "skip=.. must be rising numbers of the 2 blocks"),
        (lambda: PolicySkip([plain, plain], gate, skip=(1, 2)), "rising numbers of the 2 blocks"),
        (lambda: PolicySkip([plain, plain], gate, skip=(1, 0)), "rising numbers"),
        (lambda: PolicySkip([plain, plain], gate, skip=(1,), otherwise={0: plain}), r"for the blocks \[0\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            build()
    x = image(1, 8, 8, CHANNELS)
    with pytest.raises(ValueError, match=r"PolicySkip needs .* shape \(1, 3\), its gate gave \(1, 2\).*ChannelGate"):
        PolicySkip([plain] * 3, gate)(x)
    with pytest.raises(ValueError, match="give an `otherwise`"):
        PolicySkip([plain, make(Down)], gate)(x)
    with pytest.raises(ValueError, match="compact execution cannot train: BatchNorm at 'norm1'"):
        nnx.view(PolicySkip([plain, make(blocks.Residual)], gate), execution="compact")(x)
