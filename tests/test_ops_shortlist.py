"""Shortlists of classes: what is computed for them alone equals the layer, and costs as much as they are long."""

import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from blocks import CHANNELS, at, call, image, make, still
from flax import nnx
from jaxtyping import TypeCheckError
from test_ops_tiles import assert_same

import dynjax as dj
from dynjax import budget, cost, execute
from dynjax.core.decision import EACH
from dynjax.models import blocks
from dynjax.ops import shortlist
from dynjax.ops.shortlist import ABSENT, PresenceGate, Shortlist, presence_loss
from dynjax.tasks import losses

KINDS = 21
SIZE = (9, 11)


def classify(sharp, classes=KINDS):
    return make(lambda rngs: blocks.Classify(CHANNELS, classes, 2, sharp, rngs=rngs))


def listed(layer, keep):
    """`layer` with its decision given."""
    layer = nnx.clone(layer)
    layer.linear = Shortlist(layer.linear, dj.FixedGate(keep, rule=EACH), layer.classes)
    return layer


def patterns(examples):
    random, one = np.random.default_rng(0).random((4, examples, KINDS)), np.eye(examples, KINDS, KINDS - examples)
    keeps = [np.zeros((examples, KINDS)), np.ones((examples, KINDS)), one, random[0] < 0.3, random[1] < 0.8]
    return [jnp.asarray(keep, jnp.float32) for keep in keeps]


