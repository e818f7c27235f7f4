"""Decisions inside of decisions about whole examples: one answer, the MACs counted by hand, gradients to both."""

import blocks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import CHANNELS, at, image, make, still
from flax import nnx
from test_ops_tiles import assert_same

import dynjax as dj
from dynjax.core.decision import EACH, ONE, Decision

TOKENS, HIDDEN, EXPERTS, WIDTHS = 3, 6, 3, (0.25, 0.5, 1)
ROWS, MAPS = (4, TOKENS, CHANNELS), (4, 7, 6, CHANNELS)
GATE = CHANNELS * 16 + 16  # of one output, its hidden layer included
ALL = (np.zeros(4), np.ones(4), np.array([1.0, 0, 0, 1]), np.array([0.0, 1, 0, 0]))


def tell(keep, rule=EACH):
    return lambda x: Decision(keep, keep * 0.5 + 0.25, "example", rule)


def experts(rngs):
    router = dj.Router(CHANNELS, EXPERTS, top=2, least=1, rngs=rngs)
    return dj.Experts(CHANNELS, HIDDEN, EXPERTS, gate=router, rngs=rngs)


def slim(rngs, hidden):
    first, last = nnx.Linear(CHANNELS, hidden, rngs=rngs), nnx.Linear(hidden, CHANNELS, rngs=rngs)
    return dj.Slimmable([first, nnx.relu], last, dj.BranchGate(CHANNELS, 3, rngs=rngs), widths=WIDTHS)


def skip(rngs, kind=blocks.Pointwise):
    return dj.Skip(kind(rngs), dj.SampleGate(CHANNELS, rngs=rngs))


def tiled(rngs):
    return dj.Tiles(blocks.Residual(rngs), dj.TileGate(CHANNELS, size=4, rngs=rngs))


def one_of(keep):
    return jnp.stack([1 - keep, keep], -1)


GIVEN = {
    "Skip around Experts": (ROWS, lambda keep: dj.Skip(make(experts), tell(keep))),
    "Skip around Tiles": (MAPS, lambda keep: dj.Skip(make(tiled), tell(keep))),
    "Skip around Skip around Skip": (
        MAPS,
        lambda keep: dj.Skip(make(lambda rngs: dj.Skip(skip(rngs), dj.SampleGate(CHANNELS, rngs=rngs))), tell(keep)),
    ),
    "Select around Slimmable": (
        ROWS,
        lambda keep: dj.Select(
            [make(lambda rngs: slim(rngs, 8)), make(lambda rngs: slim(rngs, 16), 1)], tell(one_of(keep), ONE)
        ),
    ),
    "PolicySkip around a chain": (
        ROWS,
        lambda keep: dj.PolicySkip([make(experts), make(skip)], tell(jnp.stack([keep, 1 - keep], -1))),
    ),
}


BY_HAND_TOO = "Select around Slimmable"
given = [pytest.param(name, marks=pytest.mark.slow if name == BY_HAND_TOO else ()) for name in GIVEN]


@pytest.mark.parametrize("name", given)
def test_masked_equals_compact_whatever_is_decided(name):
    shape, wrap = GIVEN[name]

    @jax.jit
    def run(x, keep, threshold):
        model = at(threshold, wrap(keep))
        views = still(model), *(still(model, "compact", strategy=strategy) for strategy in ("loop", "buckets"))
        return [dj.traced(view)(x) for view in views]

    x, spent = image(*shape), []
    for keep in ALL:
        for threshold in (-30.0, 0.0, 30.0):
            (masked, trace), *others = run(x, jnp.asarray(keep), jnp.float32(threshold))
            for compact, other in others:
                assert_same(masked, compact)
                np.testing.assert_allclose(trace.macs(), other.macs(), rtol=1e-6)
                assert (trace.static_macs, trace.full_macs) == (other.static_macs, other.full_macs)
                assert list(trace.decisions) == list(other.decisions)
            assert 0 <= trace.static_macs <= trace.full_macs
            spent.append(np.asarray(trace.macs()))
    assert len({float(each.sum()) for each in spent}) > 3 and max(map(np.max, spent)) <= trace.full_macs


