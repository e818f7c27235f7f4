"""What modules contribute to training: against the formulas by hand."""

import jax.numpy as jnp
import numpy as np
from blocks import CHANNELS, Pointwise, call, image, make
from flax import nnx

import dynjax as dj
from dynjax.core import training
from dynjax.ops import halting, policy
from dynjax.ops.kernels import DynamicConv


class Named(nnx.Module):
    """Has an array of the name by which others say how much outputs count."""

    def __init__(self):
        self.weights, self.terms = nnx.Variable(jnp.ones(2)), nnx.Variable(jnp.ones(2))

    def __call__(self, x):
        return x


def test_what_nobody_contributes_is_left_out():
    model = nnx.Sequential(Named(), make(Pointwise))
    known = call(dj.traced(model)(image(2, CHANNELS))[1])
    assert training.terms(model, known) == {} and training.weights(model, known) is None
    assert not training.rewarded(model)
    training.schedule(model, 0.5)


def test_routers_are_weighted_by_name_and_their_mean_is_taken():
    model = make(lambda rngs: nnx.Sequential(*(dj.Experts(CHANNELS, 4, 3, rngs=rngs) for _ in range(2))))
    trace = dj.traced(model)(image(2, 5, CHANNELS))[1]
    losses = [layer.gate.loss[...] for layer in model.layers]
    found = training.terms(model, call(trace, weights={"router_z": 0.5}))
    np.testing.assert_array_equal(found["router_z"], 0.5 * jnp.stack(losses).mean())
    assert training.terms(model, call(trace, weights={"router_z": 0.0})) == {}
    np.testing.assert_array_equal(training.terms(model, call(trace))["router_z"], jnp.stack(losses).mean())


def test_attention_is_annealed_and_a_policy_has_a_curriculum():
    conv = make(lambda rngs: DynamicConv(CHANNELS, CHANNELS, 3, rngs=rngs))
    training.schedule(conv, 0.05)
    np.testing.assert_allclose(conv.attention.temperature[...], 15.5)
    chain = dj.PolicySkip([make(Pointwise) for _ in range(3)], dj.FixedGate(np.ones((1, 3)), place="example"))
    for progress, held in [(0.05, [1, 1, 0]), (0.15, [1, 0, 0]), (policy.CURRICULUM, [0, 0, 0])]:
        training.schedule(chain, progress)
        np.testing.assert_array_equal(chain.held[...], held)


def test_pondernet_weighs_its_steps_and_is_held_to_its_prior():
    def build(rngs):
        return nnx.Sequential(
            dj.Halt(Pointwise(rngs), dj.SampleGate(CHANNELS, rngs=rngs), 4, kind="pondernet"), lambda x: x
        )

    model, x = make(build), image(3, 5, 5, CHANNELS)
    trace = dj.traced(lambda model, x: model.layers[0].predictions(x))(model, x)[1]
    p = halting.halting_distribution(trace.decisions["layers/0"])
    known = call(trace, valid=jnp.array([True, True, False]), target=0.4, weights={"ponder": 0.1})
    np.testing.assert_array_equal(training.weights(model, known), p)
    divergence = halting.kl_to_prior(p, halting.geometric_prior(1 / 1.6, 4))
    np.testing.assert_allclose(training.terms(model, known)["ponder"], 0.1 * divergence[:2].mean(), rtol=1e-6)
    act = make(lambda rngs: dj.Halt(Pointwise(rngs), dj.SampleGate(CHANNELS, rngs=rngs), 4))
    assert training.weights(act, known) is None and training.terms(act, known) == {}


def test_a_policy_that_is_rewarded_compares_itself_with_what_it_would_do_without_noise():
    def build(rngs, straight_through=False):
        gate = dj.ChannelGate(CHANNELS, 2, rngs=rngs)
        return dj.PolicySkip([Pointwise(rngs) for _ in range(2)], gate, straight_through=straight_through)

    model, x = make(build), image(4, 3, 3, CHANNELS)
    output, trace = dj.traced(model)(x)
    greedy = dj.traced(nnx.view(model, deterministic=True, raise_if_not_found=False))(x)
    right = jnp.array([1.0, 0.0, 1.0, 0.0])
    known = call(
        trace, outputs=[output], correct=lambda y: right, again=lambda: greedy, weights={"reinforce": 2.0, "wrong": 3.0}
    )
    drawn, chosen = trace.decisions[""], greedy[1].decisions[""]
    rewards = [policy.blockdrop_reward(right, each.keep.mean(-1), 3.0) for each in (drawn, chosen)]
    expected = 2 * policy.reinforce_loss(policy.log_probability(drawn), *rewards)
    assert training.rewarded(model)
    np.testing.assert_allclose(training.terms(model, known)["reinforce"], expected, rtol=1e-6)
    through = make(lambda rngs: build(rngs, straight_through=True))
    assert not training.rewarded(through) and training.terms(through, known) == {}
