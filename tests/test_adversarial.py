"""Two players: a step is two updates by hand, what each kind of dynamics has judged, scores, trouble, resuming."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import standin
from blocks import at, image, still
from flax import nnx
from test_gan import CLASSES, FORMS, MIDDLE, build, config

from dynjax.config import BudgetConfig, Config, LossConfig, OptimizerConfig, UserError
from dynjax.core import budget, views
from dynjax.core.gates import LOWEST, GateParam
from dynjax.models.discriminator import PhaseGate
from dynjax.models.gan import halved, to_bytes
from dynjax.run import log, train
from dynjax.run.step import make_step
from dynjax.tasks import adversarial
from dynjax.tasks.adversarial import AdversarialTask
from dynjax.tasks.contest import CONTESTS, penalty
from dynjax.tasks.distances import Moments, frechet_distance
from dynjax.tasks.task import Pictures, Task, Watches


class Extractor:
    """Three numbers of a picture, far from 0."""

    name, distance_name, checksum = "brightness", "Fréchet distance (brightness)", "1"

    def __call__(self, image):
        x = image.astype(jnp.float32) / 255
        return jnp.stack([x.mean((1, 2, 3)), x[:, :4].mean((1, 2, 3)), (x**2).mean((1, 2, 3))], 1) + 100

    def probabilities(self, image):
        return None


def bytes_of(number, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (number, 8, 12, 3), dtype=np.uint8)


def task_of(dynamics="static", spends=None, reference=None, **losses):
    reference = reference or Moments.of(np.asarray(Extractor()(bytes_of(40, seed=9))))
    return AdversarialTask(LossConfig(**losses), dynamics, Extractor(), reference, spends)


def batch_of(number, seed=0):
    return {"image": jnp.asarray(bytes_of(number, seed)), "label": jnp.arange(number) % CLASSES}


def test_it_is_a_task_that_watches_and_draws():
    task = task_of()
    assert isinstance(task, Task) and isinstance(task, Watches) and isinstance(task, Pictures)
    assert [player.name for player in task.players] == ["discriminator", "generator"]
    assert task.score_name == "Fréchet distance (brightness)"


# A step

RATE, SLOW, EMA = 0.01, 0.5, 0.4
LITTLE = dict(steps=2, discriminator=(2,))


def row(**changes):
    optimizer = OptimizerConfig(
        learning_rate=RATE,
        warmup=0.0,
        weight_decay=0.0,
        gate_learning_rate=SLOW,
        clip=float("inf"),
        momentum=0.2,
        decay=0.9,
        falls=False,
        ema=EMA,
    )
    usual = dict(steps=2, batch_size=8, checkpoint_every=1, evaluate_every=0)
    return Config(row="gan", model=config(), optimizer=optimizer, **usual | changes)


def updates_by_hand(model, task, steps):
    """Two updates with each batch, the generator's against the discriminator as it then is; and the averages."""
    losses = {"discriminator": task.discriminator_loss, "generator": task.generator_loss}
    adam = optax.chain(optax.scale_by_adam(b1=0.2, b2=0.9), optax.scale(-RATE))
    params = {name: nnx.state(getattr(model, name), nnx.Param) for name in losses}
    states = {name: adam.init(params[name]) for name in losses}
    average, after = parameters(model), []

    @jax.jit
    def gradients(state, batch, key, progress):
        """Of both losses to their own parameters, of a model with this state; what else the loss changed comes too."""

        def of(name):
            graphdef, own, rest = nnx.split(state_of(state), belongs(name), ...)

            def loss(own):
                copy = nnx.merge(graphdef, own, rest, copy=True)
                value, _ = losses[name](views.training(copy), batch, key[name], progress)
                return value, nnx.state(copy, nnx.Not(nnx.Param))

            grads, changed = jax.grad(loss, has_aux=True)(own)
            return grads[name], changed

        return {name: of(name) for name in losses}

    def belongs(name):
        return lambda path, variable: path[0] == name and isinstance(variable, nnx.Param)

    graphdef = nnx.graphdef(model)

    def state_of(state):
        return nnx.merge(graphdef, state, copy=True)

    for number in range(steps):
        key = jax.random.fold_in(jax.random.key(0), number)
        keys = {name: jax.random.fold_in(key, place) for place, name in enumerate(losses)}
        for name in losses:
            grads, changed = gradients(nnx.state(model), batch_of(8, number), keys, number / steps)[name]
            change, states[name] = adam.update(grads, states[name])
            own = nnx.state(getattr(model, name), nnx.Param)
            slower = nnx.map_state(
                lambda _, variable: variable.replace(
                    (SLOW if isinstance(variable, GateParam) else 1) * variable.get_value()
                ),
                change,
            )
            nnx.update(getattr(model, name), optax.apply_updates(own, slower))
            nnx.update(model, changed)
            after.append(parameters(model))
        decay = min(EMA, (1 + number) / (10 + number))
        average = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, average, after[-1])
    return model, average, after, {name: states[name][0].nu for name in losses}


