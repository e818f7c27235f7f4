"""Deployed models meet their budget, say what they came to, and answer as the masked model does."""

import blocks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import CHANNELS, image, make, still
from flax import nnx

import dynjax as dj
from dynjax import budget
from dynjax.core.deploy import Report, Solver
from dynjax.core.views import compact


class Net(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(1, CHANNELS, (3, 3), rngs=rngs)
        self.tiles = dj.Tiles(blocks.Residual(rngs), dj.TileGate(CHANNELS, size=4, rngs=rngs))
        self.skip = dj.Skip(blocks.ConvNeXt(rngs), dj.SampleGate(CHANNELS, rngs=rngs))
        self.head = nnx.Linear(CHANNELS, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.skip(self.tiles(self.stem(x))))


@pytest.fixture(scope="module")
def model():
    return make(Net)


@pytest.fixture(scope="module")
def calibration():
    return [np.asarray(image(6, 12, 16, 1, seed=seed)) * np.linspace(0.1, 3, 6)[:, None, None, None] for seed in (0, 1)]


@pytest.fixture(scope="module")
def solver(model, calibration):
    return Solver(model, calibration)


def test_budgets_are_met_and_the_report_says_what_they_came_to(model, calibration, solver):
    trace = jax.jit(lambda model, x: dj.traced(still(model))(x)[1])
    thresholds = []
    for share in (0.3, 0.5, 0.8, 1.0):
        deployed = solver.deploy(share)
        report = deployed.report
        budget.set_threshold(model, report.threshold)
        traces = [trace(model, x) for x in calibration]
        macs = np.concatenate([t.macs() for t in traces])
        np.testing.assert_allclose(
            [report.mean, report.p95, report.max], [macs.mean(), np.percentile(macs, 95), macs.max()], rtol=1e-5
        )
        assert report.full == traces[0].full_macs and report.budget == share
        assert report.met and report.mean <= share * report.full * (1 + 1e-6)
        thresholds.append(report.threshold)
    assert thresholds == sorted(thresholds, reverse=True) and len({*thresholds}) == 4
    budget.set_threshold(model, 0.0)


def test_a_deployed_model_answers_as_the_masked_one_at_its_threshold(model, calibration, solver):
    deployed = solver.deploy(0.6)
    masked = nnx.clone(still(model))
    budget.set_threshold(masked, deployed.report.threshold)
    run = jax.jit(deployed)
    for x in (calibration[0], calibration[1][:1]):
        expected = jax.jit(lambda x: masked(x))(x)
        np.testing.assert_allclose(run(x), expected, atol=1e-5 * float(jnp.abs(expected).max()))


def test_deploy_neither_changes_nor_shares_the_model(model, calibration):
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.Not(nnx.RngState)))
    deployed = dj.deploy(model, budget=0.6, calibration=iter(calibration[:1]))
    assert model.tiles.execution == "masked" and not model.tiles.gate.logits.deterministic
    inner = deployed.model
    assert inner.tiles.execution == inner.skip.execution == "compact" and inner.tiles.gate.logits.deterministic
    assert inner.tiles.block.norm1.use_running_average and inner.skip.block.drop.deterministic
    deployed.model.head.bias[...] = jnp.full(3, 7.0)
    after = jax.tree.map(np.asarray, nnx.state(model, nnx.Not(nnx.RngState)))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_budget_that_cannot_be_met_says_so(solver):
    report = solver.deploy(0.01).report
    assert not report.met and report.threshold == budget.HIGHEST and report.mean > 0.01 * report.full
    assert str(report).startswith("budget 1% NOT met: mean ")


def test_a_model_without_dynamics():
    model = nnx.Sequential(make(blocks.Pointwise))
    report = dj.deploy(model, 1.0, [image(2, 4, 4, CHANNELS)]).report
    assert report.met and report.mean == report.max == report.full == 16 * CHANNELS**2
    with pytest.raises(ValueError, match="decides nothing"):
        dj.deploy(model, 0.5, [image(2, 4, 4, CHANNELS)])


def test_report_reads_well():
    report = Report(0.5, 0.1, True, 4.8e6, 5.04e6, 7e6, 10e6)
    assert str(report) == "budget 50% met: mean 4.8 MMAC (48.0% of 10.0), p95 5.0, max 7.0"


def test_compact_shares_the_variables(model):
    view = compact(model)
    assert view.head.kernel is model.head.kernel and view.tiles.execution == "compact"


