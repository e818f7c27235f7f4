"""Experts and routers: published formulas in NumPy, no token dropped, masked equals compact, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import at, image, make, still
from flax import nnx
from test_ops_tiles import assert_same, three_ways

import dynjax as dj
from dynjax import budget, cost
from dynjax.core.decision import ONE, some
from dynjax.ops import experts
from dynjax.ops.experts import gathered, places, route

FEATURES, HIDDEN, EXPERTS = 4, 6, 5


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def mixture(top=2, **options):
    def build(rngs):
        gate = dj.Router(FEATURES, EXPERTS, top=top, rngs=rngs, **options)
        return dj.Experts(FEATURES, HIDDEN, EXPERTS, gate=gate, rngs=rngs)

    return make(build)


def by_hand(model, x, weight):
    """Every expert on every token, (..., C), weighted by (..., E)."""
    up, up_bias, down, down_bias = (np.asarray(p[...]) for p in (model.up, model.up_bias, model.down, model.down_bias))
    hidden = np.asarray(nnx.gelu(jnp.asarray(np.einsum("...c,ech->...eh", x, up) + up_bias)))
    return (weight[..., None] * (np.einsum("...eh,ehc->...ec", hidden, down) + down_bias)).sum(-2)


# Routers


def test_top_k_routing_is_the_softmax_over_the_top_logits():
    """Shazeer et al. 2017, eq. 3 and 5: softmax of the logits with all but the top k at minus infinity."""
    model, x = still(mixture(top=2)), image(3, 7, FEATURES)
    logits = np.asarray(x) @ np.asarray(model.gate.kernel)
    second = np.sort(logits, -1)[..., -2:-1]
    expected = softmax(np.where(logits >= second, logits, -np.inf))
    y, trace = jax.jit(dj.traced(model))(x)
    decision = trace.decisions[""]
    assert (decision.place, decision.rule) == ("token", some(2))
    np.testing.assert_array_equal(decision.keep, logits >= second)
    np.testing.assert_allclose(decision.probability, softmax(logits), rtol=1e-5)
    np.testing.assert_allclose(y, by_hand(model, np.asarray(x), expected), rtol=1e-4, atol=1e-5)


def test_switch_routing_weighs_one_expert_by_its_probability():
    """Fedus et al. 2022, eq. 1 and 2; and for examples, (B, C)."""
    model, x = still(mixture(top=1)), image(9, FEATURES)
    p = softmax(np.asarray(x) @ np.asarray(model.gate.kernel))
    expected = np.where(p == p.max(-1, keepdims=True), p, 0)
    y, trace = jax.jit(dj.traced(model))(x)
    assert trace.decisions[""].rule == ONE
    np.testing.assert_allclose(y, by_hand(model, np.asarray(x), expected), rtol=1e-4, atol=1e-5)


def test_optional_experts_are_taken_where_they_are_near_the_first():
    logits = jnp.asarray([[0.0, 3.0, 2.5, 0.9], [1.0, 1.0, 1.0, 1.0], [9.0, 0.0, 6.9, 7.1]])
    # Near: at most OPEN = 2 below the largest. Of equals the first count.
    for top, least, threshold, expected in [
        (3, 1, 0.0, [[0, 1, 1, 0], [1, 1, 1, 0], [1, 0, 0, 1]]),
        (3, 2, 0.0, [[0, 1, 1, 0], [1, 1, 1, 0], [1, 0, 0, 1]]),
        (3, 2, 1.9, [[0, 1, 1, 0], [1, 1, 1, 0], [1, 0, 0, 1]]),
        (3, 1, 1.9, [[0, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]),
        (3, 1, -1.0, [[0, 1, 1, 1], [1, 1, 1, 0], [1, 0, 1, 1]]),
        (2, 2, 30.0, [[0, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 1]]),
        (1, 1, 0.0, [[0, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]),
    ]:
        np.testing.assert_array_equal(route(logits, top, least, threshold), expected)
    keep = jax.jit(lambda key: route(jnp.broadcast_to(logits[:1], (4000, 4)), 3, 1, 0.0, key))(jax.random.key(0))
    near = 1 / (1 + np.exp(-(np.asarray([2.5, 0.9]) - 3.0 + 2.0)))
    np.testing.assert_allclose(keep.mean(0), [0, 1, *near], atol=0.03)
    slope = jax.jit(jax.grad(lambda logits: route(logits, 2, 1, 0.0, jax.random.key(0)).sum()))(logits[:1])
    # Straight through the sigmoid of the second's logit less the first's; none for the others.
    assert slope[0, 2] > 0
    np.testing.assert_array_equal(slope, slope[0, 2] * jnp.asarray([[0, -1, 1, 0]]))
    np.testing.assert_array_equal(jax.grad(lambda logits: route(logits, 2, 2).sum())(logits), jnp.zeros((3, 4)))


def test_z_loss_and_load_balance_by_hand():
    """Zoph et al. 2022, eq. 5; Fedus et al. 2022, eq. 4 to 6, over the two experts of each token."""
    model, x = mixture(top=2), image(3, 7, FEATURES)
    logits = np.asarray(x) @ np.asarray(model.gate.kernel)

    def losses(model, x):
        trace = dj.traced(model)(x)[1]
        return budget.load_balance(trace), dj.ops.router_z_loss(model)

    balance, z = nnx.jit(losses)(model, x)
    assert float(z) == pytest.approx((np.log(np.exp(logits).sum(-1)) ** 2).mean(), rel=1e-5)
    taken = (logits >= np.sort(logits, -1)[..., -2:-1]).reshape(-1, EXPERTS).mean(0) / 2
    assert float(balance) == pytest.approx(
        EXPERTS * (taken * softmax(logits).reshape(-1, EXPERTS).mean(0)).sum(), rel=1e-5
    )
    slope = nnx.jit(nnx.grad(lambda model, x: losses(model, x)[1]))(model, x).gate.kernel[...]
    share = 2 * np.log(np.exp(logits).sum(-1))[..., None] * softmax(logits) / logits[..., 0].size
    np.testing.assert_allclose(slope, np.einsum("btc,bte->ce", x, share), rtol=1e-4, atol=1e-5)
    before = model.gate.loss[...]
    still(model)(2 * x)  # no training: nothing is written
    np.testing.assert_array_equal(model.gate.loss[...], before)
    assert dj.ops.router_z_loss(nnx.Linear(2, 2, rngs=nnx.Rngs(0))) == 0


def test_the_random_router():
    x = image(40, 5, FEATURES)
    model = make(
        lambda rngs: dj.Experts(
            FEATURES, HIDDEN, EXPERTS, gate=dj.RandomRouter(EXPERTS, top=2, least=1, rngs=rngs), rngs=rngs
        )
    )

    @jax.jit
    def run(threshold):
        y, trace = dj.traced(at(threshold, still(model)))(x)
        return trace.decisions[""].keep, y, at(threshold, still(model, "compact"))(x)

    for threshold, number in ((-30.0, 2), (30.0, 1)):
        keep, masked, compact = run(jnp.float32(threshold))
        assert_same(masked, compact)
        np.testing.assert_array_equal(keep.sum(-1), number)
        np.testing.assert_allclose(keep.mean((0, 1)), number / EXPERTS, atol=0.1)
    draws = [np.asarray(nnx.jit(lambda gate, x: gate(x).keep)(model.gate, x)) for _ in range(2)]
    assert (draws[0] != draws[1]).any() and (draws[0].sum(-1) <= 2).all()


# Experts


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5,)], ids=str)
def test_no_token_is_dropped(shape):
    """All experts, none, one expert for all tokens, and any numbers of experts: masked equals compact."""
    random = np.random.default_rng(0)
    model, x = make(lambda rngs: dj.Experts(FEATURES, HIDDEN, EXPERTS, rngs=rngs)), image(*shape, FEATURES)
    full = (*shape, EXPERTS)

    def wrap(x, keep):
        view = nnx.clone(model)
        view.gate = dj.FixedGate(keep, rule=some(EXPERTS))
        return view, x

    run = three_ways(wrap, x, jnp.zeros(full))
    crowd = np.broadcast_to(np.eye(EXPERTS)[2], full)
    for keep in (np.zeros(full), np.ones(full), crowd, random.random(full) < 0.2, random.random(full) < 0.7):
        keep = np.asarray(keep, np.float32)
        masked, *compact = run(x, jnp.asarray(keep))
        weight = keep / np.maximum(keep.sum(-1, keepdims=True), 1)
        np.testing.assert_allclose(masked, by_hand(model, np.asarray(x), weight), rtol=1e-4, atol=1e-5)
        assert_same(masked, *compact)
        if not keep.any():
            np.testing.assert_array_equal(compact, np.zeros((2, *x.shape)))


def test_many_blocks_of_tokens():
    """Experts with more tokens than a block holds, with exactly as many, and with none."""
    x = image(300, FEATURES)
    model = make(lambda rngs: dj.Experts(FEATURES, HIDDEN, 3, rngs=rngs))

    @jax.jit
    def run(keep):
        view = nnx.clone(model)
        view.gate = dj.FixedGate(keep)
        return still(view)(x), still(view, "compact", strategy="loop")(x)

    for counts in ((300, 0, 0), (128, 0, 172), (1, 256, 43)):
        keep = np.eye(3)[np.random.default_rng(0).permutation(np.repeat(np.arange(3), counts))]
        assert_same(*run(jnp.asarray(keep, jnp.float32)))


def test_places_by_hand():
    keep = jnp.asarray([[0, 1, 1], [1, 0, 0], [0, 0, 0], [0, 1, 0]], jnp.float32)
    chosen, taken, place, sizes = places(keep, 2)
    np.testing.assert_array_equal(sizes, [1, 2, 1])
    np.testing.assert_array_equal(taken, [[1, 1], [1, 0], [0, 0], [1, 0]])
    # Expert 0 has token 1; expert 1 has tokens 0 and 3; expert 2 has token 0. Place 8 is none.
    np.testing.assert_array_equal(place, [[1, 3], [0, 8], [8, 8], [2, 8]])
    np.testing.assert_array_equal(np.where(taken, chosen, -1), [[1, 2], [0, -1], [-1, -1], [1, -1]])
    x = jnp.asarray([[10.0], [11.0], [12.0], [13.0]])
    np.testing.assert_array_equal(gathered(x, place, 8)[:4, 0], [11, 10, 13, 10])


def test_the_threshold_lowers_the_number_of_experts():
    model, x = mixture(top=3, least=1), image(3, 7, FEATURES)

    @jax.jit
    def run(threshold):
        (y, trace), compact = dj.traced(at(threshold, still(model)))(x), at(threshold, still(model, "compact"))(x)
        return y, compact, trace

    spent = []
    for threshold in (-30.0, 0.0, 1.0, 1.7, 30.0):
        masked, compact, trace = run(jnp.float32(threshold))
        assert_same(masked, compact)
        spent.append(np.asarray(trace.macs()))
    one = 7 * 2 * FEATURES * HIDDEN
    router = 7 * FEATURES * EXPERTS
    assert trace.static_macs == router and trace.full_macs == router + 3 * one
    assert trace.decisions[""].cost.unit == (one / 7,) * EXPERTS
    np.testing.assert_allclose(spent[0], trace.full_macs)
    np.testing.assert_allclose(spent[-1], router + one)
    assert (np.diff(spent, axis=0) <= 0).all() and len({float(s.sum()) for s in spent}) == 5


def test_macs_of_the_compact_program():
    x = image(3, 8, FEATURES)
    model = still(mixture(top=2), "compact")
    trace = jax.eval_shape(dj.traced(still(model, "masked")), x)[1]
    assert cost.macs(still(model, strategy="buckets", execution="compact"), x) == 3 * trace.full_macs
    # The loop's blocks: their number is known at run time only. One block of 8 tokens through one expert is this much.
    one = cost.macs(still(model, strategy="loop", execution="compact"), x, while_trips=1)
    assert one == 3 * trace.static_macs + 16 * 2 * FEATURES * HIDDEN
    examples = jax.eval_shape(dj.traced(still(mixture(top=1))), image(3, FEATURES))[1]
    assert examples.full_macs == FEATURES * EXPERTS + 2 * FEATURES * HIDDEN


def test_gradients_are_those_of_masked_training_and_reach_the_router():
    x = image(3, 7, FEATURES)
    model = mixture(top=2)

    def loss(model, x):
        return (model(x) ** 2).sum()

    @nnx.jit
    def run(masked, grouped, x):
        return [nnx.grad(loss, argnums=(0, 1))(m, x) for m in (masked, grouped)]

    grouped = nnx.view(model, execution="compact", strategy="buckets")
    masked, compact = run(nnx.clone(model), grouped, x)
    leaves = [(np.asarray(a), np.asarray(b)) for a, b in
              zip(jax.tree.leaves(masked), jax.tree.leaves(compact), strict=True)]  # fmt: skip
    assert len(leaves) == 5 + 1
    for a, b in leaves:
        assert np.isfinite(a).all() and a.any()
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_budget_pulls_on_optional_experts():
    model, x = mixture(top=2, least=1), image(3, 7, FEATURES)

    def loss(model, x):
        return dj.budget_loss(dj.traced(model)(x)[1], 0.3)

    assert np.asarray(nnx.jit(nnx.grad(loss))(model, x).gate.kernel[...]).any()
    fast = dj.deploy(model, budget=0.8, calibration=[x])
    assert fast.report.met and 0.5 < fast.report.mean / fast.report.full <= 0.8


def test_half_precision():
    model, x = mixture(top=2), image(3, 7, FEATURES)
    graphdef, params, rest = nnx.split(still(model), nnx.Param, ...)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    run = jax.jit(lambda params, x, way: still(nnx.merge(graphdef, params, rest), way)(x), static_argnums=2)
    expected = run(params, x, "masked")
    for way in ("masked", "compact"):
        y = run(half, x.astype(jnp.bfloat16), way)
        assert y.dtype == jnp.bfloat16
        np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.1 * float(jnp.abs(expected).max()))


def test_errors():
    rngs = nnx.Rngs(0)
    model, x = mixture(), image(2, 3, FEATURES)
    for build, message in [
        (lambda: dj.Router(4, 5, top=6, rngs=rngs), "least=6, top=6 and experts=5 must ascend"),
        (lambda: dj.Router(4, 5, top=2, least=0, rngs=rngs), "least=0"),
        (lambda: dj.RandomRouter(5, top=2, least=3, rngs=rngs), "least=3"),
        (lambda: still(model)(image(2, 3, 6)), r"Experts needs \(B, T, 4\) or \(B, 4\), not \(2, 3, 6\)"),
        (lambda: still(model.gate)(image(2, 3, 6)), "Router was made for features=4.*features=6"),
        (lambda: still(model, "fast")(x), "execution='fast'"),
        (lambda: still(model, "compact", strategy="fast")(x), "strategy='fast'"),
    ]:
        with pytest.raises(ValueError, match=message):
            build()
    model.gate = dj.FixedGate(np.ones((1, 3, 4)))
    with pytest.raises(ValueError, match=r"decision per token \(rule: some\) of shape \(2, 3, 5\).*Router\(4, 5"):
        model(x)
    assert experts.LARGEST_BLOCK == 128