def test_one_example_and_a_call_without_a_trace():
    shape, wrap = GIVEN["Skip around Experts"]

    @jax.jit
    def run(x, keep):
        views = [still(wrap(keep), execution) for execution in ("masked", "compact")]
        return [each for view in views for each in (view(x), dj.traced(view)(x)[0])]

    x = image(*shape)[:1]
    for keep in (0.0, 1.0):
        plain, *others = run(x, jnp.asarray([keep]))
        for other in others:
            assert_same(plain, other)
        assert (plain != x).any() == bool(keep)


def test_skip_around_experts_by_hand():
    keep = jnp.asarray([1.0, 0, 1, 0])
    model, x = dj.Skip(make(experts), tell(keep)), image(*ROWS)
    trace = dj.traced(still(model))(x)[1]
    outer, inner = trace.decisions[""], trace.decisions["block"]
    taken = np.asarray(inner.keep).sum((1, 2))
    assert (taken[[1, 3]] == 0).all() and (taken[[0, 2]] >= TOKENS).all()
    router, expert = TOKENS * CHANNELS * EXPERTS, 2 * CHANNELS * HIDDEN
    np.testing.assert_array_equal(trace.macs(), keep * router + taken * expert)
    assert trace.static_macs == 0 and outer.cost.unit == (router,)
    assert trace.full_macs == router + 2 * TOKENS * expert
    alone = dj.traced(still(model.block))(x)[1].decisions[""]
    np.testing.assert_allclose(inner.probability, alone.probability * outer.probability[:, None, None], rtol=1e-6)


def test_select_around_slimmable_by_hand():
    keep = jnp.asarray([1.0, 0, 1, 0])
    model, x = GIVEN["Select around Slimmable"][1](keep), image(*ROWS)
    trace = dj.traced(still(model))(x)[1]
    gate = CHANNELS * 16 + 16 * 3
    costs = [[TOKENS * 2 * CHANNELS * round(width * hidden) for width in WIDTHS] for hidden in (8, 16)]
    inner = [np.asarray(trace.decisions[f"blocks/{k}"].keep) for k in (0, 1)]
    np.testing.assert_array_equal(inner[0].sum(1), 1 - keep)
    np.testing.assert_array_equal(inner[1].sum(1), keep)
    np.testing.assert_allclose(trace.macs(), gate + sum(k @ c for k, c in zip(inner, costs, strict=True)))
    assert trace.static_macs == 0
    assert trace.full_macs == gate + costs[1][-1]  # the dearest branch, with what it holds


class Stage(nnx.Module):
    def __init__(self, rngs):
        self.skip, self.linear = skip(rngs), nnx.Linear(CHANNELS, CHANNELS, rngs=rngs)

    def __call__(self, x):
        return self.linear(self.skip(x))


