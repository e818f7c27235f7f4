"""Gates: the choice that they make, its gradient, its noise, and where they start from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import evaluate, image, make, train
from flax import nnx
from flax.errors import TraceContextError

import dynjax as dj
from dynjax import budget, cost
from dynjax.core import gates
from dynjax.core.decision import EACH, ONE

KEY = jax.random.key(0)
LOGITS = jnp.asarray([-40.0, -2.0, 0.0, 1.0, 40.0])


# Pure functions


def test_straight_through_is_hard_forward_and_soft_backward():
    hard = jnp.asarray([0.0, 1.0, 1.0])
    soft = jnp.asarray([0.3, 1e-9, 0.9999999])
    value, pull = jax.vjp(functools.partial(gates.straight_through, hard), soft)
    np.testing.assert_array_equal(value, hard)
    np.testing.assert_array_equal(pull(jnp.arange(3.0))[0], jnp.arange(3.0))
    blocked = jax.grad(lambda hard: gates.straight_through(hard, soft).sum())(hard)
    np.testing.assert_array_equal(blocked, jnp.zeros(3))


def test_gumbel_sigmoid_keeps_with_the_probability_of_its_logit():
    logits = jnp.broadcast_to(LOGITS[None], (4000, 5))
    keep = jax.jit(gates.gumbel_sigmoid)(logits, KEY)
    assert set(np.unique(keep)) == {0.0, 1.0}
    np.testing.assert_allclose(keep.mean(0), jax.nn.sigmoid(LOGITS), atol=0.03)
    slope = jax.jit(jax.grad(lambda logits: gates.gumbel_sigmoid(logits, KEY).sum()))(LOGITS)
    assert np.isfinite(slope).all() and (np.asarray(slope) >= 0).all() and slope[2] > 0


def test_gumbel_softmax_is_one_hot_with_the_softmax_probability():
    logits = jnp.log(jnp.asarray([0.1, 0.2, 0.7]))
    keep = jax.jit(gates.gumbel_softmax)(jnp.broadcast_to(logits[None], (4000, 3)), KEY)
    assert set(np.unique(keep)) == {0.0, 1.0}
    np.testing.assert_array_equal(keep.sum(-1), 1)
    np.testing.assert_allclose(keep.mean(0), [0.1, 0.2, 0.7], atol=0.03)
    slope = jax.grad(lambda logits: gates.gumbel_softmax(logits, KEY)[2])(logits)
    assert slope[2] > 0 and float(slope.sum()) == pytest.approx(0, abs=1e-6)


def test_threshold_and_argmax():
    np.testing.assert_array_equal(gates.threshold(LOGITS), [0, 0, 1, 1, 1])
    np.testing.assert_array_equal(gates.threshold(LOGITS, 1.5), [0, 0, 0, 0, 1])
    np.testing.assert_array_equal(gates.one_hot_argmax(jnp.asarray([[1.0, 3.0, 3.0]])), [[0, 1, 0]])


def test_top_k_keeps_exactly_k_even_of_equals():
    logits = jnp.asarray([[0.0, 5.0, 0.0, -1.0], [1.0, 1.0, 1.0, 1.0]])
    np.testing.assert_array_equal(gates.top_k(logits, 2), [[1, 1, 0, 0], [1, 1, 0, 0]])
    np.testing.assert_array_equal(gates.top_k(logits, 0), jnp.zeros((2, 4)))
    np.testing.assert_array_equal(gates.top_k(logits, 4), jnp.ones((2, 4)))
    slope = jax.grad(lambda logits: gates.top_k(logits, 2).sum())(logits)
    np.testing.assert_allclose(slope, jax.nn.sigmoid(logits) * (1 - jax.nn.sigmoid(logits)), rtol=1e-6)
    for k in (-1, 5):
        with pytest.raises(ValueError, match=f"k={k}"):
            gates.top_k(logits, k)


def test_a_tile_that_the_border_cuts_counts_the_pixels_it_has():
    x = jnp.arange(15.0).reshape(1, 3, 5, 1)
    expected = [[[0, 1, 5, 6], [2, 3, 7, 8], [4, 9]], [[10, 11], [12, 13], [14]]]
    pooled = gates.pool_tiles(x, 2)
    np.testing.assert_allclose(pooled[0, ..., 0], [[np.mean(tile) for tile in row] for row in expected])
    np.testing.assert_allclose(gates.pool_tiles(x, 8), x.mean((1, 2), keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("size", [1, 3, 4, 9, 16])
def test_means_and_maxima_over_tiles_and_their_gradients(size):
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 9, 13, 3)).astype(np.float32)
    weights = random.normal(size=(2, -(-9 // size), -(-13 // size), 3)).astype(np.float32)
    mean, most, slope = np.zeros_like(weights), np.zeros_like(weights), np.zeros_like(x)
    for i, j in np.ndindex(weights.shape[1:3]):
        place = slice(None), slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
        tile, w = x[place], weights[:, i, j][:, None, None]
        mean[:, i, j], most[:, i, j] = tile.mean((1, 2)), tile.max((1, 2))
        slope[place] = w / tile[0, ..., 0].size
    np.testing.assert_allclose(gates.pool_tiles(jnp.asarray(x), size), mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(gates.max_tiles(jnp.asarray(x), size), most)
    found = jax.grad(lambda x: (weights * gates.pool_tiles(x, size)).sum())(jnp.asarray(x))
    np.testing.assert_allclose(found, slope, rtol=1e-5, atol=1e-7)
    half = gates.pool_tiles(jnp.asarray(x, jnp.bfloat16), size)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), mean, rtol=0.02, atol=0.02)


# Modules

ABOUT = {
    "sample": ("example", EACH),
    "tile": ("tile", EACH),
    "branch": ("example", ONE),
    "tile branch": ("tile", ONE),
    "channel": ("example", EACH),
}
MAKERS = {
    "sample": (lambda rngs: dj.SampleGate(4, rngs=rngs), (3,)),
    "tile": (lambda rngs: dj.TileGate(4, size=4, rngs=rngs), (3, 3, 2)),
    "branch": (lambda rngs: dj.BranchGate(4, 3, rngs=rngs), (3, 3)),
    "tile branch": (lambda rngs: dj.BranchGate(4, 3, size=4, rngs=rngs), (3, 3, 2, 3)),
    "channel": (lambda rngs: dj.ChannelGate(4, 5, rngs=rngs), (3, 5)),
}


@pytest.fixture(scope="module", params=MAKERS)
def gate(request):
    build, shape = MAKERS[request.param]
    return request.param, make(build), shape


def test_every_gate_decides_hard_and_draws_noise_only_when_it_trains(gate):
    name, gate, shape = gate
    x = image(3, 9, 7, 4)
    drawn = [train(gate, x) for _ in range(6)]
    still = [evaluate(gate, x) for _ in range(2)]
    for decision in (*drawn, *still):
        assert decision.keep.shape == decision.probability.shape == shape
        assert (decision.place, decision.rule) == ABOUT[name]
        assert set(np.unique(decision.keep)) <= {0.0, 1.0}
        keep, probability = np.asarray(decision.keep), np.asarray(decision.probability)
        assert ((probability >= 0) & (probability <= 1)).all()
        if "branch" in name:
            np.testing.assert_array_equal(keep.sum(-1), 1)
            np.testing.assert_allclose(probability.sum(-1), 1, rtol=1e-6)
        np.testing.assert_allclose(decision.probability, still[0].probability, rtol=1e-5)
    assert any((np.asarray(decision.keep) != np.asarray(drawn[0].keep)).any() for decision in drawn)
    np.testing.assert_array_equal(still[0].keep, still[1].keep)


def test_a_higher_threshold_spends_less(gate):
    name, gate, _ = gate
    x = image(3, 9, 7, 4)
    rank = np.arange(3.0) if "branch" in name else 1.0

    def spent(chosen):
        return float((np.asarray(chosen) * rank).sum())

    decisions = [evaluate(gate, x, at) for at in (-30.0, -1.0, 0.0, 1.0, 30.0)]
    for field in ("keep", "probability"):
        amounts = [spent(getattr(decision, field)) for decision in decisions]
        assert amounts == sorted(amounts, reverse=True)
    ends = [spent(decisions[i].keep) for i in (0, -1)]
    most = np.asarray(decisions[0].keep).sum() * 2 if "branch" in name else decisions[0].keep.size
    assert ends == [most, 0]


@pytest.mark.parametrize("name", MAKERS)
def test_gates_start_open(name):
    build, _ = MAKERS[name]
    probability = np.asarray(evaluate(nnx.jit(lambda: build(nnx.Rngs(0)))(), image(3, 9, 7, 4)).probability)
    if "branch" in name:
        assert (probability.argmax(-1) == 2).all() and (probability[..., 0] > 0.02).all()
    else:
        assert ((probability > 0.75) & (probability < 0.97)).all()


def test_gradients_reach_every_parameter_of_a_gate(gate):
    _, gate, _ = gate

    def loss(gate, x):
        decision = gate(x)
        weights = jnp.arange(decision.keep.size, dtype=jnp.float32).reshape(decision.keep.shape)
        return (decision.keep * weights).sum()

    gradient = nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, budget.gate_filter)))(gate, image(3, 9, 7, 4))
    leaves = jax.tree.leaves(gradient)
    assert len(leaves) == 5 and all(np.isfinite(leaf).all() and (np.asarray(leaf) != 0).any() for leaf in leaves)


def test_the_scale_of_the_features_does_not_matter():
    gate, x = make(MAKERS["tile"][0]), np.asarray(image(3, 9, 7, 4))
    np.testing.assert_allclose(evaluate(gate, x).probability, evaluate(gate, 1000 * x).probability, rtol=1e-4)


def test_gates_are_cheap_and_their_cost_is_counted():
    gate = make(MAKERS["tile"][0])
    # Six tiles of 3 * 4 features through 16 hidden units.
    assert cost.macs(nnx.view(gate, deterministic=True), image(1, 9, 7, 4)) == 6 * (12 * 16 + 16)


def test_a_sample_gate_takes_vectors():
    gate = make(MAKERS["sample"][0])
    assert evaluate(gate, image(3, 4)).keep.shape == (3,)
    assert evaluate(make(MAKERS["branch"][0]), image(3, 4)).keep.shape == (3, 3)


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_a_path_gate_is_the_soft_conditional_gate(threshold):
    """relu(tanh(logits)), worked by hand: the logits are the biases."""
    gate = make(lambda rngs: dj.PathGate(5, 4, rngs=rngs))
    gate.logits.out[...] = jnp.zeros_like(gate.logits.out[...])
    gate.logits.bias[...] = jnp.asarray([1.5, 0.3, 0.0, -1.0])

    def decide(gate, x):
        decision = evaluate(gate, x, threshold)
        return decision.keep.sum(0), decision

    slope, decision = jax.jacobian(lambda bias: decide(with_bias(gate, bias), image(2, 3, 3, 5)), has_aux=True)(
        gate.logits.bias[...]
    )
    weights = {0.0: [0.905148, 0.291313, 0, 0], 0.5: [0.761594, 0, 0, 0]}[threshold]
    np.testing.assert_allclose(decision.probability, [weights] * 2, atol=1e-6)
    np.testing.assert_array_equal(decision.keep, (np.asarray([weights] * 2) > 0))
    # A closed path still feels a budget.
    sigmoid = 1 / (1 + np.exp(threshold - np.asarray([1.5, 0.3, 0.0, -1.0])))
    np.testing.assert_allclose(slope, 2 * np.diag(sigmoid * (1 - sigmoid)), atol=1e-6)


def with_bias(gate, bias):
    gate = nnx.clone(gate)
    gate.logits.bias[...] = bias
    return gate


def test_errors_name_the_argument():
    rngs, x = nnx.Rngs(0), image(1, 8, 8, 4)
    for build, message in [
        (lambda: dj.SampleGate(4, temperature=1.5, rngs=rngs), "temperature=1.5"),
        (lambda: dj.TileGate(4, size=0, rngs=rngs), "size=0"),
        (lambda: dj.BranchGate(4, 0, rngs=rngs), "branches=0"),
        (lambda: dj.BranchGate(4, 2, size=0, rngs=rngs), "size=0"),
        (lambda: dj.ChannelGate(4, 0, rngs=rngs), "groups=0"),
        (lambda: make(lambda rngs: dj.SampleGate(5, rngs=rngs))(x), "SampleGate was made for features=5.*features=4"),
        (lambda: make(lambda rngs: dj.TileGate(5, rngs=rngs))(x), "TileGate was made for features=5.*features=4"),
    ]:
        with pytest.raises(ValueError, match=message):
            build()


def test_noise_under_a_jit_that_closes_over_the_gate_says_what_to_do():
    gate, x = make(MAKERS["sample"][0]), image(3, 4)
    with pytest.raises(TraceContextError, match=r"pass it as an argument to nnx.jit.*deterministic=True"):
        jax.jit(lambda x: gate(x).keep)(x)
    jax.jit(lambda x: nnx.view(gate, deterministic=True)(x).keep)(x)


def test_an_entropy_gate_keeps_the_uncertain_tiles():
    share = jnp.asarray([[[0.0, 0.1, 0.6, 0.6, 1.0], [0.2, 0.1, 0.6, 0.6, 1.0]]])[..., None]
    gate = dj.EntropyGate(size=2)
    assert evaluate(gate, share, budget.LOWEST).keep.all()
    np.testing.assert_array_equal(evaluate(gate, share, 0.0).keep, [[[0, 1, 1]]])
    np.testing.assert_array_equal(evaluate(gate, share, 2.0).keep, [[[0, 0, 1]]])
    assert not evaluate(gate, share, budget.HIGHEST).keep.any()
    np.testing.assert_allclose(evaluate(gate, share).probability[0, 0, :2], [0.1, 0.6], rtol=1e-5)
    with pytest.raises(ValueError, match="features=1"):
        gate(jnp.zeros((1, 2, 2, 3)))


def test_entropies_near_nothing_are_told_apart():
    share = jnp.array([1e-30, 1e-20, 1e-13, 0.0]).reshape(1, 2, 2, 1)
    gate = dj.EntropyGate()
    np.testing.assert_array_equal(evaluate(gate, share, -50.0).keep.reshape(-1), [0, 1, 1, 0])
    np.testing.assert_array_equal(evaluate(gate, share, -40.0).keep.reshape(-1), [0, 0, 1, 0])
    assert evaluate(gate, share, budget.LOWEST).keep.all() and not evaluate(gate, share, budget.HIGHEST).keep.any()


def test_log_entropy():
    logits = np.array([[0.0, 0, 0], [1, 2, 3], [40, 0, -3], [9, 9, -400]])
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    log_p[2, 0] = -(np.exp(-40.0) + np.exp(-43.0))
    wanted = np.log(-(p * log_p).sum(-1))
    np.testing.assert_allclose(gates.log_entropy(jnp.asarray(logits, jnp.float32)), wanted, rtol=1e-5, atol=1e-6)
