"""Channels and Slimmable: slices equal masks and narrower nets built by hand, and cost what they cost."""

import itertools

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
from dynjax.core.decision import EACH, ONE
from dynjax.ops import width
from dynjax.ops.slices import narrow, pick_groups, roles, span

HIDDEN = 8


def linear(rngs, **kwargs):
    return [nnx.Linear(CHANNELS, HIDDEN, rngs=rngs), nnx.relu], [nnx.Linear(HIDDEN, 5, rngs=rngs)]


def normed(rngs):
    first = [nnx.Linear(CHANNELS, HIDDEN, use_bias=False, rngs=rngs), nnx.BatchNorm(HIDDEN, rngs=rngs), nnx.relu]
    return first, [nnx.Linear(HIDDEN, CHANNELS, rngs=rngs), nnx.BatchNorm(CHANNELS, rngs=rngs)]


def strided(rngs):
    first = [nnx.Conv(CHANNELS, HIDDEN, (3, 3), 2, rngs=rngs), nnx.BatchNorm(HIDDEN, rngs=rngs), nnx.silu]
    return first, [nnx.Conv(HIDDEN, 5, (3, 3), rngs=rngs), nnx.tanh]


def mobile(rngs):
    """An inverted residual (Sandler et al. 2018): depthwise convolution and pooling act on each channel alone too."""
    first = [nnx.Conv(CHANNELS, HIDDEN, (1, 1), rngs=rngs), nnx.relu6]
    last = [
        nnx.Conv(HIDDEN, HIDDEN, (3, 3), feature_group_count=HIDDEN, rngs=rngs),
        nnx.BatchNorm(HIDDEN, rngs=rngs),
        lambda x: nnx.max_pool(x, (2, 2), padding="SAME"),
        nnx.Conv(HIDDEN, CHANNELS, (1, 1), use_bias=False, rngs=rngs),
    ]
    return first, last


class Pair(nnx.Module):
    """A pair of layers as the wrappers take it, run as it is."""

    def __init__(self, parts):
        self.first, self.last = (nnx.Sequential(*part) for part in parts)

    def __call__(self, x):
        return self.last(self.first(x))


def pair(kind):
    return make(lambda rngs: Pair(kind(rngs)))


SHAPES = {linear: (), normed: (3,), strided: (7, 6), mobile: (5, 4)}


def patterns(examples, groups):
    random = np.random.default_rng(0).random((examples, groups)) < 0.5
    one = np.eye(examples, groups)
    return [jnp.asarray(p, jnp.float32) for p in (np.zeros((examples, groups)), np.ones_like(one), one, random)]


# Slices


