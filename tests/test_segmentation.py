"""Metrics against loops and hand-worked figures; the task on small models with and without a budget."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from flax import nnx
from made import Made

import dynjax as dj
from dynjax.config import BudgetConfig, LossConfig
from dynjax.core.gates import Threshold
from dynjax.data.source import Field
from dynjax.tasks import losses, segmentation
from dynjax.tasks.borders import boundary_counts, boundary_scores, boundary_weights
from dynjax.tasks.segmentation import SegmentationTask

NAMES = ("sky", "road", "car")


@pytest.fixture(scope="module")
def scene():
    """Logits (2, 4, 5, 3) and a mask of the classes 0 and 1 with ignored pixels; class 2 is only ever predicted."""
    random = np.random.default_rng(0)
    mask = random.integers(-1, 2, (2, 4, 5)).astype(np.int32)
    return jnp.asarray(random.normal(size=(2, 4, 5, 3)), jnp.float32), jnp.asarray(mask)


def test_a_mask_without_pixels_has_no_scores(scene):
    logits, mask = scene
    assert not segmentation.confusion_matrix(logits, jnp.full_like(mask, -1)).any()
    found = segmentation.scores(np.zeros((3, 3)))
    assert np.isnan([found["miou"], found["dice"], found["pixel_accuracy"], *found["iou"], *found["class_dice"]]).all()


def test_confusion_and_scores_against_loops(scene):
    logits, mask = scene
    found = segmentation.scores(np.asarray(jax.jit(segmentation.confusion_matrix)(logits, mask)))

    truth, guess = np.asarray(mask), np.asarray(logits).argmax(-1)
    ious, dices = [], []
    for label in range(3):
        both = either = ours = theirs = 0
        for where in np.ndindex(truth.shape):
            if truth[where] == -1:
                continue
            both += truth[where] == label and guess[where] == label
            either += truth[where] == label or guess[where] == label
            theirs += truth[where] == label
            ours += guess[where] == label
        ious.append(both / either)
        dices.append(2 * both / (ours + theirs))
    counts = truth != -1
    assert found["iou"] == pytest.approx(ious)
    assert found["miou"] == pytest.approx(np.mean(ious))
    assert found["class_dice"] == pytest.approx(dices)
    assert found["dice"] == pytest.approx(np.mean(dices))
    assert found["pixel_accuracy"] == pytest.approx((truth == guess)[counts].mean())


def test_scores_leave_out_classes_that_never_occur():
    # Of class 0, 6 pixels of 8 are right and 2 taken for class 2, which is only predicted; class 1 occurs nowhere.
    found = segmentation.scores(np.array([[6, 0, 2], [0, 0, 0], [0, 0, 0]]))
    assert found["iou"][0] == 0.75 and np.isnan(found["iou"][1]) and found["iou"][2] == 0
    assert found["miou"] == (0.75 + 0) / 2
    assert found["dice"] == (12 / 14 + 0) / 2
    assert found["class_dice"] == pytest.approx([12 / 14, np.nan, 0], nan_ok=True)
    assert found["pixel_accuracy"] == 0.75


def test_confusion_has_rows_of_truth():
    logits = jnp.asarray(np.eye(3, dtype=np.float32)[None, None, [2, 2, 1, 0]])
    expected = [[0, 0, 1], [0, 1, 1], [0, 0, 0]]  # truth 0 taken for 2, truth 1 for 2 and for 1; the last is ignored
    assert segmentation.confusion_matrix(logits, jnp.array([[[0, 1, 1, -1]]])).tolist() == expected


def patches(random, *shape):
    """Masks of patches of 4 by 4 pixels, some of them ignored."""
    small = random.integers(-1, 4, (shape[0], shape[1] // 4, shape[2] // 4))
    return small.repeat(4, 1).repeat(4, 2).astype(np.int32)


def border(mask, label):
    """Pixels of the class with a neighbour of another one, none of them ignored, pixel by pixel."""
    found = np.zeros(mask.shape, bool)
    for row, column in np.argwhere(mask == label):
        for y, x in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x] not in (-1, label):
                found[row, column] = True
    return found


@pytest.mark.parametrize(("shape", "radius"), [((3, 24, 32), 1), ((2, 200, 300), 0.0075 * 130000**0.5)])
def test_boundary_f1_against_distance_transforms(shape, radius):
    random = np.random.default_rng(4)
    mask = patches(random, *shape)
    noise = np.where(random.random(shape) < 0.02, random.integers(0, 4, shape), np.roll(mask, 2, 2))
    guess = np.maximum(noise, 0).astype(np.int32)
    counts = np.zeros((6, 4))
    for one, other in zip(mask, np.where(mask == -1, -1, guess), strict=True):
        for label in range(4):
            true, found = border(one, label), border(other, label)
            # There may be no border at all to be near to.
            near = [
                scipy.ndimage.distance_transform_edt(~each) <= radius if each.any() else np.zeros_like(each)
                for each in (true, found)
            ]
            counts[label] += found.sum(), (found & near[0]).sum(), true.sum(), (true & near[1]).sum()
    got = jax.jit(boundary_counts, static_argnums=2)(jnp.asarray(guess), jnp.asarray(mask), 6)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, counts)
    precision, recall = counts[:4, 1] / counts[:4, 0], counts[:4, 3] / counts[:4, 2]
    expected = 2 * precision * recall / (precision + recall)
    scores = boundary_scores(np.asarray(got))
    assert scores["class_boundary_f1"] == pytest.approx([*expected, np.nan, np.nan], nan_ok=True)
    assert scores["boundary_f1"] == pytest.approx(expected.mean()) and expected.min() > 0


def test_boundary_f1_at_its_ends():
    mask = jnp.asarray(patches(np.random.default_rng(5), 2, 16, 16))
    perfect = boundary_scores(np.asarray(boundary_counts(jnp.maximum(mask, 0), mask, 4)))
    assert perfect["boundary_f1"] == 1 and perfect["class_boundary_f1"] == [1, 1, 1, 1]
    # One class everywhere has no border: nothing is found of those of the four.
    flat = boundary_scores(np.asarray(boundary_counts(jnp.zeros_like(mask), mask, 4)))
    assert flat["boundary_f1"] == 0
    nothing = boundary_scores(np.asarray(boundary_counts(mask, jnp.full_like(mask, -1), 4)))
    assert np.isnan([nothing["boundary_f1"], *nothing["class_boundary_f1"]]).all()


def test_wrong_shapes_are_named(scene):
    logits, mask = scene
    with pytest.raises(ValueError, match=r"\(2, 4, 5, 3\).*\(2, 4, 4\)"):
        segmentation.confusion_matrix.__wrapped__(logits, mask[:, :, :4])
    with pytest.raises(ValueError, match=r"\(2, 4, 5\).*\(2, 4, 4\)"):
        boundary_counts.__wrapped__(mask, mask[:, :, :4], 3)


def source_of(*masks) -> Made:
    """Masks of a data set that marks ignored pixels by 9."""
    masks = np.array(masks, np.int32)
    spec = {"mask": Field(masks.shape[1:], np.int32, "mask", -1, ignored=9)}
    return Made(len(masks), spec, lambda index: {"mask": masks[index]}, classes=NAMES)


def test_class_frequencies_leave_out_what_is_ignored():
    source = source_of([[0, 0, 0], [9, 9, 9]], [[0, 0, 1], [1, -1, -1]], [[9, 9, 9], [9, 9, 9]])
    np.testing.assert_allclose(segmentation.class_frequencies(source), [5 / 7, 2 / 7, 0])
    np.testing.assert_allclose(segmentation.class_frequencies(source, examples=1), [1, 0, 0])
    with pytest.raises(ValueError, match="mask 1 has labels 0 to 4; the classes are 0 to 2"):
        segmentation.class_frequencies(source_of([[0, 0]], [[0, 4]]))
    with pytest.raises(ValueError, match="every pixel"):
        segmentation.class_frequencies(source_of([[9, 9]]))


def test_class_weights():
    frequencies = np.array([0.81, 0.16, 0.03])
    assert segmentation.class_weights("none", frequencies) is None
    # The mean of 1/f over pixels is the number of classes; the last weight would be 11.1 and stops at ten, which leaves
    # 0.7 of the mean to the others, half for each.
    np.testing.assert_allclose(segmentation.class_weights("inverse", frequencies), [0.35 / 0.81, 0.35 / 0.16, 10.0])
    sqrt = np.array([1 / 0.9, 1 / 0.4, 1 / 0.03**0.5])
    np.testing.assert_allclose(segmentation.class_weights("sqrt", frequencies), sqrt / (frequencies @ sqrt))
    for kind in ("sqrt", "inverse"):
        weights = segmentation.class_weights(kind, np.array([0.75, 0.25, 0.0]))
        assert weights[0] < weights[1] < weights[2] == pytest.approx(10.0)
        assert np.dot([0.75, 0.25, 0.0], weights) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="'log'"):
        segmentation.class_weights("log", frequencies)


@pytest.mark.parametrize("kind", ["sqrt", "inverse"])
def test_no_class_weight_is_above_the_cap(kind):
    for frequencies in ([0.7, 0.2, 0.0999, 0.0001], [0.97, 0.01, 0.01, 0.01], [0.9989, 1e-3, 1e-4, 0.0], [1.0, 0.0]):
        weights = segmentation.class_weights(kind, np.array(frequencies))
        assert max(weights) <= 10 and np.dot(frequencies, weights) == pytest.approx(1)
        assert weights[-1] == 10 or frequencies[-1] in (1.0, 0.01) or kind == "sqrt"


class Net(nnx.Module):
    """Logits (B, H, W, 3) from uint8 pictures; its middle runs on tiles, or everywhere without a gate."""

    def __init__(self, gate=None):
        rngs = nnx.Rngs(0)
        self.stem = nnx.Conv(3, 4, (1, 1), rngs=rngs)
        middle = nnx.Sequential(nnx.Conv(4, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs))
        self.middle = middle if gate is None else dj.Tiles(middle, gate=gate)
        self.head = nnx.Conv(4, 3, (1, 1), rngs=rngs)

    def __call__(self, image):
        return self.head(self.middle(self.stem(image.astype(jnp.float32) / 127.5 - 1)))


@pytest.fixture(scope="module")
def batch():
    random = np.random.default_rng(1)
    image = random.integers(0, 256, (2, 16, 16, 3), np.uint8)
    return {"image": jnp.asarray(image), "mask": jnp.asarray(random.integers(-1, 3, (2, 16, 16)), jnp.int32)}


def tile_gate():
    return dj.TileGate(4, size=8, rngs=nnx.Rngs(1))


def test_loss_of_a_static_model_is_the_weighted_sum(batch):
    weights, mask = (1.0, 2.0, 0.5), batch["mask"]
    given = LossConfig(cross_entropy=0.5, dice=2.0, focal=3.0, lovasz=0.25, boundary=1.5, one_vs_all=0.75)
    task = SegmentationTask(NAMES, given, weights)

    @nnx.jit
    def run(model):
        logits = nnx.clone(model)(batch["image"])
        loss, metrics = task.loss(model, batch, jax.random.key(0), 0.0)
        terms = {
            "cross_entropy": losses.cross_entropy(logits, mask, weights),
            "dice": losses.soft_dice(logits, mask),
            "focal": losses.focal(logits, mask, weights),
            "lovasz": losses.lovasz_softmax(logits, mask),
            "boundary": losses.cross_entropy(logits, mask, weights, pixel_weights=boundary_weights(mask)),
            "one_vs_all": losses.binary_cross_entropy(logits, mask, weights),
        }
        return loss, metrics, terms, task.counts(model, logits, batch), task.each([logits], batch)

    loss, metrics, terms, counts, each = run(Net())
    assert loss == pytest.approx(sum(float(vars(given)[name] * term) for name, term in terms.items()), rel=1e-5)
    assert metrics["loss"] == metrics["task_loss"] == loss
    assert metrics["budget_loss"] == 0 and metrics["macs_fraction"] == 1
    assert each.shape == (2, 1) and np.isfinite(each).all()
    found = task.scores(np.asarray(counts, np.float64))
    assert metrics["pixel_accuracy"] == pytest.approx(found["pixel_accuracy"])
    assert len(found["class_dice"]) == len(found["class_boundary_f1"]) == 3 and 0 < found["boundary_f1"] < 1


def test_loss_under_a_fixed_budget(batch):
    gate = dj.FixedGate(np.array([[[1, 0], [0, 0]]]), size=8)
    task = SegmentationTask(NAMES, LossConfig(), None, BudgetConfig(target=0.5, sampled=False, weight=10.0))

    @nnx.jit
    def run(model):
        _, trace = dj.traced(model)(batch["image"])
        loss, metrics = task.loss(model, batch, jax.random.key(0), jnp.float32(1.0))
        return loss, metrics, trace.macs().mean() / trace.full_macs

    loss, metrics, fraction = run(Net(gate))
    assert fraction < 0.6
    assert metrics["macs_fraction"] == pytest.approx(float(fraction))
    assert metrics["target"] == 0.5 and metrics["gate_entropy"] == pytest.approx(0, abs=1e-4)
    # The bounds of the gates are open at the end of the training: only the distance of the network is left.
    assert metrics["budget_loss"] == pytest.approx(10 * (float(fraction) - 0.5) ** 2, rel=1e-4)
    assert loss == pytest.approx(float(metrics["task_loss"] + metrics["budget_loss"]))


@pytest.mark.parametrize("sampled", [True, False])
def test_a_sampled_target_moves_the_threshold_and_puts_it_back(batch, sampled):
    task = SegmentationTask(NAMES, LossConfig(), None, BudgetConfig(target=0.25, sampled=sampled))
    graphdef, state = nnx.split(Net(tile_gate()))

    @jax.jit
    def step(key):
        model = nnx.merge(graphdef, state, copy=True)
        return task.loss(model, batch, key, 0.5)[1], nnx.state(model, Threshold)

    found = []
    for seed in range(16 if sampled else 2):
        metrics, left = step(jax.random.key(seed))
        found.append({name: float(value) for name, value in metrics.items()})
        assert [float(leaf) for leaf in jax.tree.leaves(left)] == pytest.approx([np.log(3) if sampled else 0])
    targets = [metrics["target"] for metrics in found]
    assert all(0 < metrics["gate_entropy"] <= 1 for metrics in found)
    if sampled:
        assert 0.25 <= min(targets) < 0.4 and 0.8 < max(targets) <= 1
        # The same noise and the same weights: a lower target can only keep less.
        by_target = [metrics["macs_fraction"] for metrics in sorted(found, key=lambda metrics: metrics["target"])]
        assert by_target == sorted(by_target) and by_target[0] < by_target[-1]
    else:
        assert targets == [0.25, 0.25] and found[0] == found[1]


def test_gradients_reach_gates_and_weights(batch):
    task = SegmentationTask(NAMES, LossConfig(dice=1.0), None, BudgetConfig(target=0.3))

    @nnx.jit
    def gradients(model):
        return nnx.grad(lambda model: task.loss(model, batch, jax.random.key(0), 0.0)[0])(model)

    found = gradients(Net(tile_gate()))
    for path, leaf in nnx.to_flat_state(found):
        assert np.isfinite(leaf[...]).all(), path
    assert np.asarray(found["middle"]["gate"]["logits"]["bias"][...]).any()
    assert np.asarray(found["stem"]["kernel"][...]).any()


def test_branches_used_alike(batch):
    model = Net(tile_gate())
    model.middle = dj.Select(
        [nnx.Linear(4, 4, rngs=nnx.Rngs(2)), model.middle.block], dj.BranchGate(4, 2, rngs=nnx.Rngs(3))
    )
    task = SegmentationTask(NAMES, LossConfig(load_balance=0.5), None, BudgetConfig())
    _, metrics = nnx.jit(lambda model: task.loss(model, batch, jax.random.key(0), 0.5))(model)
    assert 0 < metrics["load_balance"] < 1
    whole = metrics["task_loss"] + metrics["budget_loss"] + metrics["load_balance"]
    assert float(metrics["loss"]) == pytest.approx(float(whole), rel=1e-5)


class Expert(Net):
    """Pixels are tokens that go to experts."""

    def __init__(self):
        super().__init__()
        self.middle = dj.Experts(4, 8, 3, top=1, rngs=nnx.Rngs(1))

    def __call__(self, image):
        x = self.stem(image.astype(jnp.float32) / 127.5 - 1)
        return self.head(self.middle(x.reshape(len(x), -1, 4)).reshape(x.shape))


class Pondering(Net):
    """A block applied again and again, trained on the mask after every step."""

    def __init__(self):
        super().__init__()
        gate = dj.SampleGate(4, rngs=nnx.Rngs(1))
        self.middle = dj.Halt(nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(2)), gate, 3, kind="pondernet")

    def predictions(self, image):
        x = self.stem(image.astype(jnp.float32) / 127.5 - 1)
        return [self.head(state) for state in self.middle.predictions(x)]


class Policied(Net):
    """A policy, trained by REINFORCE, that decides about two blocks."""

    def __init__(self):
        super().__init__()
        blocks = [nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(2)) for _ in range(2)]
        self.middle = dj.PolicySkip(blocks, dj.ChannelGate(4, 2, bias=0.0, rngs=nnx.Rngs(1)), straight_through=False)


@pytest.mark.parametrize(
    ("make", "terms"), [(Expert, {"load_balance", "router_z"}), (Pondering, {"ponder"}), (Policied, {"reinforce"})]
)
def test_what_dynamics_need_in_training_comes_from_their_modules(batch, make, terms):
    losses = LossConfig(load_balance=0.5, router_z=0.25, dice=1.0)
    task = SegmentationTask(NAMES, losses, None, BudgetConfig(target=0.5))

    @nnx.jit
    def step(model):
        return nnx.value_and_grad(lambda model: task.loss(model, batch, jax.random.key(0), 1.0), has_aux=True)(model)

    (loss, metrics), grads = step(make())
    assert terms <= metrics.keys() and all(np.isfinite(float(metrics[name])) for name in metrics)
    added = sum(float(metrics[name]) for name in terms | {"load_balance", "budget_loss"} if name in metrics)
    assert float(loss) == pytest.approx(float(metrics["task_loss"]) + added, rel=1e-5)
    assert float(metrics["budget_loss"]) == 0 or make is Expert
    router = grads["middle"]["gate"]
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(router))


def test_outputs_that_nobody_weighs_count_alike(batch):
    class Exiting(Net):
        def predictions(self, image):
            return [self(image), 2 * self(image)]

    task, model = SegmentationTask(NAMES, LossConfig(dice=1.0)), Exiting()
    loss, _ = task.loss(model, batch, jax.random.key(0), 0.5)
    each = [task.task_loss(logits, batch["mask"]) for logits in model.predictions(batch["image"])]
    assert float(loss) == pytest.approx(float(sum(each)) / 2, rel=1e-5)
