"""Losses of scores, penalties of gradients and augmentation: by hand, in closed form, and by finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import image

from dynjax.tasks.contest import CONTESTS, augmented, penalty, squared_gradient

REAL, DRAWN = np.array([0.5, -1.5, 3.0]), np.array([-0.25, 2.0, -4.0])


def soft(x):
    return np.log1p(np.exp(x))


BY_HAND = {
    "relativistic": (soft(DRAWN - REAL).mean(), soft(REAL - DRAWN).mean()),
    "non_saturating": (soft(-REAL).mean() + soft(DRAWN).mean(), soft(-DRAWN).mean()),
    # max(0, 1 - r) is 0.5, 2.5, 0 and max(0, 1 + f) is 0.75, 3, 0.
    "hinge": (3.0 / 3 + 3.75 / 3, 2.25 / 3),
    "wasserstein": (-2.25 / 3 - 2.0 / 3, 2.25 / 3),
}


@pytest.mark.parametrize("name", CONTESTS)
def test_a_contest_by_hand(name):
    real, drawn = jnp.asarray(REAL, jnp.float32), jnp.asarray(DRAWN, jnp.float32)
    both = CONTESTS[name]
    assert float(both.discriminator(real, drawn)) == pytest.approx(BY_HAND[name][0], rel=1e-6)
    assert float(both.generator(real, drawn)) == pytest.approx(BY_HAND[name][1], rel=1e-6)
    # The discriminator gains where real pictures score higher, the generator where drawn ones do.
    to_real, to_drawn = jax.grad(both.discriminator, (0, 1))(real, drawn)
    assert (to_real <= 0).all() and (to_drawn >= 0).all() and to_real.any() and to_drawn.any()
    assert (jax.grad(both.generator, 1)(real, drawn) < 0).all()


# Penalties


@jax.jit
def score(x):
    """Of every picture its own score: no kinks, and another gradient at every picture."""
    row, column = (jnp.linspace(-1, 1, side).reshape(shape) for side, shape in zip(x.shape[1:3], ((-1, 1), (1, -1))))  # noqa: B905
    weight = (row + 2 * column * row - 0.5)[None, :, :, None]
    return jnp.sin((weight * x).sum((1, 2, 3))) + (jnp.tanh(x) * x**2).sum((1, 2, 3))


def by_differences(x, epsilon=1e-6):
    """Squared norms of the gradients of `score`, in float64 by central differences."""
    found = np.zeros(x.shape)
    for place in np.ndindex(*x.shape[1:]):
        step = np.zeros(x.shape)
        step[(slice(None), *place)] = epsilon
        found[(slice(None), *place)] = (np.asarray(score(x + step)) - np.asarray(score(x - step))) / (2 * epsilon)
    return (found**2).sum((1, 2, 3))


PENALTIES = {
    "relativistic": lambda real, drawn, _: (by_differences(real) + by_differences(drawn)).mean() / 2,
    "non_saturating": lambda real, drawn, _: by_differences(real).mean() / 2,
    "hinge": lambda real, drawn, _: by_differences(real).mean() / 2,
    "wasserstein": lambda real, drawn, share: (
        (np.sqrt(by_differences(share * real + (1 - share) * drawn)) - 1) ** 2
    ).mean(),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_equal_finite_differences(name):
    with jax.enable_x64(True):
        real, drawn = (jnp.asarray(np.random.default_rng(seed).normal(size=(3, 3, 2, 1))) for seed in (0, 1))
        key = jax.random.key(5)
        share = jax.random.uniform(key, (3, 1, 1, 1), real.dtype)
        found, wanted = penalty(name, score, real, drawn, key), PENALTIES[name](real, drawn, share)
        np.testing.assert_allclose(squared_gradient(score, real), by_differences(real), rtol=1e-7)
    assert found.dtype == jnp.float64 and float(found) == pytest.approx(float(wanted), rel=1e-7)


@pytest.mark.parametrize(
    ("name", "wanted"), [("relativistic", 6.25), ("non_saturating", 3.125), ("hinge", 3.125), ("wasserstein", 2.25)]
)
def test_penalties_of_a_linear_score(name, wanted):
    """Its gradient is the weight, whose norm is 2.5, at every picture."""
    weight = image(1, 4, 3, 1)
    weight = 2.5 * weight / jnp.sqrt((weight**2).sum())
    real, drawn = image(5, 4, 3, 1, seed=1), image(5, 4, 3, 1, seed=2)

    def of(scale):
        linear = lambda x: scale * (weight * x).sum((1, 2, 3))  # noqa: E731
        return penalty(name, linear, real, drawn, jax.random.key(0))

    value, slope = jax.value_and_grad(of)(1.0)
    assert float(value) == pytest.approx(wanted, rel=1e-5)
    # Its own gradient, which the discriminator learns from: squares, and (2.5 s - 1)² of WGAN-GP.
    assert float(slope) == pytest.approx(2 * 2.5 * 1.5 if name == "wasserstein" else 2 * wanted, rel=1e-5)


def test_no_gradient_at_all_is_no_trouble_for_wgan_gp():
    x = image(2, 3, 3, 1)
    flat = lambda scale: penalty("wasserstein", lambda x: scale * x.sum((1, 2, 3)), x, x, jax.random.key(0))  # noqa: E731
    value, slope = jax.value_and_grad(flat)(0.0)
    assert float(value) == pytest.approx(1, abs=1e-5) and np.isfinite(slope)


# Augmentation


def test_strength_0_is_the_identity():
    x = image(2, 4, 4, 1)
    assert augmented(x, 0.0, jax.random.key(0)) is x


once = jax.jit(augmented, static_argnums=1)
SHAPE = COUNT, HEIGHT, WIDTH = 48, 16, 24


def found_by(x, strength, seed):
    return np.asarray(once(jnp.asarray(x, jnp.float32), strength, jax.random.key(seed)))


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_every_picture_is_shifted_over_black_cut_out_and_brightened(strength):
    """Every pixel has a value of its own, so that what became of each can be told; both sides differ."""
    count, height, width = SHAPE
    x = np.arange(height * width).reshape(1, height, width, 1) / (height * width) - 0.5
    found = found_by(np.repeat(x, count, 0), strength, 0)
    shifts, squares, brightness, cut = set(), set(), [], 0
    for each in found:
        ways = []
        for down in range(-height // 8, height // 8 + 1):
            for right in range(-width // 8, width // 8 + 1):
                # Black comes in over the border; of what is not cut out, everything is as bright as everything else.
                padded = np.pad(x[0], ((3, 3), (3, 3), (0, 0)), constant_values=-1)
                moved = padded[3 - down : 3 - down + height, 3 - right : 3 - right + width]
                light = np.median(each - moved)
                off = np.abs(each - moved - light) > 1e-5
                ways.append((off.sum(), down, right, light, off))
        _, down, right, light, off = min(ways, key=lambda way: way[0])
        rows, columns = off[..., 0].any(1).nonzero()[0], off[..., 0].any(0).nonzero()[0]
        if len(rows):  # one rectangle, grey before it was brightened
            inside = each[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            np.testing.assert_allclose(inside, light, atol=1e-5)
            squares.add((len(rows), len(columns)))
            cut += 1
        shifts.add((down, right))
        brightness.append(light)
    most = {axis: max(abs(shift[axis]) for shift in shifts) for axis in (0, 1)}
    assert most == {0: round(strength * height / 8), 1: round(strength * width / 8)}
    assert len(shifts) > 8 and cut > 40
    assert max(high for high, _ in squares) <= strength * height / 2
    assert max(wide for _, wide in squares) <= strength * width / 2
    assert max(high for high, _ in squares) >= strength * height / 2 - 1
    assert -strength / 2 <= min(brightness) < -0.3 * strength and 0.3 * strength < max(brightness) <= strength / 2


def test_the_same_key_does_the_same():
    x = image(*SHAPE, 1)
    np.testing.assert_array_equal(found_by(x, 1.0, 3), found_by(x, 1.0, 3))
    assert np.abs(found_by(x, 1.0, 3) - found_by(x, 1.0, 4)).max(axis=(1, 2, 3)).min() > 0.1


def test_augmentation_is_differentiable_and_what_is_cut_out_has_no_gradient():
    """But for what it adds it is linear, so that its derivative along a direction is what it does to that."""
    x, direction, key = image(*SHAPE, 1), image(*SHAPE, 1, seed=1), jax.random.key(3)

    @jax.jit
    def run(x):
        y, back = jax.vjp(lambda x: augmented(x, 1.0, key), x)
        return y, back(jnp.ones_like(y))[0], jax.jvp(lambda x: augmented(x, 1.0, key), (x,), (direction,))[1]

    y, grads, moved = run(x)
    np.testing.assert_allclose(moved, found_by(x + direction, 1.0, 3) - y, atol=1e-5)
    assert set(np.round(np.asarray(grads), 5).ravel()) == {0.0, 1.0}
    gone = (HEIGHT * WIDTH - np.asarray(grads).sum((1, 2, 3))).max()
    assert 0 < gone <= HEIGHT * WIDTH / 4 + 2 * WIDTH + 3 * HEIGHT  # a square, and what was shifted out