def test_a_slice_of_a_pair_by_hand():
    model, x = pair(linear), image(3, CHANNELS)
    first, last = list(model.first.layers), list(model.last.layers)
    found, hidden = roles(first, last)
    point = np.asarray(x)
    assert (found, hidden) == (["makes", "each", "takes"], HIDDEN)
    up, up_bias, down, down_bias = (
        np.asarray(p[...]) for p in (first[0].kernel, first[0].bias, last[0].kernel, last[0].bias)
    )
    for pick, chosen in [(span(2, 3), [2, 3, 4]), (pick_groups(jnp.asarray([3, 0]), 4), [6, 7, 0, 1])]:
        layers = [narrow(la, ro, pick, len(chosen)) for la, ro in zip(first + last, found, strict=True)]
        expected = np.maximum(point @ up[:, chosen] + up_bias[chosen], 0) @ down[chosen] + down_bias
        np.testing.assert_allclose(width.run(layers, x), expected, rtol=1e-5, atol=1e-6)
        assert (layers[0].out_features, layers[2].in_features) == (len(chosen), len(chosen))
        plain = narrow(last[0], "takes", pick, len(chosen), bias=False)
        np.testing.assert_allclose(plain(jnp.zeros((1, len(chosen)))), np.zeros((1, 5)))
    assert first[0].out_features == HIDDEN  # a copy


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        (lambda r: [nnx.relu, nnx.Linear(4, 8, rngs=r)], lambda r: nnx.Linear(8, 4, rngs=r), "first must begin with"),
        (lambda r: nnx.Linear(4, 8, rngs=r), lambda r: nnx.relu, "last must have an nnx.Conv or nnx.Linear"),
        (lambda r: nnx.Linear(4, 8, rngs=r), lambda r: nnx.Linear(6, 4, rngs=r), "makes 8 channels and last takes 6"),
        (
            lambda r: [nnx.Linear(4, 8, rngs=r), nnx.LayerNorm(8, rngs=r)],
            lambda r: nnx.Linear(8, 4, rngs=r),
            "LayerNorm stands between the layers that make and take 8 hidden channels.*nnx.relu",
        ),
        (
            lambda r: [nnx.Conv(4, 8, (3, 3), rngs=r), nnx.softmax],
            lambda r: nnx.Conv(8, 4, (3, 3), rngs=r),
            "softmax stands between",
        ),
        (
            lambda r: [nnx.Linear(4, 8, rngs=r), nnx.BatchNorm(6, rngs=r)],
            lambda r: nnx.Linear(8, 4, rngs=r),
            "BatchNorm stands between",
        ),
        (
            lambda r: nnx.Conv(4, 8, (1,), mask=jnp.ones((1, 4, 8)), rngs=r),
            lambda r: nnx.Linear(8, 4, rngs=r),
            "convolution with a mask",
        ),
    ],
    ids=["makes", "takes", "numbers", "norm", "softmax", "batch norm", "mask"],
)
def test_what_cannot_be_sliced_is_refused_by_name(first, last, message):
    for wrapper, kind in ((dj.Channels, "Channels"), (dj.Slimmable, "Slimmable")):
        with pytest.raises(ValueError, match=f"{kind}: .*{message}"):
            make(lambda rngs, wrapper=wrapper: wrapper(first(rngs), last(rngs), dj.FixedGate([[1.0]])))


# Channels