def parameters(model):
    """As they are now."""
    return jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))


def leaves(state, name=None):
    found = {".".join(map(str, path)): each[...] for path, each in nnx.to_flat_state(state)}
    return {path: np.asarray(each) for path, each in found.items() if name is None or path.startswith(name)}


@pytest.mark.parametrize("form", ["pictures", pytest.param("discriminator", marks=pytest.mark.slow)])
def test_a_step_is_two_updates_one_after_the_other(form):
    """The gates draw noise and the step's budget, and each player learns against what the other has become."""
    task = task_of(FORMS[form]["dynamics"], BudgetConfig(target=0.3), augment=0.5)
    state, one = make_step(build(**FORMS[form], **LITTLE), task, row(), budget.gate_filter)
    one = jax.jit(one)
    start = leaves(state.params)
    for number in range(2):
        state, metrics = one(state, batch_of(8, number))
    assert metrics["loss"] == metrics["discriminator/loss"] + metrics["generator/loss"]
    spends, other = ("generator", "discriminator") if form == "pictures" else ("discriminator", "generator")
    assert 0.3 <= float(metrics[f"{spends}/target"]) <= 1 and f"{other}/target" not in metrics
    model, average, after, squares = updates_by_hand(build(**FORMS[form], **LITTLE), task, 2)
    # Adam makes steps of the full rate out of gradients that are but rounding.
    steep = {f"{name}.{path}": each > 1e-10 for name in squares for path, each in leaves(squares[name]).items()}
    assert np.mean(np.concatenate([each.ravel() for each in steep.values()])) > 0.8
    for found, wanted in ((leaves(state.params), leaves(after[-1])), (leaves(state.ema), leaves(average))):
        assert found.keys() == wanted.keys() == steep.keys()
        for name in wanted:
            both = (np.where(steep[name], each[name], 0) for each in (found, wanted))
            np.testing.assert_allclose(*both, rtol=0, atol=1e-6, err_msg=name)
    # Each changes its own parameters, all of them that have a gradient, and no other.
    for name, before, now in (("discriminator", start, after[0]), ("generator", leaves(after[0]), after[1])):
        moved = {path for path, each in leaves(now).items() if np.any(each != before[path])}
        assert moved and all(path.startswith(name) for path in moved)
        biases = {path for path in moved if path.endswith("kernel")}
        assert biases == {path for path in leaves(now, name) if path.endswith("kernel")}
    # What is no parameter too: thresholds rest at the budget, noise goes on, the phase is that of the last step.
    rest, mine = leaves_of_rest(state.rest), leaves_of_rest(nnx.state(model, nnx.Not(nnx.Param)))
    assert rest.keys() == mine.keys()
    for name in mine:
        np.testing.assert_array_equal(rest[name], mine[name], err_msg=name)
    thresholds = {float(each) for name, each in rest.items() if name.endswith("threshold")}
    assert thresholds == {float(budget.sampled_threshold(0.3))}


def leaves_of_rest(state):
    found = {".".join(map(str, path)): each[...] for path, each in nnx.to_flat_state(state)}
    keys = {name: jnp.issubdtype(each.dtype, jax.dtypes.prng_key) for name, each in found.items()}
    return {name: np.asarray(jax.random.key_data(each) if keys[name] else each) for name, each in found.items()}