class Head(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(CHANNELS, 3, rngs=rngs)

    def __call__(self, x):
        return self.linear(x.mean((1, 2)))


def exits(rngs):
    return dj.Exits([Stage(rngs) for _ in range(3)], [Head(rngs) for _ in range(3)], at=0.5)


def test_exits_of_stages_that_hold_skips():
    model, x = make(exits), image(*MAPS) * jnp.linspace(0.3, 3, 4)[:, None, None, None]

    @jax.jit
    def run(x, threshold):
        learnt = at(threshold, model)
        views = still(learnt), *(still(learnt, "compact", strategy=strategy) for strategy in ("loop", "buckets"))
        return [dj.traced(view)(x) for view in views]

    pixels = MAPS[1] * MAPS[2]
    block, own = pixels * CHANNELS**2, GATE + pixels * CHANNELS**2 + CHANNELS * 3
    kept = []
    for threshold in (-30.0, -0.3, 0.0, 0.3, 30.0):
        (masked, trace), *others = run(x, jnp.float32(threshold))
        for compact, _ in others:
            assert_same(masked, compact)
        keep = np.asarray(trace.decisions[""].keep)
        inner = np.stack([trace.decisions[f"stages/{k}/skip"].keep for k in range(3)], -1)
        assert (inner <= keep).all()
        for each in (trace, *(other for _, other in others)):
            np.testing.assert_allclose(each.macs(), own * keep.sum(1) + block * inner.sum(1), rtol=1e-6)
            assert each.static_macs == 0 and each.full_macs == 3 * (own + block)
        kept.append(keep.sum())
    assert kept[0] == 12 and kept[-1] == 4 and kept == sorted(kept, reverse=True) and len({*kept}) > 2


def test_gradients_reach_both_gates_and_statistics_move_on():
    def build(rngs):
        return dj.Skip(skip(rngs, blocks.Residual), dj.SampleGate(CHANNELS, rngs=rngs))

    @nnx.jit
    def step(model, x):
        def loss(model):
            output, trace = dj.traced(model)(x)
            return trace.macs().sum() + (output**2).sum(), trace

        return nnx.grad(loss, has_aux=True)(model)

    model, x = make(build), image(8, 5, 4, CHANNELS)
    mean = model.block.block.norm1.mean[...]
    (grads, trace), drawn = step(model, x), [step(model, x)[1].decisions["block"].keep for _ in range(4)]
    for path, gradient in nnx.to_flat_state(grads):
        if "gate" in path and path[-1] == "bias":
            assert np.asarray(gradient[...]).any(), path
    assert (model.block.block.norm1.mean[...] != mean).any()
    assert any((each != drawn[0]).any() for each in drawn[1:])
    assert (trace.decisions["block"].keep <= trace.decisions[""].keep).all()

    def spent(keep):  # what a parent and its child spend falls with the parent's gate
        return dj.traced(still(dj.Skip(make(skip), tell(keep))))(x)[1].macs().sum()

    inner = dj.traced(still(make(skip)))(x)[1].decisions[""].keep
    slope = jax.grad(spent)(jnp.ones(8))
    np.testing.assert_allclose(slope, GATE + 20 * CHANNELS**2 * inner, rtol=1e-6)


def test_one_threshold_brings_both_to_a_budget():
    model = make(lambda rngs: dj.Skip(experts(rngs), dj.SampleGate(CHANNELS, rngs=rngs)))
    x = image(32, TOKENS, CHANNELS)
    for share in (0.3, 0.6, 1.0):
        deployed = dj.deploy(model, share, [x])
        assert deployed.report.met
        output, trace = dj.traced(deployed.model)(x)
        np.testing.assert_allclose(trace.macs().mean(), deployed.report.mean, rtol=1e-5)
        assert_same(jax.jit(still(deployed.model))(x), output)


class Looped(nnx.Module):
    def __init__(self, rngs):
        self.skip = skip(rngs)

    def __call__(self, x):
        return jax.lax.fori_loop(0, 2, lambda _, x: self.skip(x), x)


@pytest.mark.parametrize("execution", ["masked", "compact"])
def test_a_loop_of_the_users_inside_is_refused_aloud(execution):
    model = dj.Skip(make(Looped), tell(jnp.ones(2)))
    with pytest.raises(ValueError, match=r"Skip at .* decides inside a function that JAX transforms"):
        dj.traced(still(model, execution))(image(2, 3, 3, CHANNELS))


def test_what_cannot_tell_examples_apart_refuses_what_is_dynamic():
    inner = make(skip)
    for build in (
        lambda: dj.Tiles(inner, dj.FixedGate(np.ones((1, 2, 2)), size=4)),
        lambda: dj.Halt(inner, dj.FixedGate([1]), 2),
        lambda: dj.Cell(inner),
        lambda: dj.Exits([inner], [inner], size=4),
        lambda: dj.Select([inner], dj.FixedGate(np.ones((1, 2, 2, 1)), size=4)),
    ):
        with pytest.raises(ValueError, match="around a module that is dynamic already"):
            build()


def test_dynamize_wraps_what_is_dynamic_already():
    model = make(lambda rngs: nnx.Sequential(nnx.Linear(3, CHANNELS, rngs=rngs), Stage(rngs)))
    both = dj.dynamize(model, {"layers/1": dj.Skip}, rngs=nnx.Rngs(0))
    trace = dj.traced(still(both))(image(2, 4, 4, 3))[1]
    assert set(trace.decisions) == {"layers/1", "layers/1/block/skip"}
    assert trace.full_macs == GATE + dj.traced(still(model))(image(2, 4, 4, 3))[1].full_macs