@pytest.mark.parametrize(
    ("kind", "examples"),
    [(linear, 5), (linear, 1), (normed, 5), (strided, 5), (mobile, 1)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_masked_equals_compact(kind, examples):
    model, groups = pair(kind), 4 if kind is linear else 2
    x = image(examples, *SHAPES[kind], CHANNELS)
    run = three_ways(
        lambda x, keep: (dj.Channels(model.first, model.last, channels(keep)), x), x, jnp.zeros((examples, groups))
    )
    for keep in patterns(examples, groups):
        masked, *compact = run(x, keep)
        assert_same(masked, *compact)
        if kind is linear:
            hidden = np.maximum(model.first.layers[0](x), 0) * np.repeat(keep, HIDDEN // groups, 1)
            np.testing.assert_allclose(masked, model.last(jnp.asarray(hidden)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run(x, jnp.ones((examples, groups)))[0], still(model)(x), rtol=1e-5, atol=1e-5)


def channels(keep):
    return dj.FixedGate(keep, rule=EACH)


def gated(rngs, kind=linear, groups=4):
    return dj.Channels(*kind(rngs), dj.ChannelGate(CHANNELS, groups, rngs=rngs))


def test_a_gate_of_its_own_decides_alike_in_both_executions():
    model, x = make(gated), image(9, CHANNELS)

    @jax.jit
    def run(threshold):
        ways = [at(threshold, still(model, way)) for way in ("masked", "compact")]
        return tuple(zip(*(dj.traced(view)(x) for view in ways), strict=True))

    spent = []
    for threshold in (-30.0, -0.3, 0.0, 0.3, 30.0):
        outputs, traces = run(jnp.float32(threshold))
        assert_same(*outputs)
        np.testing.assert_array_equal(*(trace.decisions[""].keep for trace in traces))
        spent.append(np.asarray(traces[0].macs()))
    np.testing.assert_allclose(spent[0], traces[0].full_macs)
    np.testing.assert_allclose(spent[-1], traces[0].static_macs)
    assert all((more >= less).all() for more, less in itertools.pairwise(spent))
    assert len({float(s.sum()) for s in spent}) > 3
    np.testing.assert_allclose(outputs[0], np.broadcast_to(model.last.layers[0].bias, (9, 5)), atol=1e-6)


def test_macs_of_channels():
    model, x = make(lambda rngs: gated(rngs, strided)), image(2, 7, 6, CHANNELS)
    gate = cost.macs(still(model.gate), x[:1])
    trace = dj.traced(still(model))(x)[1]
    decision = trace.decisions[""]
    narrow_pair = nnx.Sequential(
        nnx.Conv(CHANNELS, 2, (3, 3), 2, rngs=nnx.Rngs(0)), nnx.Conv(2, 5, (3, 3), rngs=nnx.Rngs(0))
    )
    assert decision.rule == EACH
    assert decision.cost.unit == (cost.macs(narrow_pair, x[:1]),) * 4
    assert trace.static_macs == gate and trace.full_macs == cost.macs(still(model), x[:1])
    np.testing.assert_allclose(trace.macs(), gate + decision.keep.sum(1) * decision.cost.unit[0])
    # The narrow block of one group, which compact execution runs, is what XLA counts too.
    one = model._slice([*still(model).first.layers, *still(model).last.layers], span(2, 2), 4, 1)
    flops = jax.jit(one).lower(x[:1]).compile().cost_analysis()["flops"]
    assert flops / 2 == pytest.approx(decision.cost.unit[0], rel=0.2)  # XLA counts the elementwise work as well


def test_a_residual_blocks_layers_are_shared():
    block, x = make(blocks.Residual), image(2, 5, 4, CHANNELS)
    model = dj.Channels((block.conv1, block.norm1, nnx.relu), block.conv2, channels(np.ones((1, 2))))
    assert model.first.layers[0].kernel is block.conv1.kernel and model.last.layers[0] is block.conv2
    norm = still(block.norm2)
    np.testing.assert_allclose(nnx.relu(x + norm(still(model)(x))), still(block)(x), rtol=1e-5, atol=1e-5)


def test_gradients_reach_gate_layers_and_input_in_masked_training():
    model = make(lambda rngs: gated(rngs, normed))

    def loss(model, x):
        return (model(x) ** 2).sum()

    mean = model.first.layers[1].mean[...]
    grads, slope = nnx.jit(nnx.grad(loss, argnums=(0, 1)))(model, image(4, 3, CHANNELS))
    named = {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(grads)}
    assert all(np.isfinite(leaf).all() for leaf in named.values()) and np.asarray(slope).any()
    # A norm behind it takes the last bias away again.
    assert all(leaf.any() for path, leaf in named.items() if path != ("last", "layers", 0, "bias"))
    assert len(named) == 5 + 3 + 4
    assert (model.first.layers[1].mean[...] != mean).any()


def test_errors_of_channels():
    parts, x = pair(normed), image(2, 3, CHANNELS)
    with pytest.raises(ValueError, match="3 groups do not divide the 8 hidden channels"):
        dj.Channels(parts.first, parts.last, channels(np.ones((1, 3))))(x)
    with pytest.raises(
        ValueError, match=r"Channels needs a decision per example \(rule: each\) of shape \(2, 3\).*ChannelGate\(4"
    ):
        dj.Channels(parts.first, parts.last, dj.FixedGate(np.ones((1, 2, 3)), size=1))(x)
    with pytest.raises(ValueError, match="Channels around a module that is dynamic already"):
        dj.Channels(dj.Skip(parts, dj.FixedGate([1])), parts.last, dj.FixedGate([[1]]))
    with pytest.raises(ValueError, match="compact execution cannot train: BatchNorm"):
        nnx.view(dj.Channels(parts.first, parts.last, channels([[1]])), execution="compact")(x)
    with pytest.raises(ValueError, match="strategy='fast'"):
        still(dj.Channels(parts.first, parts.last, channels([[1]])), "compact", strategy="fast")(x)


# Slimmable


WIDTHS = (0.25, 0.5, 1.0)


def slim(kind=normed, gate=True, **options):
    def build(rngs):
        own = dj.BranchGate(CHANNELS, len(WIDTHS), rngs=rngs) if gate else None
        return dj.Slimmable(*kind(rngs), own, widths=WIDTHS, **options)

    return make(build)


def test_a_width_is_the_narrower_net():
    model, x = still(slim()), image(3, 3, CHANNELS)
    for number, share in enumerate(WIDTHS):
        channels = round(share * HIDDEN)
        norms = [model.first.layers[1], model.last.layers[1]] if share == 1 else model.norms[number]
        inner, outer = ([np.asarray(getattr(n, name)) for name in ("mean", "var", "scale", "bias")] for n in norms)
        h = np.asarray(x) @ np.asarray(model.first.layers[0].kernel)[:, :channels]
        h = np.maximum((h - inner[0]) / np.sqrt(inner[1] + 1e-5) * inner[2] + inner[3], 0)
        y = h @ np.asarray(model.last.layers[0].kernel)[:channels] + np.asarray(model.last.layers[0].bias)
        y = (y - outer[0]) / np.sqrt(outer[1] + 1e-5) * outer[2] + outer[3]
        view = nnx.view(model, width=share)
        np.testing.assert_allclose(view(x), y, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(still(view, "compact")(x), y, rtol=1e-4, atol=1e-4)
        trace = dj.traced(view)(x)[1]
        assert not trace.decisions and trace.static_macs == 3 * 2 * CHANNELS * channels


@pytest.mark.parametrize(
    ("kind", "examples", "norms"),
    [(normed, 5, "switchable"), (normed, 1, "shared"), (strided, 5, "shared"), (mobile, 1, "switchable")],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_width_for_each_example(kind, examples, norms):
    model, x = slim(kind, norms=norms), image(examples, *SHAPES[kind], CHANNELS)

    def wrap(x, choice):
        view = nnx.clone(model)
        view.gate = dj.FixedGate(choice)
        return view, x

    run = three_ways(wrap, x, jnp.zeros((examples, 3)))
    single = jax.jit(lambda x: [still(model, width=share)(x) for share in WIDTHS])(x)
    for choice in (*([k] * examples for k in range(3)), [2, 0, 1, 1, 0][:examples]):
        masked, *compact = run(x, jax.nn.one_hot(jnp.asarray(choice), 3))
        expected = np.stack(single)[choice, np.arange(examples)]
        np.testing.assert_allclose(masked, expected, rtol=1e-5, atol=1e-5)
        assert_same(masked, *compact)


def test_the_threshold_moves_the_choice_to_the_narrowest():
    model, x = slim(), image(6, 3, CHANNELS)
    run, spent = jax.jit(lambda threshold: dj.traced(at(threshold, still(model)))(x)[1]), []
    for threshold in (-30.0, 0.0, 0.3, 30.0):
        trace = run(jnp.float32(threshold))
        spent.append(np.asarray(trace.macs()))
    unit = np.asarray(trace.decisions[""].cost.unit)
    np.testing.assert_array_equal(unit, 3 * 2 * CHANNELS * np.asarray([2, 4, 8]))
    assert trace.decisions[""].rule == ONE
    gate = cost.macs(still(model.gate), x[:1])
    assert trace.static_macs == gate and trace.full_macs == gate + unit[-1]
    np.testing.assert_allclose(spent[0], trace.full_macs)
    np.testing.assert_allclose(spent[-1], gate + unit[0])
    assert all((more >= less).all() for more, less in itertools.pairwise(spent))


@pytest.mark.parametrize("norms", ["switchable", "shared"])
def test_training_moves_the_statistics_of_its_width(norms):
    model, x = slim(norms=norms), image(6, 3, CHANNELS)
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.BatchStat))
    nnx.view(model, width=0.5)(x)
    after = jax.tree.map(np.asarray, nnx.state(model, nnx.BatchStat))
    moved = {path: a[...] != b[...] for (path, a), (_, b) in
             zip(nnx.to_flat_state(before), nnx.to_flat_state(after), strict=True)}  # fmt: skip
    if norms == "switchable":
        assert all(m.all() if path[:2] == ("norms", 1) else not m.any() for path, m in moved.items())
        return
    for name in ("mean", "var"):
        np.testing.assert_array_equal(moved["first", "layers", 1, name], [True] * 4 + [False] * 4)
        assert moved["last", "layers", 1, name].all()


def test_errors_of_slimmable():
    parts = pair(normed)
    for options, message in [
        (dict(widths=(0.5, 0.25, 1.0)), r"widths=\(0.5, 0.25, 1.0\) must ascend"),
        (dict(widths=(0.25, 0.5)), "end in 1"),
        (dict(widths=()), "must ascend"),
        (dict(norms="none"), "norms"),
    ]:
        with pytest.raises((ValueError, TypeCheckError), match=message):
            dj.Slimmable(parts.first, parts.last, **options)
    model = dj.Slimmable(parts.first, parts.last, dj.FixedGate(np.ones((1, 2))))
    with pytest.raises(ValueError, match=r"width=0.3 has no BatchNorm.*norms='shared' for any"):
        nnx.view(model, width=0.3)
    with pytest.raises(ValueError, match=r"width=1.5 must be in \(0, 1\]"):
        nnx.view(model, width=1.5)
    with pytest.raises(
        ValueError, match=r"Slimmable needs a decision per example \(rule: one\) of shape \(2, 4\).*BranchGate\(4, 4"
    ):
        still(model)(image(2, 3, CHANNELS))
    with pytest.raises(ValueError, match="compact execution cannot train: BatchNorm"):
        nnx.view(model, execution="compact", width=0.5)(image(2, 3, CHANNELS))


# The random control


def test_the_random_gate_of_channels_and_of_branches():
    x = image(64, 3, CHANNELS)
    model = make(lambda rngs: dj.Channels(*linear(rngs), dj.RandomGate(0.4, units=4, rngs=rngs)))
    slimmable = make(lambda rngs: dj.Slimmable(*linear(rngs), dj.RandomGate(0.5, branches=4, rngs=rngs)))

    @jax.jit
    def run(threshold):
        views = [[at(threshold, still(m, way)) for way in ("masked", "compact")] for m in (model, slimmable)]
        keeps = [dj.traced(masked)(x)[1].decisions[""].keep for masked, _ in views]
        return keeps, [[view(x) for view in pair] for pair in views]

    shares = []
    for threshold in (-30.0, -1.0, 0.0, 1.0, 30.0):
        (units, branches), outputs = run(jnp.float32(threshold))
        for output in outputs:
            assert_same(*output)
        np.testing.assert_array_equal(branches.sum(1), 1)
        shares.append((float(units.mean()), float((branches * jnp.arange(4)[None]).sum(1).mean())))
        if threshold == 0:
            assert shares[-1][0] == pytest.approx(0.4, abs=0.1)
            np.testing.assert_allclose(branches.mean(0), 0.25, atol=0.15)
    assert shares[0] == (1, 3) and shares[-1] == (0, 0)
    for share in zip(*shares, strict=True):
        assert list(share) == sorted(share, reverse=True) and len({*share}) == 5
    draws = [np.asarray(nnx.jit(lambda gate, x: gate(x).keep)(model.gate, x)) for _ in range(2)]
    assert draws[0].shape == (64, 4) and (draws[0] != draws[1]).any()
    with pytest.raises(ValueError, match="units=4 are decided per example and alone"):
        dj.RandomGate(0.5, units=4, size=2, rngs=nnx.Rngs(0))
