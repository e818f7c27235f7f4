import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from made import Made

import dynjax as dj
from dynjax.config import LossConfig, UserError
from dynjax.data import make_loader
from dynjax.data.source import picture_spec, read, stack
from dynjax.run.evaluate import alternate, evaluate, make_runner, score, shown, solve, static_macs, steers
from dynjax.show import report
from dynjax.show.curve import Point, curve_table, read_curve
from dynjax.show.report import write_points
from dynjax.tasks.segmentation import SegmentationTask

pytestmark = pytest.mark.xdist_group("evaluate")

TASK = SegmentationTask(("a", "b", "c"), losses=LossConfig())


class Net(nnx.Module):
    """Logits are those of a convolution plus what a tiled block adds."""

    def __init__(self, *, adaptive: bool, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.block = nnx.Conv(8, 8, (3, 3), rngs=rngs)
        self.head = nnx.Conv(8, 3, (1, 1), rngs=rngs)
        if adaptive:
            self.block = dj.Tiles(self.block, dj.TileGate(8, size=4, rngs=rngs))

    def __call__(self, x):
        return self.head(nnx.relu(self.block(nnx.relu(self.stem(x / 127.5 - 1)))))


def source() -> Made:
    """Seven pictures; the label of the third and the columns on the right are ignored under another name."""

    def example(index):
        rng = np.random.default_rng(index)
        image = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        image[:, : 2 * index] = 0
        mask = (image[..., 0] // 86).astype(np.int32)
        mask[:, 12:] = 9
        return {"image": image, "mask": mask}

    return Made(7, picture_spec((16, 16), "mask", ignored=9), example)


def batches(size=4):
    return lambda: make_loader(source(), size, seed=0, augment=None, shuffle=False, repeat=False)


def pictures(number):
    return stack([read(source(), index) for index in range(number)])


@pytest.fixture(scope="module")
def found():
    model, twin = (Net(adaptive=adaptive, rngs=nnx.Rngs(0)) for adaptive in (True, False))
    return evaluate(
        nnx.view(model, deterministic=True, execution="masked", raise_if_not_found=False),
        twin,
        TASK,
        static=False,
        budgets=(0.6, 1.0),
        calibration=[pictures(7)],
        batches=batches(),
        timing=[[pictures(1), pictures(1)], [pictures(3)]],
    )


def test_score_is_that_of_the_whole_split_without_what_fills_the_last_batch_up():
    model = Net(adaptive=False, rngs=nnx.Rngs(1))
    got = score(make_runner(model, TASK), nnx.state(model), batches(4)(), TASK)
    hits, union = np.zeros(3), np.zeros(3)
    for index in range(7):
        example = source()[index]
        prediction = np.asarray(model(jnp.asarray(example["image"][None]))).argmax(-1)[0][:, :12]
        truth = example["mask"][:, :12]
        for c in range(3):
            hits[c] += ((prediction == c) & (truth == c)).sum()
            union[c] += ((prediction == c) | (truth == c)).sum()
    assert got.scores["miou"] == pytest.approx(np.mean(hits / union))
    assert got.macs.shape == (7,)
    assert got.shares == {}


def test_a_point_is_what_its_deployed_model_spends(found):
    low, full = found.points
    assert (low.budget, full.budget) == (0.6, 1.0)
    macs = found.scored[0.6].macs
    assert len(macs) == low.images == 7
    assert low.macs == pytest.approx(macs.mean()) and low.macs_max == pytest.approx(macs.max())
    # By hand, on 16x16 pixels: 3 * 16 - 2 taps of a 3-wide kernel lie inside a row of 16.
    assert low.static_macs == (3 * 16 - 2) ** 2 * (3 * 8 + 8 * 8) + 16 * 16 * 8 * 3
    assert low.macs_fraction == pytest.approx(low.macs / low.static_macs)
    assert low.met and full.met
    # The calibration pictures are those of the split here, so the mean meets the budget on the split too.
    assert low.macs_fraction <= 0.6 < full.macs_fraction <= 1.0
    assert 0 < found.scored[0.6].shares["block"]["kept"] < found.scored[1.0].shares["block"]["kept"]


def test_latency_columns_agree(found):
    for point in found.points:
        assert point.latency_ms_p95 >= point.latency_ms_p50 > 0
        assert point.speedup == pytest.approx(point.static_latency_ms_p50 / point.latency_ms_p50)
    assert found.points[0].static_latency_ms_p50 == found.points[1].static_latency_ms_p50


def test_the_share_of_the_machine_is_known(found):
    assert 0 < found.cores < 1000


def test_every_budget_runs_the_same_compiled_program(found):
    assert found.runner.infer._cache_size() == 2  # one for each batch size that is timed
    assert found.runner.examine._cache_size() == 1


def test_the_scored_model_skips(found):
    batch = pictures(1)
    text = found.runner.infer.lower(found.states[0.6], batch).as_text()
    assert "while" in text  # the dynamic trip count of the compact executor
    masked = nnx.view(
        nnx.merge(nnx.graphdef(found.model), found.states[0.6]), execution="masked", raise_if_not_found=False
    )
    ran = found.runner.infer(found.states[0.6], batch)
    np.testing.assert_allclose(ran, masked(jnp.asarray(batch["image"])), rtol=1e-5, atol=1e-6)


def test_examples_are_the_fewest_the_median_and_the_most_macs(found, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "plot_heatmaps", lambda path, examples, **more: drawn.extend(examples))
    seen = shown(found, 0.6, source(), source(), lambda _: batches()(), title="t", twin=None, batch_size=4)
    assert "heatmaps.png" in TASK.show(tmp_path, seen)
    macs = np.sort(found.scored[0.6].macs)
    assert [example.name for example in drawn] == ["easiest", "median", "hardest"]
    np.testing.assert_allclose([example.macs for example in drawn], [macs[0], macs[3], macs[6]])
    for example in drawn:
        assert example.heat.sum() == pytest.approx(example.macs, rel=1e-4)
        assert set(np.unique(example.mask)) <= {-1, 0, 1, 2} and (example.mask[:, 12:] == -1).all()
        assert set(np.unique(example.prediction)) <= {0, 1, 2}
    assert {path.name for path in (tmp_path / "examples").iterdir()} == {"easiest.png", "median.png", "hardest.png"}
    assert found.runner.examine._cache_size() == 1


def test_a_budget_is_a_share_of_the_static_twin(found):
    model, twin = (Net(adaptive=adaptive, rngs=nnx.Rngs(0)) for adaptive in (True, False))
    whole = static_macs(twin, jax.ShapeDtypeStruct((5, 16, 16, 3), jnp.uint8))
    assert steers(model) and not steers(twin)
    image = np.stack([source()[i]["image"] for i in range(7)])
    report = solve(model, whole, [1.0], [image])[1.0].report
    assert report.full > whole  # the gate has a cost
    assert report.mean <= whole and report.met
    least = solve(model, whole, [0.01], [image])[0.01].report
    assert not least.met and least.mean > 0.01 * whole


def test_a_static_model_is_its_own_twin():
    model = Net(adaptive=False, rngs=nnx.Rngs(0))
    found = evaluate(
        model,
        model,
        TASK,
        static=True,
        budgets=(0.5,),
        calibration=[],
        batches=batches(),
        timing=[[pictures(1)]],
    )
    (point,) = found.points
    assert (point.budget, point.macs_fraction, point.speedup, point.met) == (1.0, 1.0, 1.0, True)


class Untimed(SegmentationTask):
    """Of labels that the model is told: what is derived from a batch is no work of the model's."""

    timed = ()

    def prepare(self, model, batch):
        return {**batch, "told": model.head(model.head.kernel[...].sum() * jnp.ones((len(batch["image"]), 16, 16, 8)))}

    def infer(self, model, batch):
        return model(batch["image"]) + batch["told"]


def test_a_task_that_is_not_timed_has_no_latency_and_what_it_prepares_costs_nothing():
    model, twin = (Net(adaptive=adaptive, rngs=nnx.Rngs(0)) for adaptive in (True, False))
    model = nnx.view(model, deterministic=True, execution="masked", raise_if_not_found=False)
    task = Untimed(("a", "b", "c"), losses=LossConfig())
    found = evaluate(
        model, twin, task, static=False, budgets=(0.8,), calibration=[pictures(7)], batches=batches(), timing=[]
    )
    (only,) = found.points
    assert only.static_macs == static_macs(twin, jnp.zeros((1, 16, 16, 3), jnp.uint8))
    assert np.isnan([only.latency_ms_p50, only.latency_ms_p95, only.speedup, found.cores]).all()
    assert only.met and 0 < only.macs_fraction <= 0.8 and not found.latencies
    header = curve_table(found.points).splitlines()[0].split()
    assert "MMAC/image" in header and "p50" not in header and "speed-up" not in header


def test_alternate_takes_the_functions_in_turn():
    calls = []
    functions = {name: lambda x, name=name: calls.append(name) or jnp.float32(x) for name in "ab"}
    times = alternate(functions, [1, 2], repeats=2)
    assert "".join(calls[-8:]) == "abbaabba"
    assert {name: len(each) for name, each in times.items()} == {"a": 4, "b": 4}
    assert all((each >= 0).all() for each in times.values())


def point(**changes):
    values = {field.name: field.type(1) for field in dataclasses.fields(Point)}
    return Point(**(values | changes))


def test_curve_is_read_as_it_was_written(tmp_path):
    points = [point(budget=0.25, met=False, images=7), point(score=0.123456)]
    write_points(tmp_path / "curve.csv", points)
    assert read_curve(tmp_path / "curve.csv") == points
    first = (tmp_path / "curve.csv").read_text().splitlines()[0]
    assert first.startswith(
        "budget,score,pixel_accuracy,macs,macs_fraction,latency_ms_p50,latency_ms_p95,static_latency_ms_p50,speedup,met"
    )


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "budget,score\n0.5,x\n"])
def test_a_file_that_is_no_curve_is_refused(tmp_path, text):
    (tmp_path / "curve.csv").write_text(text)
    with pytest.raises(UserError, match=r"curve\.csv"):
        read_curve(tmp_path / "curve.csv")
    with pytest.raises(UserError, match=r"none\.csv"):
        read_curve(tmp_path / "none.csv")


def test_evaluation_needs_one_device(found):
    # 8 are simulated here; everything stays on the first.
    assert {device.id for leaf in jax.tree.leaves(found.states[0.6]) for device in leaf.devices()} == {0}
