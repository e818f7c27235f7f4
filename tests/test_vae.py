"""The hierarchical VAE and its task."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from blocks import make, still
from flax import nnx

from dynjax import budget, models
from dynjax.config import BudgetConfig, UserError
from dynjax.core import cost, views
from dynjax.core.controls import FixedGate
from dynjax.core.trace import traced
from dynjax.models import vae
from dynjax.models.vae import VAEConfig
from dynjax.ops.skip import Skip
from dynjax.tasks.variational import VariationalTask, divergence, integers, keys_of, nats

SMALL = VAEConfig(shape=(8, 4, 1), values=3, groups=(2, 1, 1), latents=2, features=6, inner=4)
GATED = dataclasses.replace(SMALL, dynamics="groups")


def build(config, seed=0):
    return make(lambda rngs: models.build(config, 10, rngs=rngs), seed)


def pictures(number=3, shape=(8, 4)):
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (number, *shape, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def gated():
    return build(GATED)


@pytest.fixture(scope="module")
def static(gated):
    """The same weights without gates."""
    model = nnx.clone(gated)
    for groups in model.groups:
        for number, group in enumerate(groups):
            groups[number] = group.block if isinstance(group, Skip) else group
    return model


def noise_of(model, number, seed=1):
    return jax.vmap(model.noise)(jax.random.split(jax.random.key(seed), number))


def decided(model, keep):
    """A copy whose gates keep so: (skips, B)."""
    model = nnx.clone(model)
    skips = [module for _, module in nnx.iter_modules(model) if isinstance(module, Skip)]
    for skip, each in zip(skips, keep, strict=True):
        skip.gate.gate = FixedGate(each)
    return model


@nnx.jit
def explained(model, x, noise):
    return traced(model)(x, noise)


@nnx.jit
def drawn(model, noise):
    return traced(lambda model, noise: model.generate(noise))(model, noise)


def kept(how, number):
    """Decisions of the three gates."""
    random = np.random.default_rng(number).integers(0, 2, (3, number))
    return {"all": np.ones((3, number)), "none": np.zeros((3, number)), "random": random}[how]


@pytest.mark.parametrize("number", [1, 5])
def test_compact_is_masked(gated, number):
    x, noise = integers(gated, pictures(number)), noise_of(gated, number)
    for how in ("all", "none", "random"):
        model = decided(gated, kept(how, number))
        (found, trace), (masked, other) = (
            explained(still(model, execution), x, noise.latents) for execution in ("compact", "masked")
        )
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(masked), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(found.kl[:, 1:] > 0, kept(how, number).T > 0)
        np.testing.assert_allclose(trace.macs(), other.macs())
        images, others = (drawn(still(model, execution), noise)[0] for execution in ("compact", "masked"))
        np.testing.assert_array_equal(images, others)


def test_a_gate_decides_alike_whether_a_picture_is_drawn_or_explained(gated):
    """Of latents of the prior that are told as posterior the state is the same: so is what every gate says."""
    model = still(gated)
    for _, group in nnx.iter_modules(model):
        if isinstance(group, vae.Group):
            group.posterior.widen.kernel[...] = jnp.zeros_like(group.posterior.widen.kernel[...])
            group.posterior.widen.bias[...] = jnp.zeros_like(group.posterior.widen.bias[...])
    budget.set_threshold(model, 0.1)
    noise = noise_of(model, 5)
    _, explains = explained(model, integers(model, pictures(5)), noise.latents)
    _, draws = drawn(model, noise)
    assert explains.decisions.keys() == draws.decisions.keys() and len(draws.decisions) == 3
    for path, decision in draws.decisions.items():
        np.testing.assert_allclose(decision.probability, explains.decisions[path].probability, rtol=1e-5)


def test_with_all_groups_kept_it_is_the_twin_and_with_none_a_model_without_them(static, gated):
    x, noise = integers(static, pictures()), noise_of(static, 3).latents
    whole, _ = explained(still(decided(gated, kept("all", 3))), x, noise)
    found, _ = explained(still(static), x, noise)
    np.testing.assert_allclose(whole.params, found.params, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(whole.kl, found.kl, rtol=1e-5)
    alone = nnx.clone(static)
    alone.groups = nnx.List([nnx.List([alone.groups[0][0]]), nnx.List([]), nnx.List([])])
    none, _ = explained(still(decided(gated, kept("none", 3))), x, noise)
    less, _ = explained(still(alone), x, noise[:, : 2 * 1 * 2])
    np.testing.assert_allclose(none.params, less.params, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(none.kl.sum(1), less.kl.sum(1), rtol=1e-5)


def test_divergence_by_hand_and_by_drawing():
    # q = N(3, 0.5^2), p = N(1, 2^2): log(2 / 0.5) + (0.25 + 4) / 8 - 1/2.
    shift, log_width = jnp.float32((3 - 1) / 2), jnp.log(jnp.float32(0.5 / 2))
    wanted = np.log(4) + 4.25 / 8 - 0.5
    assert float(vae.relative_kl(shift, log_width)) == pytest.approx(wanted, rel=1e-6)
    assert float(vae.relative_kl(jnp.float32(0), jnp.float32(0))) == 0
    z = 3 + 0.5 * np.random.default_rng(0).normal(size=200_000)
    log_q = -0.5 * ((z - 3) / 0.5) ** 2 - np.log(0.5)
    log_p = -0.5 * ((z - 1) / 2) ** 2 - np.log(2)
    assert (log_q - log_p).mean() == pytest.approx(wanted, abs=0.01)


def test_the_bound_is_below_the_likelihood_of_a_model_that_is_known(static):
    """One group: log p(x) by many latents of the prior is more than the bound in the mean."""
    model = still(build(dataclasses.replace(SMALL, groups=(1,), shape=(2, 2, 1))))
    x = jnp.broadcast_to(integers(model, pictures(1, (2, 2))), (4096, 2, 2, 1))
    noise = noise_of(model, 4096).latents
    found, _ = explained(model, x, noise)
    bound = -(nats(model, found, x) + found.kl.sum(1)).mean()
    params = model._descend(noise)[0]
    likelihood = jax.nn.logsumexp(-nats(model, vae.Explained(params, found.kl), x)) - np.log(4096)
    assert float(bound) < float(likelihood)


def test_costs_are_those_of_the_jaxpr(static, gated):
    task = VariationalTask()
    batch = task.prepare(gated, {"image": pictures(), "label": jnp.zeros(3, int)})
    whole, one = (
        cost.macs(lambda model, x, noise: model(x, noise), still(model), batch["x"][:1], batch["noise"][:1])
        for model in (gated, static)
    )
    _, trace = explained(still(decided(gated, kept("random", 3))), batch["x"], batch["noise"])
    _, own = explained(still(gated), batch["x"], batch["noise"])
    assert own.full_macs == pytest.approx(whole) and trace.full_macs == pytest.approx(one)
    spent = [d.full_macs for d in trace.decisions.values()]
    np.testing.assert_allclose(trace.macs(), trace.static_macs + kept("random", 3).T @ np.array(spent), rtol=1e-6)
    _, draws = drawn(still(gated), noise_of(gated, 3))
    assert draws.full_macs < own.full_macs


def test_free_bits_and_beta():
    kl = jnp.array([[1.0, 0.0], [3.0, 0.2]])
    assert float(divergence(kl)) == pytest.approx(2.1)
    assert float(divergence(kl, 1.0)) == pytest.approx(2 + np.log(2))
    gradient = jax.grad(lambda kl: divergence(kl, 1.0))(kl)
    np.testing.assert_allclose(gradient, [[0.5, 0], [0.5, 0]])


def test_training_weighs_the_divergence_and_scores_do_not(static):
    batch = {"image": pictures(), "label": jnp.array([3, 1, -1])}

    @functools.partial(nnx.jit, static_argnums=1)
    def loss(model, task):
        return task.loss(model, batch, jax.random.key(0), 0.5)

    plain, heavy = (loss(static, VariationalTask(beta))[1] for beta in (1.0, 3.0))
    free = loss(static, VariationalTask(free_bits=1e6))[1]
    assert float(plain["loss"]) == pytest.approx(float(plain["bits_per_dim"]), rel=1e-5)
    assert float(heavy["loss"]) == pytest.approx(float(plain["loss"] + 2 * plain["kl_per_dim"]), rel=1e-5)
    error = plain["bits_per_dim"] - plain["kl_per_dim"]
    assert float(free["loss"]) == pytest.approx(float(error) + 4 * 1e6 / 32, rel=1e-5)
    for other in (heavy, free):
        assert float(other["bits_per_dim"]) == pytest.approx(float(plain["bits_per_dim"]), rel=1e-6)


def test_scores_are_of_all_pictures_without_the_blank_ones(static):
    task = VariationalTask(beta=7.0, free_bits=9.0)
    batch = task.prepare(static, {"image": pictures(), "label": jnp.array([3, 1, -1])})
    found, _ = explained(still(static), batch["x"], batch["noise"])
    scores = task.scores(np.asarray(task.counts(static, found, batch)))
    error, latents = nats(static, found, batch["x"])[:2].sum(), found.kl[:2].sum()
    dimensions = 2 * 32 * np.log(2)
    assert scores["bits_per_dim"] == pytest.approx(float(error + latents) / dimensions, rel=1e-5)
    assert scores["kl_per_dim"] == pytest.approx(float(latents) / dimensions, rel=1e-5)
    assert np.isnan(task.scores(np.zeros(3))["bits_per_dim"])


def test_noise_of_an_evaluation_is_that_of_the_picture_wherever_it_stands(static):
    image = pictures()
    task = VariationalTask()
    first, second = (
        task.prepare(static, {"image": each, "label": jnp.zeros(3, int)})["noise"] for each in (image, image[::-1])
    )
    np.testing.assert_array_equal(first, second[::-1])
    assert len(np.unique(np.asarray(first))) == first.size
    changed = image.at[0, 0, 0, 0].add(1)
    assert (jax.random.key_data(keys_of(changed)) != jax.random.key_data(keys_of(image))).any(1).tolist() == [1, 0, 0]


def test_same_noise_same_picture(gated):
    model, noise = still(gated), noise_of(gated, 5)
    images = np.asarray(drawn(model, noise)[0])
    assert images.shape == (5, 8, 4, 1) and images.dtype == np.int32 and 0 <= images.min() <= images.max() < 3
    np.testing.assert_array_equal(images, drawn(model, noise)[0])
    back = jax.tree.map(lambda a: a[::-1], noise)
    np.testing.assert_array_equal(images[::-1], drawn(model, back)[0])
    assert (images != np.asarray(drawn(model, noise_of(gated, 5, seed=2))[0])).any()


@pytest.mark.parametrize("gate", ["learned", "random"])
def test_training_goes_down(gate):
    config = dataclasses.replace(GATED, gate=gate, shape=(4, 4, 1), groups=(1, 1), features=12, inner=8)
    model = models.build(config, 10, rngs=nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    task, optimizer = VariationalTask(free_bits=1.0, budget=BudgetConfig(target=0.5)), optax.adam(1e-2)
    # Half of them bright on the left: one bit a picture.
    side = np.zeros((8, 4, 4, 3), np.uint8)
    side[::2, :, :2] = side[1::2, :, 2:] = 255
    batch = {"image": jnp.asarray(side), "label": jnp.zeros(8, int)}

    @jax.jit
    def step(params, rest, state, key):
        def loss(params):
            model = views.training(nnx.merge(graphdef, params, rest, copy=True))
            value, metrics = task.loss(model, batch, key, 0.5)
            return value, (nnx.state(model, nnx.Not(nnx.Param)), metrics)

        (_, (rest, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), rest, state, metrics

    state, seen = optimizer.init(params), []
    for number in range(100):
        params, rest, state, metrics = step(params, rest, state, jax.random.key(number))
        seen.append({name: float(value) for name, value in metrics.items()})
    last = {name: np.mean([each[name] for each in seen[-20:]]) for name in seen[0]}
    # Pixels by themselves take a bit each.
    assert seen[0]["bits_per_dim"] > 1 and last["bits_per_dim"] < 0.7
    assert 0 < last["macs_fraction"] < 1 and {"target", "gate_entropy"} <= last.keys()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(shape=(6, 8, 1)), r"--model\.groups is 2 1 1: it must be so few that 6x8 pixels"),
        (dict(groups=(0, 1)), r"--model\.groups is 0 1: it must be 1 or more at the first"),
        (dict(groups=()), r"--model\.groups is empty: it must be 1 to 11 numbers"),
        (dict(groups=(1,), dynamics="groups"), r"--model\.groups is 1: it must be 2 or more in all"),
        (dict(beta=-1.0), r"--model\.beta is -1\.0: it must be 0 or more"),
        (dict(free_bits=float("nan")), r"--model\.free-bits is nan: it must be 0 or more"),
        (dict(conditional=True), r"--model\.conditional is True: it must be False"),
        (dict(shape=(8, 8, 3)), r"--model\.likelihood is categorical: it must be logistic for 3 channels"),
        (dict(gate="random"), r"--model\.gate is random: it must be learned"),
    ],
)
def test_configurations_that_make_no_sense(fields, message):
    with pytest.raises(UserError, match=message):
        models.build(dataclasses.replace(SMALL, **fields), 10, rngs=nnx.Rngs(0))


def test_the_family():
    assert models.task_of(SMALL) == "variational" and models.is_static(SMALL) and not models.is_static(GATED)
    assert models.static_twin(dataclasses.replace(GATED, gate="random")) == SMALL
    assert models.difference(dataclasses.replace(SMALL, beta=2.0), GATED) == ""
    assert "is 2 there and 3 here" in models.difference(SMALL, dataclasses.replace(GATED, latents=3))


def test_a_dynamic_model_starts_from_the_twin():
    config = dataclasses.replace(SMALL, groups=(1, 1), shape=(4, 4, 1))
    twin = models.build(config, 10, rngs=nnx.Rngs(0))
    gated = dataclasses.replace(config, dynamics="groups")
    model = models.build(gated, 10, rngs=nnx.Rngs(1), twin_params=nnx.state(twin, nnx.Param))
    model = still(model)
    budget.set_threshold(model, budget.LOWEST)
    x, noise = integers(twin, pictures(3, (4, 4))), noise_of(twin, 3)
    found, other = explained(model, x, noise.latents)[0], explained(still(twin), x, noise.latents)[0]
    np.testing.assert_allclose(found.params, other.params, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(model.likeliest(found.params), found.params.argmax(-1)[..., None])


def test_colours_are_drawn_and_explained():
    config = dataclasses.replace(SMALL, shape=(4, 4, 3), values=256, likelihood="logistic", components=2, groups=(1, 1))
    model = still(build(config))
    x, noise = integers(model, pictures(2, (4, 4))), noise_of(model, 2)
    found, _ = explained(model, x, noise.latents)
    assert found.params.shape == (2, 4, 4, 2 * 10) and np.isfinite(nats(model, found, x)).all()
    images = drawn(model, noise)[0]
    assert images.shape == (2, 4, 4, 3) and 0 <= int(images.min()) <= int(images.max()) < 256
    assert model.likeliest(found.params).shape == (2, 4, 4, 3)