def test_every_parameter_is_one_players():
    model, (first, second) = build(), task_of().players
    params = nnx.state(model, nnx.Param)
    parts = nnx.split_state(params, first.parameters, second.parameters, ...)
    assert [set(part) for part in parts] == [{"discriminator"}, {"generator"}, set()]


@pytest.mark.parametrize("contest", ["relativistic", "wasserstein"])
def test_the_losses_of_static_players_by_hand(contest):
    model, task = build(), task_of(adversarial=contest, gradient_penalty=3.0)
    batch, key = batch_of(8), jax.random.key(4)
    (found, metrics), (other, _) = jax.jit(
        lambda m: (task.discriminator_loss(m, batch, key, 0.0), task.generator_loss(m, batch, key, 0.0))
    )(model)

    @jax.jit
    def by_hand(model):
        real, label, found = model.pixels(batch["image"]), batch["label"], []
        for count in (6, 4):
            keys = jax.random.split(key, count)
            drawn = model.generator(jax.random.normal(jax.random.split(keys[0])[0], (8, 4)), label)
            of_real, of_drawn = model.discriminator(real, label), model.discriminator(drawn, label)
            some = lambda x: model.discriminator(x, label[::4])  # noqa: E731
            steep = penalty(contest, some, real[::4], drawn[::4], keys[3])
            found += [CONTESTS[contest].discriminator(of_real, of_drawn) + 3 * steep]
            found += [CONTESTS[contest].generator(of_real, of_drawn), steep, (of_real > of_drawn).mean()]
        return found

    of_discriminator, _, steep, accuracy, _, of_generator, *_ = by_hand(model)
    assert float(found) == pytest.approx(float(of_discriminator), rel=1e-5)
    assert float(other) == pytest.approx(float(of_generator), rel=1e-5)
    assert float(metrics["steepness"]) == pytest.approx(float(steep), rel=1e-5) and float(steep) > 0
    assert float(metrics["accuracy"]) == pytest.approx(float(accuracy))
    assert float(metrics["loss"]) == pytest.approx(float(found))


def test_labels_are_wanted_where_pictures_have_classes():
    task = task_of()
    batch = {"image": jnp.asarray(bytes_of(2))}
    infer = lambda model: task.infer(model, task.prepare(model, batch))  # noqa: E731
    with pytest.raises(ValueError, match="the batch has image, latent: pictures of 3 classes are drawn by label"):
        infer(build())
    assert jax.eval_shape(infer, build(conditional=False)).shape == (2, 8, 12, 1)


# What is judged


def drawn_by(form, number=7, **changes):
    model = at(MIDDLE, build(**FORMS[form] | changes))
    z, label = image(number, 4), jnp.arange(number) % CLASSES
    draw = adversarial.DRAWS[config(**FORMS[form]).dynamics]

    def run(model, z):
        model = still(model)
        generator = model.generator
        found = draw(model, z, label, jax.random.key(2))
        known = {"model": generator(z, label)}
        if form == "width":
            known["whole"] = nnx.view(generator, width=1.0)(z, label)
        elif form == "scales":
            known["sizes"] = [generator(z, label, size=size) for size in range(2)]
        else:
            known["steps"] = generator.predictions(z, label)
            known["taught"] = model.teacher(z, label)
        return found, known

    return jax.jit(run)(model, z)


@pytest.mark.parametrize("form", ["pictures", "tiles"])
def test_a_third_takes_all_steps_a_third_any_and_a_third_what_the_gates_say(form):
    found, known = drawn_by(form)
    (judged,), every = found.images, np.stack(known["steps"], 1)
    np.testing.assert_allclose(judged[::3], every[::3, -1], atol=1e-6)
    chance = np.abs(np.asarray(judged)[1::3, None] - every[1::3]).max((2, 3, 4))
    assert (chance.min(1) < 1e-6).all()
    np.testing.assert_allclose(judged[2::3], known["model"][2::3], atol=1e-5)
    stopped, taught = np.asarray(known["model"]), np.asarray(known["taught"])
    off = [((every[:, step] - taught) ** 2).mean() for step in range(every.shape[1])]
    wanted = (np.mean(off) + ((stopped - taught) ** 2).mean()) / 2
    assert float(found.off) == pytest.approx(wanted, rel=1e-4, abs=1e-9) and wanted > 1e-5


