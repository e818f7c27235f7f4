"""Learning from pictures without labels: strong changes, the loss, the teacher, resuming; and labels that are tags."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import standin
from flax import nnx
from made import Made

import dynjax as dj
from dynjax import tasks
from dynjax.config import BudgetConfig, LossConfig, UserError
from dynjax.data import few, make_source
from dynjax.data.source import picture_spec
from dynjax.data.weak import weaken
from dynjax.run import log, mesh, step, train
from dynjax.tasks import Player, losses, perturb
from dynjax.tasks.consistency import ConsistentTask, consistency, sure
from dynjax.tasks.segmentation import SegmentationTask
from experiments import rows

NAMES = tuple("abcd")


def bytes_of(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def task(confidence=0.3, weight=2.0, **losses):
    return ConsistentTask(NAMES, LossConfig(consistency=weight, confidence=confidence, **losses))


# Strong changes


CHANGES = {"jittered": perturb.jittered, "greyed": perturb.greyed, "blurred": perturb.blurred}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_decided_by_its_key_and_stays_in_range(name):
    image = jnp.asarray(bytes_of(16, 96, 120), jnp.float32)
    run = jax.jit(CHANGES[name])
    found = run(image, jax.random.key(0))
    assert found.shape == image.shape and 0 <= found.min() and found.max() <= 255
    np.testing.assert_array_equal(found, run(image, jax.random.key(0)))
    assert (found != run(image, jax.random.key(1))).any()
    changed = (jnp.abs(found - image) > 1e-3).any((1, 2, 3)) if name != "blurred" else (found != image).any((1, 2, 3))
    assert 0 < changed.sum() < 16  # some are left as they are
    # Each picture changes by itself.
    alone = run(image.at[1:].set(0.0), jax.random.key(0))
    np.testing.assert_allclose(alone[0], found[0], atol=1e-3)


def test_what_the_changes_are():
    image = jnp.asarray(bytes_of(64, 8, 12), jnp.float32)
    grey = perturb.greyed(image, jax.random.key(0))
    without = np.ptp(np.asarray(grey), axis=-1).max((1, 2)) < 1e-3
    assert 0.1 < without.mean() < 0.3
    flat = jnp.full((64, 8, 12, 3), 100.0)
    np.testing.assert_allclose(perturb.blurred(flat, jax.random.key(0)), flat, rtol=1e-5)
    factors = np.asarray(perturb.jittered(flat, jax.random.key(0)))[:, 0, 0, 0] / 100  # only brightness shows
    assert 0.5 <= factors.min() < 0.7 and 1.3 < factors.max() <= 1.5
    # A point under the widest blur of a large picture is a Gaussian of at most two pixels of 321.
    point = jnp.zeros((8, 321, 1, 3)).at[:, 160].set(200.0)
    spread = np.asarray(perturb.blurred(point.transpose(0, 2, 1, 3).repeat(321, 1), jax.random.key(2)))[:, 5, :, 0]
    places = np.arange(321) - 160
    deviations = np.sqrt((spread * places**2).sum(1) / spread.sum(1))
    assert deviations.max() < 2.05 and (deviations == 0).any() and deviations.max() > 0.5


def test_boxes_are_rectangles_of_their_sizes():
    inside = np.asarray(perturb.boxes(jax.random.key(0), 256, 40, 60))
    shares = inside.mean((1, 2))
    assert 0.4 < (shares > 0).mean() < 0.6
    assert 0.01 < shares[shares > 0].min() < 0.06 and 0.3 < shares.max() < 0.44
    for each in inside[shares > 0]:
        tall, wide = each.any(1).sum(), each.any(0).sum()
        assert each.sum() == tall * wide
    np.testing.assert_array_equal(inside, perturb.boxes(jax.random.key(0), 256, 40, 60))


def test_boxes_of_pictures_and_labels_are_the_same():
    labels = jnp.broadcast_to(jnp.arange(8)[:, None, None], (8, 24, 24)).astype(jnp.int32)
    image = jnp.broadcast_to(labels[..., None] * 20, (8, 24, 24, 3)).astype(jnp.uint8)
    inside = perturb.boxes(jax.random.key(1), 8, 24, 24)
    pictures, mixed = perturb.mixed(image, inside), perturb.mixed(labels, inside)
    np.testing.assert_array_equal(pictures, (mixed[..., None] * 20).repeat(3, -1))
    np.testing.assert_array_equal(mixed, np.where(inside, (np.asarray(labels) + 1) % 8, labels))
    found, guess = jax.jit(perturb.strong)(image, labels, jax.random.key(3))
    assert found.dtype == jnp.uint8 and found.shape == image.shape and guess.dtype == labels.dtype
    assert (guess != labels).any()


# The loss


def test_the_loss_against_loops():
    random = np.random.default_rng(0)
    teacher, student = random.normal(size=(2, 2, 4, 5, 3)).astype(np.float32)
    total, counted = 0.0, 0
    for where in np.ndindex(2, 4, 5):
        shares = np.exp(teacher[where]) / np.exp(teacher[where]).sum()
        if shares.max() >= 0.6:
            counted += 1
            total -= np.log(np.exp(student[where])[shares.argmax()] / np.exp(student[where]).sum())
    assert 0 < counted < 40
    guess = sure(jnp.asarray(teacher), 0.6)
    assert (np.asarray(guess) >= 0).sum() == counted
    assert consistency(jnp.asarray(student), guess) == pytest.approx(total / 40, rel=1e-5)


class Plain(nnx.Module):
    """Without noise: what it does can be done again."""

    def __init__(self):
        self.net = standin.Net(nnx.Rngs(0), noise=False)

    def __call__(self, x):
        return 3 * self.net(x)


@pytest.fixture(scope="module")
def batch():
    image = bytes_of(8, 8, 8)
    mask = (image[..., 0] // 64).astype(np.int32)
    found = {"image": image, "mask": mask, "unlabelled": bytes_of(8, 8, 8, seed=1)}
    return {name: jnp.asarray(array) for name, array in found.items()}


def with_guesses(given, batch):
    return {**batch, **given.teach(Plain(), batch)}


@nnx.jit(static_argnames="given")
def loss_and_gradient(given, model, batch):
    def loss(model):
        return given.loss(model, batch, jax.random.key(0), 0.5)

    (_, metrics), gradient = nnx.value_and_grad(loss, has_aux=True)(model)
    return metrics, gradient


def test_the_task_adds_the_weighted_loss_of_the_changed_pictures(batch):
    given = task()
    seen = with_guesses(given, batch)
    model = Plain()
    metrics, _ = loss_and_gradient(given, model, seen)
    picture, guess = perturb.strong(batch["unlabelled"], seen["guess"], jax.random.fold_in(jax.random.key(0), 1))
    expected = 2 * consistency(Plain()(picture), guess)
    assert metrics["consistency"] == pytest.approx(float(expected), rel=1e-3) and expected > 0
    assert metrics["loss"] == pytest.approx(float(metrics["task_loss"] + metrics["consistency"]))
    assert metrics["confident"] == pytest.approx(float((guess >= 0).mean())) and 0 < metrics["confident"] < 1
    # Statistics are those of the labelled pictures.
    alone = Plain()
    loss_and_gradient(SegmentationTask(NAMES, LossConfig()), alone, batch)
    for name in ("mean", "var"):
        np.testing.assert_array_equal(vars(model.net.norm)[name][...], vars(alone.net.norm)[name][...])


def test_nothing_is_learnt_from_a_teacher_that_is_never_sure(batch):
    given = task(confidence=1.01)
    seen = with_guesses(given, batch)
    metrics, gradient = loss_and_gradient(given, Plain(), seen)
    assert metrics["consistency"] == metrics["confident"] == 0
    _, other = loss_and_gradient(given, Plain(), {**seen, "unlabelled": 255 - seen["unlabelled"]})
    _, alone = loss_and_gradient(SegmentationTask(NAMES, LossConfig()), Plain(), batch)
    for found in (other, alone):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, found)
    _, sure = loss_and_gradient(task(), Plain(), with_guesses(task(), batch))
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(sure), jax.tree.leaves(gradient), strict=True))


def test_without_others_the_labelled_pictures_are_taken(batch):
    given, own = task(), {name: batch[name] for name in ("image", "mask")}
    seen = with_guesses(given, own)
    np.testing.assert_array_equal(seen["guess"], given.teach(Plain(), {**own, "unlabelled": own["image"]})["guess"])
    assert loss_and_gradient(given, Plain(), seen)[0]["consistency"] > 0


def test_gates_learn_from_both_and_the_budget_is_charged_for_the_labelled(batch):
    class Adaptive(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.stem = nnx.Conv(3, 4, (3, 3), rngs=rngs)
            self.tiles = dj.Tiles(nnx.Conv(4, 4, (3, 3), rngs=rngs), dj.TileGate(4, size=4, rngs=rngs))
            self.head = nnx.Conv(4, 4, (1, 1), rngs=rngs)

        def __call__(self, x):
            return self.head(self.tiles(self.stem(x.astype(jnp.float32) / 255)))

    given = dataclasses.replace(task(confidence=0.0), budget=BudgetConfig(target=0.3))
    seen = {**batch, "guess": jnp.zeros((8, 8, 8), jnp.int32)}
    metrics, gradient = loss_and_gradient(given, Adaptive(), seen)
    bare, without = loss_and_gradient(SegmentationTask(NAMES, LossConfig(), None, given.budget), Adaptive(), batch)
    assert metrics["macs_fraction"] == bare["macs_fraction"] and metrics["budget_loss"] == bare["budget_loss"]
    gates = [each["tiles"]["gate"]["logits"]["bias"][...] for each in (gradient, without)]
    assert (gates[0] != gates[1]).any()


# The teacher


class Taught:
    """A task that only says what its teacher is."""

    def __init__(self):
        self.players = (Player("model", self.loss, teach=self.teach),)

    def teach(self, model, batch):
        assert model.norm.use_running_average and model.drop.deterministic
        return {"seen": jnp.broadcast_to(model.head.kernel[...].sum(), (8,)), "logits": model(batch["image"])}

    def loss(self, model, batch, key, progress):
        seen = batch["seen"].mean()
        return model.head.kernel[...].sum() + 100 * batch["logits"].sum(), {"seen": seen}


@pytest.mark.parametrize("ema", [0.9, 0.0])
def test_the_teacher_is_the_averaged_model_and_learns_nothing(ema):
    model = standin.Net(nnx.Rngs(0))
    state, one = step.make_step(model, Taught(), standin.config(ema=ema, warmup=0.0), standin.is_gate)
    one = jax.jit(one)
    for batch in itertools.islice(standin.Batches(), 3):
        teacher = state.ema if ema else state.params
        wanted = float(teacher["head"]["kernel"][...].sum())
        student = float(state.params["head"]["kernel"][...].sum())
        state, metrics = one(state, batch)
        assert metrics["seen"] == pytest.approx(wanted, rel=1e-5)
        # That of the sum of the kernel's 32 numbers, and nothing of the logits.
        assert metrics["grad_norm"] == pytest.approx(32**0.5, rel=1e-5)
    assert (abs(wanted - student) > 1e-3) == bool(ema)


class Both(standin.Batches):
    """With pictures without labels."""

    def __next__(self):
        number = self.next
        batch = super().__next__()
        image = bytes_of(self.size, 8, 8, seed=1000 + number)
        return {**batch, "unlabelled": np.split(image, self.count)[self.index]}


def test_resumed_it_ends_with_the_same_bits(tmp_path):
    def fit(workdir, loader):
        return standin.fit(standin.config(), workdir, task=task(), loader=loader)

    whole = standin.arrays(fit(tmp_path / "whole", Both()))
    with pytest.raises(UserError, match="the data ended after 3"):
        fit(tmp_path / "w", itertools.islice(Both(), 3))
    again = standin.arrays(fit(tmp_path / "w", itertools.islice(Both(), 6)))
    for name, array in whole.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)
    first, second = (log.read_metrics(tmp_path / name) for name in ("whole", "w"))
    assert [each["consistency"] for each in first] == [each["consistency"] for each in second]
    assert any(each["consistency"] > 0 for each in first)


@pytest.mark.parametrize("changes", [dict(accumulate=2, batch_size=16), dict(precision="bfloat16")])
def test_parts_and_halves(changes):
    given = standin.config(**changes)
    state, one = step.make_step(standin.Net(nnx.Rngs(0)), task(), given, standin.is_gate)
    _, metrics = jax.jit(one)(state, next(Both(given.batch_size)))
    assert np.isfinite([float(value) for value in metrics.values()]).all() and metrics["consistency"] > 0


def test_eight_devices_do_what_one_does():
    """Boxes reach over from one device's pictures to another's."""
    model, given = standin.Net(nnx.Rngs(0), noise=False, norm=False), standin.config(warmup=0.0)
    found = []
    for devices in (1, 8):
        over = mesh.make_mesh(devices)
        with jax.set_mesh(over):
            state, one = step.make_step(model, task(), given, standin.is_gate)
            state = mesh.replicate(over, state)
            one = jax.jit(one, out_shardings=mesh.replicated(over))
            for batch in itertools.islice(Both(), 2):
                state, metrics = one(state, mesh.share(over, batch))
        found.append((jax.device_get(metrics), nnx.to_pure_dict(jax.device_get(state.params))))
    (alone, params), (spread, others) = found
    assert alone["confident"] == pytest.approx(spread["confident"], abs=0.01) and alone["consistency"] > 0
    assert alone["consistency"] == pytest.approx(spread["consistency"], rel=0.01)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4), params, others)


# Data and rows


def test_a_row_learns_from_both(tmp_path):
    row = rows.tiny(rows.get_row("digits_semi_static"))
    data = dataclasses.replace(row.data, labelled="1/4")
    loss = dataclasses.replace(row.loss, confidence=0.1)
    scores = train.train(dataclasses.replace(row, data=data, loss=loss), tmp_path, quiet=True)
    records = [each for each in log.read_metrics(tmp_path) if "loss" in each]
    assert len(records) == 2 and all(each["consistency"] > 0 and each["confident"] > 0 for each in records)
    assert 0 <= scores["miou"] <= 1
    assert len((tmp_path / "labelled.txt").read_text().splitlines()) == 2


def test_the_source_has_both_where_it_is_asked_to():
    config = dataclasses.replace(rows.tiny(rows.get_row("digits_semi_static")).data, labelled="1/4")
    both, marked = make_source(config, "train", unlabelled=True), make_source(config, "train")
    assert "unlabelled" in both.spec and "unlabelled" not in marked.spec
    assert few.chosen(both) == few.chosen(marked) and len(few.marked_of(both)) == len(marked) == 2
    assert "unlabelled" not in make_source(config, "val", unlabelled=True).spec
    whole = make_source(dataclasses.replace(config, labelled=""), "train", unlabelled=True)
    assert "unlabelled" not in whole.spec and few.marked_of(whole) is whole


def changed(name, data=None, **loss):
    row = rows.get_row(name)
    return dataclasses.replace(
        row, data=dataclasses.replace(row.data, **(data or {})), loss=dataclasses.replace(row.loss, **loss)
    )


@pytest.mark.parametrize(
    ("name", "data", "loss", "message"),
    [
        ("digits_unet_static", {}, dict(consistency=1.0), r"--loss\.consistency 1\.0 learns from .*--data\.labelled"),
        ("digits_unet_static", {}, dict(confidence=0.9), r"--loss\.confidence 0\.9: row .* does not use it"),
        ("digits_resnet_static", {}, dict(consistency=1.0), r"--loss\.consistency 1\.0: row .* does not use it"),
        ("digits_unet_static", {}, dict(tags=1.0), r"--loss\.tags 1\.0 is for --data\.weak tags, not full"),
        (
            "camvid_points_static",
            dict(weak="tags"),
            {},
            r"give --loss\.tags 1\.0 --loss\.cross-entropy 0 --loss\.class-weights none$",
        ),
        (
            "camvid_points_static",
            dict(weak="tags"),
            dict(tags=2.0, dice=1.0, cross_entropy=0.0, class_weights="none"),
            r"give --loss\.tags 2\.0 --loss\.dice 0$",
        ),
        ("digits_semi_static", {}, dict(cross_entropy=0.0), "nothing to learn from"),
    ],
)
def test_options_that_do_not_go_together(name, data, loss, message):
    with pytest.raises(UserError, match=message):
        tasks.refuse_unused(changed(name, data, **loss))


def test_options_that_do():
    tasks.refuse_unused(changed("digits_unet_tiles", dict(labelled="1/8"), consistency=0.5, confidence=0.8))
    tasks.refuse_unused(changed("camvid_points_static", consistency=1.0))
    tags = dict(tags=1.0, cross_entropy=0.0, class_weights="none")
    tasks.refuse_unused(changed("camvid_points_static", dict(weak="tags"), consistency=1.0, **tags))
    for options in (dict(consistency=-1.0), dict(confidence=1.5), dict(tags=-1.0)):
        with pytest.raises(UserError, match=f"--loss.{next(iter(options))}"):
            train.check(changed("digits_unet_static", **options))


def test_only_training_has_a_teacher():
    row = changed("digits_unet_static", dict(labelled="1/2"), consistency=1.0, class_weights="none")
    source = Made(4, picture_spec((8, 8), "mask"), lambda index: {}, classes=NAMES)
    assert isinstance(tasks.make_task(row, source), ConsistentTask)
    assert type(tasks.make_task(row, source, training=False)) is SegmentationTask


# Tags


def test_tags_say_which_classes_there_are_and_nothing_else():
    mask = np.full((40, 60), 255, np.uint8)
    mask[:20], mask[30, 30:34] = 1, 4
    found = weaken(mask, "tags", 255, np.random.default_rng(0))
    assert found.dtype == mask.dtype and set(np.unique(found)) == {1, 4} == set(np.unique(found[20:30, 30:40]))
    assert 0.4 < (found == 4).mean() < 0.6  # not how many pixels either
    blank = np.full((4, 4), 255, np.uint8)
    assert (weaken(blank, "tags", 255, np.random.default_rng(0)) == 255).all()


def test_the_loss_of_tags_against_loops():
    random = np.random.default_rng(0)
    logits = random.normal(size=(3, 4, 5, 3)).astype(np.float32)
    mask = np.stack([np.full((4, 5), 1), np.where(np.arange(20).reshape(4, 5) % 2, 0, 2), np.full((4, 5), -1)])
    total = 0.0
    for picture, present in ((0, {1}), (1, {0, 2})):
        for label in range(3):
            pooled = np.log(np.exp(5 * logits[picture, ..., label]).mean()) / 5
            share = 1 / (1 + np.exp(-pooled))
            total -= np.log(share if label in present else 1 - share) / 3
    mask = jnp.asarray(mask, jnp.int32)
    assert losses.tags(jnp.asarray(logits), mask) == pytest.approx(total / 2, rel=1e-5)
    shuffled = jnp.roll(mask, 3, 2)  # where a class is does not count
    assert losses.tags(jnp.asarray(logits), shuffled) == losses.tags(jnp.asarray(logits), mask)
    assert losses.tags(jnp.asarray(logits), jnp.full_like(mask, -1)) == 0


def test_of_tags_no_accuracy_is_logged(batch):
    given = SegmentationTask(NAMES, LossConfig(cross_entropy=0.0, tags=1.0))
    metrics, gradient = loss_and_gradient(given, Plain(), batch)
    assert "pixel_accuracy" not in metrics and metrics["loss"] > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