def test_batches_may_be_trees_if_one_says_what_to_do_with_them(model, calibration, solver):
    def run(model, batch):
        return model(batch["image"]) * batch["scale"][:, None, None, None]

    batches = [{"image": x, "scale": np.ones(len(x))} for x in calibration]
    report = dj.deploy(model, 0.6, batches, run=run).report
    assert report == solver.deploy(0.6).report
    with pytest.raises(ValueError, match=r"Net cannot be called with a calibration batch: .*dict.*run="):
        dj.deploy(model, 0.6, batches)
    with pytest.raises(ValueError, match=r"has shape \(0, 12, 16, 1\), so there is nothing in it"):
        dj.deploy(model, 0.6, [{"image": calibration[0][:0]}], run=run)


def test_errors(model, calibration):
    with pytest.raises(ValueError, match="calibration is empty"):
        dj.deploy(model, 0.5, [])
    for share in (0, 1.5):
        with pytest.raises(ValueError, match=f"budget={share} must be in"):
            dj.deploy(model, share, calibration)


def test_what_is_no_list_of_batches():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    x = jnp.ones((3, 2))
    with pytest.raises(ValueError, match=r"one array of shape \(3, 2\): give a list"):
        dj.deploy(model, 0.5, x)
    with pytest.raises(ValueError, match=r"decides nothing"):
        dj.deploy(model, 0.5, [((x,), {})])
    with pytest.raises(ValueError, match=r"Linear cannot be called .* A batch is its one argument, or a whole call"):
        dj.deploy(model, 0.5, [((x,), {"mask": x})])
    with pytest.raises(ValueError, match="has what is neither an array nor a constant"):
        dj.deploy(model, 0.5, [((x,), {"mask": Unhashable()})])


def test_batches_of_different_sizes_give_one_budget_whatever_their_order():
    model = make(lambda rngs: nnx.Sequential(*(dj.Skip(blocks.Pointwise(rngs), gate(rngs)) for _ in range(2))))
    scale = np.linspace(0.1, 3, 6, dtype=np.float32)[:, None, None, None]
    small, large = image(6, 2, 2, CHANNELS) * scale, image(4, 8, 8, CHANNELS, seed=1) * scale[:4]
    solvers = [Solver(model, batches) for batches in ([small, large], [large, small])]
    reports = [solver.deploy(0.5).report for solver in solvers]
    assert reports[0] == reports[1] and reports[0].met
    of_gates = 2 * (CHANNELS * 16 + 16)
    per_size = {side: 2 * side**2 * CHANNELS**2 + of_gates for side in (2, 8)}
    assert reports[0].full == (6 * per_size[2] + 4 * per_size[8]) / 10
    for batches in ([small], [large]):
        assert Solver(model, batches).full == per_size[batches[0].shape[1]]
    with pytest.raises(ValueError, match=r"a calibration batch has shape \(0, 2, 2, 4\), so there is nothing in it"):
        dj.deploy(model, 0.5, [small, small[:0]])


def gate(rngs):
    return dj.SampleGate(CHANNELS, rngs=rngs)


class Biased(nnx.Module):
    """Its first argument is no batch."""

    def __init__(self, rngs):
        self.block = dj.Skip(blocks.Pointwise(rngs), gate(rngs))

    def __call__(self, bias, x):
        return self.block(x) + bias.sum()


def test_the_number_of_examples_is_not_that_of_the_first_array():
    model, x, bias = still(make(Biased)), image(2, 3, 3, CHANNELS), jnp.ones(7)
    trace = dj.traced(model)(bias, x)[1]
    assert trace.examples == 2 and trace.macs().shape == (2,)
    assert trace.full_macs == 9 * CHANNELS**2 + CHANNELS * 16 + 16
    static = make(blocks.Pointwise)
    fn = lambda model, bias, x: model(x) + bias.sum()  # noqa: E731
    with pytest.raises(ValueError, match=r"the number of examples is not clear: .* first axes of 2, 7.*examples=B"):
        dj.traced(fn)(static, bias, x)
    assert dj.traced(fn, examples=2)(static, bias, x)[1].full_macs == 9 * CHANNELS**2
    with pytest.raises(ValueError, match=r"decisions are about 2 .*examples=7.*must be a multiple of the examples"):
        dj.traced(model, examples=7)(bias, x)

    def halves(model, x):
        return model.block(x[:1]), model.block(jnp.repeat(x, 3, 0)[:3])

    with pytest.raises(ValueError, match=r"decisions are about 1, 3 .*'block#1': 3.* first axes of 2"):
        dj.traced(halves)(model, x)