def test_half_is_as_wide_as_the_gates_say():
    found, known = drawn_by("width")
    (judged,), narrow, whole = found.images, known["model"], known["whole"]
    np.testing.assert_allclose(judged[::2], whole[::2], atol=1e-6)
    np.testing.assert_allclose(judged[1::2], narrow[1::2], atol=1e-6)
    assert float(found.off) == pytest.approx(float(((narrow - whole) ** 2).mean()), rel=1e-4)
    assert float(found.off) > 1e-6


def test_every_size_is_judged_and_small_ones_are_the_large_one_from_afar():
    found, known = drawn_by("scales")
    for mine, size in zip(found.images, known["sizes"], strict=True):
        np.testing.assert_allclose(mine, size, atol=1e-6)
    wanted = ((known["sizes"][1] - halved(known["sizes"][0])) ** 2).mean()
    assert float(found.off) == pytest.approx(float(wanted), rel=1e-5)


def test_losses_of_all_sizes_are_finite_and_reach_every_parameter():
    model, task = build(**FORMS["scales"]), task_of("scales")
    batch, key = batch_of(8), jax.random.key(4)

    def both(model):
        return task.discriminator_loss(model, batch, key, 0.0)[0] + task.generator_loss(model, batch, key, 0.0)[0]

    grads = nnx.jit(nnx.grad(both))(model)
    for path, leaf in leaves(grads).items():
        # A constant added to every score changes no pair.
        assert np.isfinite(leaf).all() and (np.abs(leaf).max() > 1e-6) == (path != "discriminator.leave.bias"), path


# Evaluation


def test_latents_are_the_pictures_own():
    pictures = bytes_of(40)
    found = np.asarray(adversarial.latents(jnp.asarray(pictures), 6))
    assert found.shape == (40, 6) and len(np.unique(found)) == found.size
    order = np.random.default_rng(0).permutation(40)[:11]
    np.testing.assert_array_equal(adversarial.latents(jnp.asarray(pictures[order]), 6), found[order])
    one = pictures[:1].copy()
    one[0, 3, 4, 1] ^= 1  # a single bit
    near = np.asarray(adversarial.latents(jnp.asarray(one), 6))
    assert np.abs(near - found[:1]).max() > 0.1
    swapped = pictures[:1].copy()
    swapped[0, [0, 7]] = swapped[0, [7, 0]]
    assert np.abs(np.asarray(adversarial.latents(jnp.asarray(swapped), 6)) - found[:1]).max() > 0.1
    many = np.asarray(adversarial.latents(jnp.asarray(bytes_of(500)), 8))
    assert abs(many.mean()) < 0.06 and abs(many.std() - 1) < 0.05


def sums(task, model, pictures, label, size):
    """The sum of counts over batches, the last filled up with blank examples."""
    run = jax.jit(lambda m, b: task.counts(m, task.infer(m, task.prepare(m, b)), b))
    total = 0
    for start in range(0, len(pictures), size):
        part, names = pictures[start : start + size], label[start : start + size]
        missing = size - len(part)
        batch = {
            "image": np.concatenate([part, np.zeros((missing, *part.shape[1:]), np.uint8)]),
            "label": np.concatenate([names, np.full(missing, -1, np.int32)]),
        }
        total = total + np.asarray(run(model, batch), np.float64)
    return total


def test_scores_are_those_of_all_pictures_whatever_the_batches():
    task, model = task_of(), still(build())
    pictures, label = bytes_of(13, seed=3), (np.arange(13) % CLASSES).astype(np.int32)

    @jax.jit
    def everything(model):
        image, names = jnp.asarray(pictures), jnp.asarray(label)
        drawn = model.generator(adversarial.latents(image, model.latent), names)
        right = model.discriminator(model.pixels(image), names) > model.discriminator(drawn, names)
        return Extractor()(to_bytes(drawn)), right

    features, right = everything(model)
    moments = Moments.of(np.asarray(features))
    for size in (5, 13):
        scores = task.scores(sums(task, model, pictures, label, size))
        assert scores["frechet"] == pytest.approx(frechet_distance(moments, task.reference), rel=1e-3)
        assert scores["discriminator"] == pytest.approx(np.mean(right))
        spread = np.trace(moments.covariance) / np.trace(task.reference.covariance)
        assert scores["diversity"] == pytest.approx(spread, rel=1e-3) and spread > 0.01
    none = task.scores(np.zeros(2 + 3 + 9))
    assert all(np.isnan(value) for value in none.values())


