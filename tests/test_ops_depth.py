"""Skip and Exits: masked equals compact for every pattern, the right work is left out, and what it cost is counted."""

import blocks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import CHANNELS, at, image, make, still
from flax import nnx
from jaxtyping import TypeCheckError
from test_ops_tiles import Squeeze, assert_same, three_ways

import dynjax as dj
from dynjax import cost
from dynjax.core.decision import PREFIX
from dynjax.core.deploy import Solver

# Skip


class Down(nnx.Module):
    """Half the size and more channels: only with an `otherwise` of the same shape."""

    def __init__(self, rngs: nnx.Rngs, kernel: int = 3):
        self.conv = nnx.Conv(CHANNELS, 6, (kernel, kernel), strides=2, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.conv(x))


@pytest.mark.parametrize("examples", [1, 5])
@pytest.mark.parametrize("kind", [blocks.Residual, blocks.ConvNeXt, Squeeze, Down], ids=lambda kind: kind.__name__)
def test_masked_equals_compact(kind, examples):
    block, x = make(kind), image(examples, 7, 6, CHANNELS)
    otherwise = make(lambda rngs: Down(rngs, kernel=1)) if kind is Down else None

    def wrap(x, keep):
        return dj.Skip(block, dj.FixedGate(keep), otherwise=otherwise), x

    run = three_ways(wrap, x, jnp.zeros(examples))
    everything, nothing = (run(x, jnp.full(examples, value))[0] for value in (1.0, 0.0))
    if kind is not Down:
        np.testing.assert_array_equal(nothing, x)
    for pattern in {(0,) * 5, (1,) * 5, (0, 1, 0, 0, 1), (1, 0, 0, 0, 0), (0, 1, 1, 1, 1)}:
        keep = jnp.asarray(pattern[:examples], jnp.float32)
        masked, *compact = run(x, keep)
        np.testing.assert_array_equal(masked, jnp.where(keep[:, None, None, None] > 0, everything, nothing))
        assert_same(masked, *compact)


def test_a_gate_of_its_own_and_vectors():
    model = make(lambda rngs: dj.Skip(nnx.Linear(CHANNELS, CHANNELS, rngs=rngs), dj.SampleGate(CHANNELS, rngs=rngs)))
    x = image(9, CHANNELS)
    run = jax.jit(lambda threshold: [at(threshold, still(model, way))(x) for way in ("masked", "compact")])
    for threshold in (-30.0, 0.1, 30.0):
        masked, compact = run(jnp.float32(threshold))
        assert_same(masked, compact)
    np.testing.assert_array_equal(compact, x)


def test_gradients_reach_gate_block_and_input_in_masked_training():
    model = make(lambda rngs: dj.Skip(blocks.Residual(rngs), dj.SampleGate(CHANNELS, rngs=rngs)))

    def loss(model, x):
        return (model(x) ** 2).sum()

    grads, slope = nnx.jit(nnx.grad(loss, argnums=(0, 1)))(model, image(4, 5, 5, CHANNELS))
    leaves = [np.asarray(leaf) for leaf in (*jax.tree.leaves(grads), slope)]
    assert len(leaves) == 5 + 6 + 1
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in leaves)


def test_errors_of_skip():
    x, plain = image(2, 7, 6, CHANNELS), make(blocks.Pointwise)
    with pytest.raises(
        ValueError, match=r"Skip needs a decision per example \(rule: each\) of shape \(2,\), its gate gave \(2, 3\)"
    ):
        dj.Skip(plain, dj.FixedGate(np.ones((2, 3))))(x)
    with pytest.raises(ValueError, match=r"gives shape \(2, 4, 3, 6\).*\(2, 7, 6, 4\).*otherwise"):
        dj.Skip(make(Down), dj.FixedGate([1]))(x)
    with pytest.raises(ValueError, match="compact execution cannot train: BatchNorm at 'norm1'"):
        nnx.view(dj.Skip(make(blocks.Residual), dj.FixedGate([1])), execution="compact")(x)


# Exits per example


class Head(nnx.Module):
    def __init__(self, features: int, rngs: nnx.Rngs):
        self.linear = nnx.Linear(features, 3, rngs=rngs)

    def __call__(self, x):
        return 4 * self.linear(x.mean((1, 2)))


def classifier(rngs, **options):
    stages = [blocks.Residual(rngs), Down(rngs), blocks.Residual(rngs, channels=6)]
    return dj.Exits(stages, [Head(features, rngs) for features in (CHANNELS, 6, 6)], **(dict(at=0.6) | options))