def test_what_is_folded_into_the_batch_is_summed_for_its_example():
    """Frames of a clip, patches of a picture: half of them is half of the clip's work."""

    class Clips(nnx.Module):
        def __init__(self, rngs):
            self.frames, self.clip = (dj.Skip(kind(rngs), First()) for kind in (blocks.Pointwise, Fold))
            self.tiles = dj.Tiles(blocks.Pointwise(rngs), dj.FixedGate(np.ones((6, 1, 2)), size=2))

        def __call__(self, x):
            x = self.tiles(self.frames(x.reshape(6, *x.shape[2:])))
            return self.clip(x.reshape(2, 3, *x.shape[1:]))

    class Fold(nnx.Module):
        def __init__(self, rngs):
            self.block = dj.Skip(blocks.Pointwise(rngs), First())

        def __call__(self, x):
            return self.block(x.reshape(-1, *x.shape[2:])).reshape(x.shape)

    class First(nnx.Module):
        """All frames but the third of every clip."""

        def __call__(self, x):
            keep = (jnp.arange(x.shape[0]) % 3 < 2).astype(jnp.float32)
            return dj.Decision(keep, keep, "example")

    model, x = still(make(Clips)), image(2, 3, 2, 4, CHANNELS)
    model.frames.gate, model.clip.gate = dj.FixedGate([1, 0, 1, 1, 0, 0]), dj.FixedGate([1, 0])
    model.tiles.gate = dj.FixedGate(np.eye(6)[:, :1, None] * np.ones((6, 1, 2)), size=2)
    y, trace = dj.traced(model)(x)
    block = 8 * CHANNELS**2
    assert trace.examples == 2 and (trace.full_macs, trace.static_macs) == ((3 + 3 + 3) * block, 0)
    np.testing.assert_array_equal(trace.macs(), [(2 + 1 + 2) * block, block])
    heat = trace.heatmap((2, 4))
    np.testing.assert_allclose(heat.sum((1, 2)), trace.macs(), rtol=1e-6)
    assert trace.fraction().shape == (2,) and trace.decisions["frames"].keep.shape == (6,)
    np.testing.assert_allclose(still(model, "compact")(x), y, rtol=1e-5, atol=1e-6)


RUNS = []


class Counted(nnx.Module):
    """Counts how often Python runs through it, and takes arguments that are no arrays."""

    def __init__(self, rngs):
        self.block = dj.Skip(blocks.Pointwise(rngs), gate(rngs))

    def __call__(self, x, scale=1, *, double=False, names=(), more=None):
        RUNS.append((type(scale), double))
        y = self.block(x) * scale
        y = y + more["bias"] if more else y
        return {"y": 2 * y if double else y, "x": x.mean()}


def test_a_call_without_jit_is_compiled_once_and_goes_where_it_went():
    model, x = make(Counted), image(3, 2, 2, CHANNELS)
    fast = dj.deploy(model, 1.0, [x])
    RUNS.clear()
    y = fast(x)["y"]
    for _ in range(3):
        np.testing.assert_array_equal(fast(x)["y"], y)
        np.testing.assert_array_equal(fast(np.asarray(x))["y"], y)
    assert len(RUNS) == 1
    # A change of the variables counts without another compilation, and nothing is changed by a call.
    fast.model.block.block.linear.bias[...] += 1.0
    assert (fast(x)["y"] != y).any() and len(RUNS) == 1
    fast.model.block.block.linear.bias[...] -= 1.0
    # Values that are no arrays are constants, told apart by their type.
    for scale, double in ((2, False), (2.0, False), (True, True), (1, True), (2, False)):
        expected = scale * y * (2 if double else 1)
        np.testing.assert_allclose(fast(x, scale, double=double, names=("a",))["y"], expected, rtol=1e-6)
    assert len(RUNS) == 5 and {each for each, _ in RUNS} == {int, float, bool}
    np.testing.assert_allclose(fast(x, more={"bias": jnp.ones((1, 1, 1, CHANNELS))})["y"], y + 1, rtol=1e-6)
    np.testing.assert_allclose(fast(x, names=Unhashable())["y"], y, rtol=1e-6)


class Unhashable:
    __hash__ = None


def test_a_deployed_model_composes():
    model, x = make(Counted), image(3, 2, 2, CHANNELS)
    fast = dj.deploy(model, 1.0, [x])
    y = fast(x)["y"]
    masked = nnx.view(fast, execution="masked")
    for other in (jax.jit(fast), nnx.jit(lambda x: fast(x)), masked, jax.vmap(lambda x: masked(x[None]))):
        np.testing.assert_allclose(other(x)["y"].reshape(y.shape), y, rtol=1e-6)
    assert jax.grad(lambda x: masked(x)["y"].sum())(x).any()
    # Traced without jit it is compiled as well, and its decisions come out.
    RUNS.clear()
    for _ in range(2):
        again, trace = dj.traced(fast)(x)
        np.testing.assert_array_equal(again["y"], y)
        assert list(trace.decisions) == ["model/block"] and trace.full_macs == fast.report.full
    assert len(RUNS) == 1