@pytest.mark.parametrize("examples", [1, 3])
@pytest.mark.parametrize("sharp", [True, False], ids=["sharp", "interpolated"])
@pytest.mark.parametrize("block", [4, 64])
def test_masked_equals_compact(sharp, examples, block):
    """Blocks that do not divide the classes, or hold them all; sizes that the map does not divide."""
    layer, x = classify(sharp), image(examples, 5, 6, CHANNELS)

    def run(x, keep):
        model, found = listed(layer, keep), []
        for ways in (dict(), *(dict(execution="compact", strategy=name) for name in ("loop", "buckets"))):
            view = still(model, **ways)
            found.append((view(x, SIZE), view.largest(x, SIZE)))
        return found

    patched = mock.patch.multiple(shortlist, BREAK_EVEN=2.0, BLOCK=block)
    with patched, mock.patch.multiple(execute, CAPACITIES=(0.1, 0.7)):
        run = jax.jit(run).lower(x, jnp.zeros((examples, KINDS))).compile()
    dense = layer(x, SIZE)
    for keep in patterns(examples):
        (masked, chosen), *compact = run(x, keep)
        first = keep.at[:, 0].max((keep.sum(1) == 0).astype(keep.dtype))  # nothing kept: the first of equals
        expected = np.where(np.asarray(first)[:, None, None], dense, ABSENT)
        np.testing.assert_allclose(masked, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(chosen, expected.argmax(-1))
        for logits, largest in compact:
            assert logits.dtype == masked.dtype
            np.testing.assert_allclose(logits, masked, rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(largest, chosen)


@pytest.mark.parametrize("sharp", [True, False], ids=["sharp", "interpolated"])
def test_all_classes_are_the_layer_itself(sharp):
    layer, x = classify(sharp), image(2, 5, 6, CHANNELS)
    model = listed(layer, np.ones((1, KINDS)))

    @jax.jit
    def run(x):
        return layer(x, SIZE), layer.largest(x, SIZE), *(still(model, way)(x, SIZE) for way in ("masked", "compact"))

    dense, largest, masked, compact = run(x)
    np.testing.assert_array_equal(dense, masked)
    np.testing.assert_array_equal(dense, compact)
    np.testing.assert_array_equal(largest, dense.argmax(-1))


def test_the_first_of_equals_is_the_largest_in_other_blocks_too():
    layer, x = make(lambda rngs: nnx.Linear(CHANNELS, 70, rngs=rngs)), image(3, CHANNELS)
    layer.kernel[...], layer.bias[...] = jnp.zeros((CHANNELS, 70)), jnp.zeros(70).at[jnp.asarray([7, 40, 69])].set(1.0)
    np.testing.assert_array_equal(shortlist.largest(layer, x, 70), [7, 7, 7])
    keep = jnp.ones((3, 70), bool).at[1, 7].set(False).at[2, :41].set(False)
    np.testing.assert_array_equal(shortlist.largest(layer, x, 70, keep=keep), [7, 40, 69])


def gated(rngs, classes=KINDS):
    return Shortlist(nnx.Linear(CHANNELS, classes, rngs=rngs), PresenceGate(CHANNELS, classes, rngs=rngs), classes)


def test_a_gate_of_its_own_decides_alike_in_both_executions():
    model, x = make(gated), image(4, 5, 3, CHANNELS)

    @jax.jit
    def run(threshold):
        ways = [at(threshold, still(model, way)) for way in ("masked", "compact")]
        return tuple(zip(*(dj.traced(view)(x) for view in ways), strict=True))

    kept = []
    for threshold in (budget.LOWEST, -0.5, 0.0, 0.5, budget.HIGHEST):
        outputs, traces = run(jnp.float32(threshold))
        assert_same(*outputs)
        np.testing.assert_array_equal(*(trace.decisions[""].keep for trace in traces))
        kept.append(np.asarray(traces[0].decisions[""].keep.sum(1)))
        np.testing.assert_allclose(*(trace.macs() for trace in traces))
    assert (kept[0] == KINDS).all() and (kept[-1] == 1).all()
    assert all((more >= less).all() for more, less in itertools.pairwise(kept)) and 1 < kept[2].mean() < KINDS
    gone = np.asarray(outputs[0]).max((1, 2)) == ABSENT
    assert (gone.sum(-1) == KINDS - 1).all()
    np.testing.assert_array_equal(~gone, np.asarray(traces[0].decisions[""].keep) > 0.5)


def test_macs_are_those_of_the_classes_kept():
    layer, x = classify(True), image(2, 5, 6, CHANNELS)
    keep = np.zeros((2, KINDS))
    keep[0, :3] = keep[1, 5:12] = 1
    model = listed(layer, keep)
    one = 5 * 6 * CHANNELS * 4
    for run in (lambda model, x: model(x, SIZE), lambda model, x: model.largest(x, SIZE)):
        trace = dj.traced(run)(still(model), x)[1]
        np.testing.assert_allclose(trace.macs(), [3 * one, 7 * one])
        assert trace.static_macs == 0 and trace.full_macs == KINDS * one == cost.macs(run, still(layer), x[:1])
    few = make(lambda rngs: nnx.Linear(CHANNELS, 4, rngs=rngs))
    flops = jax.jit(few).lower(x[:1]).compile().cost_analysis()["flops"]
    assert flops / 2 == pytest.approx(one, rel=0.2)  # XLA counts the bias as well


def test_a_budget_is_met_by_the_threshold():
    model, x = make(gated), image(8, 5, 3, CHANNELS)
    fast = dj.deploy(model, budget=0.9, calibration=[x])
    assert fast.report.met
    np.testing.assert_array_equal(
        dj.deploy(model, budget=0.9, calibration=[x], method="largest")(x), fast(x).argmax(-1)
    )


def test_training_keeps_all_and_the_gate_learns_what_is_there():
    """The classes of a picture are told by which of its channels are large."""
    model = nnx.view(make(lambda rngs: gated(rngs, CHANNELS)), deterministic=False)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    rule = optax.adam(1e-2)

    def loss(params, x):
        model, present = nnx.merge(graphdef, params, rest, copy=True), x.max((1, 2)) > 1
        logits, trace = dj.traced(model)(x)
        term = model.terms(call(trace, present=lambda: present))["presence"]
        return term, ((logits > ABSENT).all(), trace.fraction().mean())

    @jax.jit
    def step(params, state, key):
        x = jnp.where(jax.random.bernoulli(key, 0.3, (32, 1, 1, CHANNELS)), 2.0, 0.1)
        x = x * jax.random.uniform(key, (32, 3, 4, CHANNELS), minval=0.6)
        (term, kept), slope = jax.value_and_grad(loss, has_aux=True)(params, x)
        updates, state = rule.update(slope, state, params)
        return optax.apply_updates(params, updates), state, term, kept

    state, terms = rule.init(params), []
    for number in range(150):
        params, state, term, (all_kept, fraction) = step(params, state, jax.random.key(number))
        terms.append(float(term))
        assert all_kept and fraction == 1
    assert np.mean(terms[-10:]) < 0.4 * np.mean(terms[:3])


def test_who_has_nothing_to_learn_adds_no_term():
    x = image(2, 5, 3, CHANNELS)
    trace = dj.traced(still(make(gated)))(x)[1]
    assert make(gated).terms(call(trace)) == {}
    random = Shortlist(make(gated).layer, dj.RandomGate(0.5, units=KINDS, rngs=nnx.Rngs(0)), KINDS)
    assert random.terms(call(trace, present=lambda: jnp.ones((2, KINDS), bool))) == {}
    sure = presence_loss(jnp.asarray([[1.0, 0.0]]), jnp.asarray([[False, True]]))
    assert np.isfinite(sure).all() and sure[0] > 80


def test_in_half_precision():
    graphdef, state = nnx.split(still(make(gated)))
    state = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf, state)
    model, x = nnx.merge(graphdef, state), image(2, 5, 3, CHANNELS).astype(jnp.bfloat16)
    masked, compact = jax.jit(lambda x: [still(model, way)(x) for way in ("masked", "compact")])(x)
    assert masked.dtype == compact.dtype == jnp.bfloat16
    np.testing.assert_allclose(masked.astype(jnp.float32), compact.astype(jnp.float32), rtol=2e-2, atol=2e-2)
    assert jnp.isfinite(jax.nn.log_softmax(masked)).all()


@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.focal, losses.binary_cross_entropy, losses.soft_dice])
def test_losses_of_absent_classes_are_finite(loss):
    """Also where the class of every pixel is absent, and one against all."""
    mask = jnp.zeros((1, 2, 3), jnp.int32)
    for dtype in (jnp.float32, jnp.bfloat16):
        logits = jnp.full((1, 2, 3, 1000), ABSENT, dtype).at[..., 5].set(1)
        assert jnp.isfinite(loss(logits, mask)) and jnp.isfinite(jax.grad(loss)(logits, mask)).all()


def test_errors():
    linear, x = nnx.Linear(CHANNELS, 10, rngs=nnx.Rngs(0)), image(2, 3, CHANNELS)
    gate = dj.FixedGate(np.ones((1, 5)), rule=EACH)
    for layer, classes, message in [
        (linear, 4, "for 4 classes, no layer of 10 outputs"),
        (nnx.relu, 4, "parameter 'layer'"),
        (linear, 0, "classes=0"),
    ]:
        with pytest.raises((ValueError, TypeCheckError), match=message):
            Shortlist(layer, gate, classes)
    with pytest.raises(ValueError, match=r"Shortlist needs a decision per example .* of shape \(2, 10\).*PresenceGate"):
        Shortlist(linear, gate, 10)(x)
    with pytest.raises(ValueError, match="PresenceGate was made for features=6, but its input"):
        PresenceGate(6, 5, rngs=nnx.Rngs(0))(x)
    with pytest.raises(ValueError, match=r"PresenceGate needs a map .* not \(2, 3, 4\)"):
        PresenceGate(CHANNELS, 5, rngs=nnx.Rngs(0))(x)