class Scales(nnx.Module):
    """A stage of two scales, each a convolution, the coarse one of both."""

    def __init__(self, rngs: nnx.Rngs):
        self.fine = nnx.Conv(CHANNELS, CHANNELS, (3, 3), rngs=rngs)
        self.coarse = Down(rngs)

    def __call__(self, x):
        x = x if isinstance(x, dict) else {"fine": x, "coarse": 0.0}
        return {"fine": nnx.relu(self.fine(x["fine"])), "coarse": self.coarse(x["fine"]) + x["coarse"]}


class CoarseHead(Head):
    def __call__(self, x):
        return super().__call__(x["coarse"])


def multi_scale(rngs, **options):
    return dj.Exits([Scales(rngs) for _ in range(4)], [CoarseHead(6, rngs) for _ in range(4)], **options)


def doubts(predictions, confidence, at, patience=1):
    """Of every head but the last, and the largest probability, in NumPy."""
    p = np.exp(predictions - predictions.max(-1, keepdims=True))
    sure = np.clip((p / p.sum(-1, keepdims=True)).max(-1), 1e-6, 1 - 1e-6)
    if confidence == "patience":
        labels, agreed = predictions.argmax(-1), np.zeros(sure.shape)
        for k in range(1, len(labels)):
            agreed[k] = (agreed[k - 1] + 1) * (labels[k] == labels[k - 1])
        return patience - agreed[:-1] - sure[:-1]
    if confidence == "random":
        sure = np.mod(97 * predictions.mean(-1), 1)
    return (np.log((1 - sure) / sure) - np.log((1 - at) / at))[:-1]


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (classifier, dict(confidence="max_prob", at=0.6)),
        (multi_scale, dict(confidence="random", at=0.4)),
        (multi_scale, dict(confidence="patience", patience=2, at=0.9)),
    ],
    ids=["max_prob", "random of trees", "patience of trees"],
)
def test_exits_stop_the_examples_that_a_head_is_sure_about(build, options):
    model, x = make(lambda rngs: build(rngs, **options)), 2 * image(8, 8, 8, CHANNELS)
    run = three_ways(lambda threshold, x: (at(threshold, model), x), jnp.zeros(()), x)
    trace = jax.jit(lambda threshold, x: dj.traced(at(threshold, still(model)))(x)[1])
    predictions = np.stack(jax.jit(lambda x: still(model).predictions(x))(x))
    doubt, stages = doubts(predictions, **options), set()
    between = np.sort(doubt.ravel())
    between = (between[1:] + between[:-1])[[2, doubt.size // 2, doubt.size - 4]] / 2
    spent = []
    for threshold in (-30.0, *between, 30.0):
        runs = np.cumprod(np.concatenate([np.ones((1, 8)), doubt >= threshold]), 0).astype(bool)
        last = runs.sum(0) - 1
        stages |= set(last)
        masked, *compact = run(jnp.float32(threshold), x)
        np.testing.assert_allclose(masked, predictions[last, np.arange(8)], rtol=1e-5, atol=1e-5)
        assert_same(masked, *compact)
        (decision,) = trace(jnp.float32(threshold), x).decisions.values()
        assert (decision.place, decision.rule) == ("example", PREFIX)
        np.testing.assert_array_equal(decision.keep, runs.T)
        spent.append(float(decision.macs().sum()))
    assert stages >= {0, len(model.stages) - 1} and len(stages) > 2
    assert spent == sorted(spent, reverse=True)


def test_patience_at_threshold_0_is_that_of_the_paper():
    """Labels by hand: the third head is the first to agree, so patience 1 stops after it, and 2 after the fourth."""
    labels = jnp.asarray([[0, 1, 1, 1, 2], [2, 2, 0, 1, 1], [0, 0, 0, 0, 0]])
    stages = [lambda x: x, *[lambda x: x] * 4]
    heads = [lambda x, k=k: jax.nn.one_hot(x[:, k], 3) * (20.0 + k) for k in range(5)]
    for patience, runs in [(1, [3, 2, 2]), (2, [4, 5, 3]), (4, [5, 5, 5])]:
        model = still(dj.Exits(stages, heads, confidence="patience", patience=patience))
        run = jax.jit(lambda x, threshold, model=model: dj.traced(at(threshold, model))(x))
        logits, trace = run(labels, 0.0)
        np.testing.assert_array_equal(trace.decisions[""].keep.sum(-1), runs)
        np.testing.assert_array_equal(logits.max(-1), 20 + np.asarray(runs) - 1)
        np.testing.assert_array_equal(trace.decisions[""].keep[:, 0], 1)
        assert (run(labels, 30.0)[1].decisions[""].keep.sum(-1) == 1).all()
        assert (run(labels, -30.0)[1].decisions[""].keep.sum(-1) == 5).all()


def test_random_exits_take_their_rate_and_no_gradient():
    model = dj.Exits([lambda x: x] * 2, [lambda x: x] * 2, confidence="random", at=0.3)
    logits = image(4000, 3)
    kept = dj.traced(still(model))(logits)[1].decisions[""]
    assert abs(float(kept.keep[:, 1].mean()) - 0.3) < 0.03
    np.testing.assert_allclose(kept.probability[:, 1], 0.3, rtol=1e-5)
    assert not jax.grad(lambda x: model.doubt(x).sum())(logits).any()


def test_macs_of_exits():
    model, x = make(classifier), image(2, 8, 8, CHANNELS)
    run = jax.jit(lambda x, threshold: dj.traced(at(threshold, still(model)))(x)[1])
    trace = run(x, 30.0)
    first = 2 * cost.macs(nnx.Conv(CHANNELS, CHANNELS, (3, 3), rngs=nnx.Rngs(0)), x[:1]) + 3 * CHANNELS
    np.testing.assert_allclose(trace.macs(), [first] * 2)
    everything = sum(cost.macs(still(part), value) for part, value in [
        (model.stages[0], x[:1]), (model.stages[1], x[:1]), (model.stages[2], image(1, 4, 4, 6)),
        (model.heads[0], x[:1]), (model.heads[1], image(1, 4, 4, 6)), (model.heads[2], image(1, 4, 4, 6)),
    ])  # fmt: skip
    assert trace.full_macs == everything and trace.static_macs == 0
    np.testing.assert_allclose(run(x, -30.0).macs(), [everything] * 2)


def test_while_training_everything_is_run():
    model, x = make(classifier), image(2, 8, 8, CHANNELS)
    view = nnx.view(at(30.0, model), deterministic=False, use_running_average=True)
    y, trace = dj.traced(view)(x)
    np.testing.assert_array_equal(y, view.predictions(x)[-1])
    (decision,) = trace.decisions.values()
    np.testing.assert_array_equal(decision.keep, np.ones((2, 3)))


def test_doubt_is_the_logit_of_one_minus_the_confidence():
    logits = jnp.log(jnp.asarray([[0.6, 0.3, 0.1], [0.9, 0.05, 0.05], [1 / 3, 1 / 3, 1 / 3]]))

    def doubt(confidence):
        return dj.Exits([lambda x: x], [lambda x: x], confidence=confidence, at=0.9).doubt(logits)

    sure = np.asarray([0.6, 0.9, 1 / 3])
    np.testing.assert_allclose(doubt("max_prob"), np.log((1 - sure) / sure) + np.log(0.9 / 0.1), atol=1e-5)
    p = np.exp(np.asarray(logits[:2]))
    sure = 1 + (p * np.log(p)).sum(-1) / np.log(3)
    np.testing.assert_allclose(doubt("entropy")[:2], np.log((1 - sure) / sure) + np.log(0.9 / 0.1), atol=1e-5)
    assert doubt("entropy")[2] > 10


def test_dense_predictions_per_example_take_the_mean_of_the_pixels():
    logits = jnp.log(jnp.asarray([[[[0.5, 0.5], [0.9, 0.1]]]]))
    doubt = dj.Exits([lambda x: x], [lambda x: x], at=0.7).doubt(logits)
    np.testing.assert_allclose(doubt, [0.0], atol=1e-5)


# Exits per tile


def dense(rngs):
    stages = [nnx.Conv(CHANNELS, CHANNELS, (3, 3), strides=2, rngs=rngs), blocks.Residual(rngs), blocks.Biased(rngs)]
    heads = [nnx.Conv(CHANNELS, 3, (side, side), rngs=rngs) for side in (1, 1, 3)]
    return dj.Exits(stages, heads, at=0.5, size=4)


def test_tiles_stop_where_a_head_is_sure():
    model, x = make(dense), 2 * image(2, 18, 26, CHANNELS)
    run = three_ways(lambda threshold, x: (at(threshold, model), x), jnp.zeros(()), x)
    trace = jax.jit(lambda threshold, x: dj.traced(at(threshold, still(model)))(x)[1])
    last = jax.jit(lambda x: still(model).predictions(x)[-1])(x)
    shares = []
    for threshold in (-30.0, -0.4, 0.0, 0.4, 30.0):
        masked, *compact = run(jnp.float32(threshold), x)
        assert_same(masked, *compact)
        decision = trace(jnp.float32(threshold), x).decisions[""]
        assert (decision.place, decision.rule) == ("tile", PREFIX) and decision.keep.shape == (2, 3, 4, 3)
        assert (jnp.diff(decision.keep) <= 0).all() and (decision.keep[..., 0] == 1).all()
        shares.append(float(decision.keep[..., 1:].mean()))
        if threshold == -30:
            np.testing.assert_allclose(masked, last, rtol=1e-5, atol=1e-5)
    assert shares == sorted(shares, reverse=True) and shares[0] == 1 and shares[-1] == 0
    assert len({*shares}) > 2
    total = trace(jnp.float32(0.0), x)
    np.testing.assert_allclose(total.heatmap((18, 26)).sum((1, 2)), total.macs(), rtol=1e-5)


def test_errors_of_exits():
    stage, head = make(blocks.Pointwise), make(lambda rngs: nnx.Linear(CHANNELS, 3, rngs=rngs))
    for build, message in [
        (lambda: dj.Exits([stage, stage], [head]), "there are 2 stages and 1 heads"),
        (lambda: dj.Exits([], []), "there are 0 stages"),
        (lambda: dj.Exits([stage], [head], at=1.0), "at=1.0"),
        (lambda: dj.Exits([stage], [head], size=0), "size=0"),
        (
            lambda: dj.Exits([stage] * 3, [head] * 3, confidence="patience", patience=3),
            "patience=3 .* number of heads, 3",
        ),
        (lambda: dj.Exits([stage] * 3, [head] * 3, confidence="patience", size=4), "per example, so size=4"),
        (
            lambda: dj.Exits([dj.Skip(stage, dj.FixedGate([1]))], [head], size=4),
            "Exits per tile around a module that is dynamic already",
        ),
    ]:
        with pytest.raises((ValueError, TypeCheckError), match=message):  # the latter where types are checked first
            build()
    with pytest.raises(ValueError, match=r"patience' needs logits \(B, K\) .* give \(1, 8, 8, 3\)"):
        dj.Exits([stage, stage], [head, head], confidence="patience")(image(1, 8, 8, CHANNELS))
    model = dj.Exits([stage, make(Down)], [head, head], size=4)
    with pytest.raises(ValueError, match="Down cannot be run on tiles: it turns a map of 32x32 pixels into 16x16"):
        model(image(1, 8, 8, CHANNELS))


# Heads that are very sure


def heads_alone(**options):
    return still(dj.Exits([lambda x: x, nnx.Linear(2, 2, rngs=nnx.Rngs(0))], [lambda x: x] * 2, **options))


def test_doubt_of_heads_that_are_very_sure():
    """The logit of 1 - p is logsumexp of the others minus the largest, here minus the difference; 0.1 has -2.197."""
    gaps = np.array([14.0, 16, 20, 60, 300])
    logits = jnp.stack([jnp.asarray(gaps, jnp.float32), jnp.zeros(5)], 1)
    found = jax.jit(heads_alone().doubt)(logits)
    np.testing.assert_allclose(found[:4], [-11.803, -13.803, -17.803, -57.803], atol=1e-3)
    np.testing.assert_allclose(found, -gaps + np.log(9), rtol=1e-5)
    # H = sum of -p log p in nats, of log 2; far off it is (gap + 1) exp(-gap).
    share = np.log1p(gaps) - gaps - np.log(np.log(2))
    np.testing.assert_allclose(jax.jit(heads_alone(confidence="entropy").doubt)(logits), share + np.log(9), rtol=1e-4)
    # Of several pixels 1 - p is averaged, per picture or per tile of two.
    pixels = logits[jnp.array([1, 2, 3, 3])].reshape(1, 2, 2, 2)
    rows = [np.log((np.exp(-16.0) + np.exp(-20.0)) / 2), -60.0]
    found = jax.jit(heads_alone(confidence="max_prob").doubt)(pixels)
    np.testing.assert_allclose(found, rows[0] - np.log(2) + np.log(9), rtol=1e-5)
    wide = jnp.repeat(pixels, 2, 1)  # 4 rows
    found = jax.jit(heads_alone(size=2).doubt)(wide)[0, :, 0]
    np.testing.assert_allclose(found, np.array(rows) + np.log(9), rtol=1e-5)
    assert np.isfinite(jax.jit(jax.grad(lambda x: heads_alone(confidence="entropy").doubt(x).sum()))(logits)).all()


def test_a_budget_is_met_among_heads_that_are_very_sure():
    x = jnp.stack([jnp.linspace(20, 60, 64), jnp.zeros(64)], 1)
    solver = Solver(heads_alone(), [x])
    for budget in (0.25, 0.5, 0.985, 1.0):
        assert budget - 0.02 < solver.deploy(budget).report.mean / solver.full <= budget