GOOD = dict(frechet=4.0, diversity=0.8)


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (None, dict(frechet=1e6, diversity=0.0), ""),
        (GOOD, GOOD, ""),
        (GOOD, GOOD | dict(diversity=0.11), ""),
        (GOOD, GOOD | dict(frechet=79.0), ""),
        (GOOD | dict(diversity=0.25), GOOD | dict(diversity=0.01), ""),
        (dict(frechet=0.001, diversity=0.5), dict(frechet=19.0, diversity=0.5), ""),
        (GOOD, dict(frechet=np.nan, diversity=np.nan), ""),
        (GOOD, GOOD | dict(diversity=0.04), r"the generator has collapsed: .* 80% of the real ones' before, 4% now"),
        (GOOD, GOOD | dict(frechet=81.0), r"diverged: Fréchet distance \(brightness\) was 4.0 and is 81.0"),
    ],
)
def test_trouble_is_told_and_nothing_else(before, now, said):
    found = task_of().trouble(now, before)
    assert (found == "") == (said == "")
    if said:
        with pytest.raises(UserError, match=said):
            raise UserError(found)


def test_a_dynamic_discriminator_over_its_thresholds():
    model, task = build(**FORMS["discriminator"]), task_of("discriminator")
    pictures, label = bytes_of(8), np.array([0, 1, 2, 0, 1, 2, 0, -1], np.int32)
    batch = {"image": pictures, "label": label, "valid": label >= 0}
    points = task.judged(model, [batch])
    assert points[0].threshold == LOWEST and points[0].macs_fraction == pytest.approx(1, rel=1e-6)
    shares = [point.macs_fraction for point in points]
    assert shares == sorted(shares, reverse=True) and shares[-1] < 0.9
    whole = at(LOWEST, still(model))
    given = jax.tree.map(jnp.asarray, batch)
    counted = np.asarray(jax.jit(lambda m: task.counts(m, task.infer(m, task.prepare(m, given)), given))(whole))
    assert counted[0] == 7 and points[0].accuracy == pytest.approx(counted[1] / 7)


# The loop


class Endless(standin.Batches):
    def __next__(self):
        self.next += 1
        return batch_of(8, self.next - 1)


def test_training_goes_on_with_the_same_bits(tmp_path):
    """Of a discriminator that opens with time, whose phase is saved too; pictures are kept beside the checkpoints."""
    task = task_of("discriminator", BudgetConfig(target=0.3))

    def fit(steps, workdir):
        model, loader = build(**FORMS["discriminator"], **LITTLE), itertools.islice(Endless(), steps)
        return train.fit(model, task, loader, row(), workdir, draw=lambda model: task.pictures(model, 9), quiet=True)

    whole = standin.arrays(fit(2, tmp_path / "whole"))
    with pytest.raises(UserError, match="the data ended after 1"):
        fit(1, tmp_path / "parts")
    again = fit(2, tmp_path / "parts")
    for name, array in standin.arrays(again).items():
        np.testing.assert_array_equal(array, whole[name], err_msg=name)
    assert len(log.read_metrics(tmp_path / "parts")) == 2
    shares = {float(each.share[...]) for _, each in nnx.iter_modules(again.model) if isinstance(each, PhaseGate)}
    assert shares == {1.0}


def test_the_pictures_of_a_seed_are_the_same_whatever_their_number():
    task, model = task_of(), still(build())
    few, many = task.pictures(model, 3), task.pictures(model, 7)
    assert few.dtype == np.uint8 and few.shape == (3, 8, 12, 3) and len(np.unique(many.reshape(7, -1), axis=0)) == 7
    assert np.abs(few.astype(int) - many[:3]).max() <= 1
